"""A profiler trace of a few steps of a training, for XProf and Perfetto."""

from collections.abc import Callable

import jax
from etils import epath

_WARM_UP_STEPS = 2
"""Steps that are not traced at the start: the first compiles, and the second still fills the pipeline."""


class StepProfiler:
    """Traces `steps` steps, after those of the warm-up from `step` on, into a directory; with 0 it does nothing.

    The trace is process 0's, whose devices take part in every collective: elsewhere give 0 steps. `say` gets a line
    for the user.
    """

    def __init__(self, directory: epath.Path, step: int, steps: int, say: Callable[[str], None]) -> None:
        self._directory, self._say = directory, say
        self._begin, self._end = step + _WARM_UP_STEPS, step + _WARM_UP_STEPS + steps
        self._wanted, self._tracing = steps > 0, False

    def begin_if_due(self, step: int, pause: Callable[[], None]) -> None:
        """Start tracing if it begins after `step`; `pause` is called before, and waits for that step."""
        if self._wanted and step == self._begin:
            pause()
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._tracing = True

    def end_if_due(self, step: int, pause: Callable[[], None]) -> None:
        """Stop tracing if it ends with `step`; `pause` is called before, and waits for that step."""
        if self._tracing and step == self._end:
            pause()
            self.close()

    def close(self) -> None:
        """Stop tracing and say where the trace is and what opens it; or that the training was too short for one."""
        if self._tracing:
            jax.profiler.stop_trace()
            traces = sorted((self._directory / "plugins" / "profile").glob("*/perfetto_trace.json.gz"))
            self._say(f"profile: `xprof --logdir {self._directory}`, or {traces[-1]} in https://ui.perfetto.dev")
        elif self._wanted:
            self._say(f"no profile: only steps after the first {_WARM_UP_STEPS} are traced")
        self._wanted = self._tracing = False
