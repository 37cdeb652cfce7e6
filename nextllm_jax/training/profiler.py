"""Writes a profiler trace of a few train steps, for XProf and Perfetto."""

import contextlib
import logging
from collections.abc import Callable

import jax

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.training.hooks import Hook
from nextllm_jax.training.step import StepMetrics

_WARM_UP_STEPS = 2
"""Number of first steps that are not traced: the first compiles, and the second still fills the pipeline."""

_log = logging.getLogger(__name__)


class StepProfiler(Hook):
    """Traces `steps` steps into profile/ of a run, after the warm-up steps that follow `step`. 0 steps: no trace.

    Only process 0 should trace, since its devices take part in every collective; other processes pass 0 steps. `pause`
    is called before the trace starts and before it stops, and waits for the last step.
    """

    def __init__(self, run: RunDir, step: int, steps: int, pause: Callable[[], None]) -> None:
        self._run, self._pause, self._files = run, pause, contextlib.ExitStack()
        self._first, self._last = step + _WARM_UP_STEPS + 1, step + _WARM_UP_STEPS + steps
        self._wanted, self._tracing = steps > 0, False

    def before_step(self, step: int) -> None:
        """Start the trace if `step` is the first to be traced."""
        if self._wanted and step == self._first:
            self._pause()
            directory = self._files.enter_context(self._run.new_profile())
            jax.profiler.start_trace(directory, create_perfetto_trace=True)
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
            self._files.close()
            directory = self._run.profile
            traces = sorted((directory / "plugins" / "profile").glob("*/perfetto_trace.json.gz"))
            _log.info(f"profile: `xprof --logdir {directory}`, or {traces[-1]} in https://ui.perfetto.dev")
        elif self._wanted:
            _log.warning(f"no profile: training ended within the first {_WARM_UP_STEPS} steps, which are not traced")
        self._wanted = self._tracing = False
