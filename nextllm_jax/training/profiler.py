"""Writes a profiler trace of a few train steps, for XProf and Perfetto."""

from collections.abc import Callable

import jax
from etils import epath

_WARM_UP_STEPS = 2
"""Number of first steps that are not traced: the first compiles, and the second still fills the pipeline."""


class StepProfiler:
    """Traces `steps` steps into a directory, starting after the warm-up steps that follow `step`. 0 steps: no trace.

    Only process 0 should trace, since its devices take part in every collective; other processes pass 0 steps. `say` is
    called with a message for the user.
    """

    def __init__(self, directory: epath.Path, step: int, steps: int, say: Callable[[str], None]) -> None:
        self._directory, self._say = directory, say
        self._begin, self._end = step + _WARM_UP_STEPS, step + _WARM_UP_STEPS + steps
        self._wanted, self._tracing = steps > 0, False

    def begin_if_due(self, step: int, pause: Callable[[], None]) -> None:
        """Start tracing if the trace begins after `step`. First calls `pause`, which waits for that step."""
        if self._wanted and step == self._begin:
            pause()
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._tracing = True

    def end_if_due(self, step: int, pause: Callable[[], None]) -> None:
        """Stop tracing if the trace ends with `step`. First calls `pause`, which waits for that step."""
        if self._tracing and step == self._end:
            pause()
            self.close()

    def close(self) -> None:
        """Stop tracing. Report where the trace is and how to open it, or that the training was too short for one."""
        if self._tracing:
            jax.profiler.stop_trace()
            traces = sorted((self._directory / "plugins" / "profile").glob("*/perfetto_trace.json.gz"))
            self._say(f"profile: `xprof --logdir {self._directory}`, or {traces[-1]} in https://ui.perfetto.dev")
        elif self._wanted:
            self._say(f"no profile: training ended within the first {_WARM_UP_STEPS} steps, which are not traced")
        self._wanted = self._tracing = False
