"""`Session`: the parts of a run that its steps work with; `Moment`: where the run is between two steps."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config
from nextllm_jax.distributed.signals import StopRequest
from nextllm_jax.training.hooks import Hook
from nextllm_jax.training.metrics import TrainMeter
from nextllm_jax.training.start import Start
from nextllm_jax.training.state import TrainState
from nextllm_jax.training.step import StepMetrics
from nextllm_jax.training.trackers import Tracker
from nextllm_jax.training.writers import MetricsWriter


class Moment(NamedTuple):
    """A run between two steps."""

    step: int
    """The same as state.step, but known before the device has finished the step."""
    state: TrainState
    metrics: StepMetrics | None = None
    """Of the step; None for the step at which this process starts or resumes."""
    evaluated: bool = False
    """Whether the step's validation loss is recorded."""


@dataclasses.dataclass(frozen=True)
class Session:
    """A run directory that is open for training, and what its steps need."""

    start: Start
    run: RunDir
    checkpoints: Checkpoints
    meter: TrainMeter
    writer: MetricsWriter
    trackers: Sequence[Tracker]
    stop: StopRequest
    hooks: list[Hook]
    base: str | None = None
    """The `base_id` of the run's frozen base weights, if it has any."""

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.start.config

    def pause(self) -> None:
        """Wait for the last step, and pause all hooks."""
        for hook in self.hooks:
            hook.pause()
