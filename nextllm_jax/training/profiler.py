"""Writes a profiler trace of a few train steps, for XProf and Perfetto."""

import logging
from collections.abc import Callable

import jax
from etils import epath

from nextllm_jax.training.hooks import Hook
from nextllm_jax.training.step import StepMetrics

_WARM_UP_STEPS = 2
"""Number of first steps that are not traced: the first compiles, and the second still fills the pipeline."""

_log = logging.getLogger(__name__)


class StepProfiler(Hook):
    """Traces `steps` steps into a directory, starting after the warm-up steps that follow `step`. 0 steps: no trace.

    Only process 0 should trace, since its devices take part in every collective; other processes pass 0 steps. `pause`
    is called before the trace starts and before it stops, and waits for the last step.
    """

    def __init__(self, directory: epath.Path, step: int, steps: int, pause: Callable[[], None]) -> None:
        self._directory, self._pause = directory, pause
        self._first, self._last = step + _WARM_UP_STEPS + 1, step + _WARM_UP_STEPS + steps
        self._wanted, self._tracing = steps > 0, False

    def before_step(self, step: int) -> None:
        """Start the trace if `step` is the first to be traced."""
        if self._wanted and step == self._first:
            self._pause()
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._tracing = True

    def after_step(self, step: int, metrics: StepMetrics) -> None:
        """Stop the trace if `step` is the last to be traced."""
        if self._tracing and step == self._last:
            self._pause()
            self.close()

    def close(self) -> None:
        """Stop the trace. Report where it is and how to open it, or that the training was too short for one."""
        if self._tracing:
            jax.profiler.stop_trace()
            traces = sorted((self._directory / "plugins" / "profile").glob("*/perfetto_trace.json.gz"))
            _log.info(f"profile: `xprof --logdir {self._directory}`, or {traces[-1]} in https://ui.perfetto.dev")
        elif self._wanted:
            _log.warning(f"no profile: training ended within the first {_WARM_UP_STEPS} steps, which are not traced")
        self._wanted = self._tracing = False
