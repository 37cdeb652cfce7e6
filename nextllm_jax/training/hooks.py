"""`Hook`: work that accompanies the steps of a run on a schedule of its own, such as logging or profiling."""

import logging
from collections.abc import Callable

from nextllm_jax.checkpoint import orbax_errors
from nextllm_jax.config import Config
from nextllm_jax.errors import InputError, RunFailed
from nextllm_jax.training.state import TrainState
from nextllm_jax.training.step import StepMetrics

_log = logging.getLogger(__name__)


class Hook:
    """What the training loop calls at certain points. A hook overrides the methods that it needs.

    All processes call the same methods of the same hooks in the same order, so a hook may compute on the mesh.
    """

    def before_step(self, step: int) -> None:
        """Called before step `step` is dispatched."""

    def after_step(self, step: int, metrics: StepMetrics) -> None:
        """Called after step `step` is dispatched. Reading `metrics` waits for the step."""

    def pause(self) -> None:
        """Called when the steps pause, before the run is saved or evaluated."""

    def after_evaluation(self, step: int, state: TrainState) -> None:
        """Called once the validation loss of `state` is recorded.

        Called again for the same step if the run was interrupted before the next step and is resumed.
        """

    def close(self) -> None:
        """Called at the end of the training, also after an error."""


def is_due(config: Config, every: int, step: int) -> bool:
    """Whether work is due at a step: every `every` steps and at the last step, at step 0 only with init_from."""
    return (step > 0 or config.init_from is not None) and (step % every == 0 or step == config.training.steps)


class OptionalOutput:
    """An output that a run can do without. Its first failure is reported, and disables it."""

    def __init__(self, name: str) -> None:
        self._name, self._failed = name, False

    def write(self, write: Callable[[], object]) -> None:
        """Call `write`, unless an earlier call failed."""
        if self._failed:
            return
        try:
            write()
        except Exception as error:
            self._failed = True
            kind = "" if isinstance(error, OSError | InputError | RunFailed) else f"{type(error).__name__}: "
            _log.warning(f"{self._name} is disabled for this training ({kind}{orbax_errors.cause(error)})")
