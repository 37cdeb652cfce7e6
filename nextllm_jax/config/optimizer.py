"""Every setting of an optimizer. Importing this module does not import jax."""

import dataclasses
from typing import Literal

from nextllm_jax.config.checks import check_types, require, require_positive
from nextllm_jax.config.fields import Fixed, Free

LARGEST_DIRECTION = 1e30
"""An upper bound on the change of a parameter at a learning rate of 1, apart from weight decay. It allows a step to be
skipped before its update is computed; see `training.update`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Global-norm clipping, an optimizer and a learning-rate schedule."""

    name: Fixed[Literal["adamw", "muon"]] = "adamw"
    """adamw: AdamW; muon: Muon for the matrices of the layers, AdamW for embedding, head, norms and biases."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    adamw_learning_rate: float | None = None
    """Peak learning rate of the parameters that muon leaves to AdamW; none: learning_rate. Both follow the schedule."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Learning rate after the warmup. cosine: cosine decay; wsd: constant, then a linear decay at the end; linear:
    linear decay; constant: no decay."""
    warmup_steps: int = 100
    """Steps of linear warmup, at most half of the schedule. The first step has learning_rate / steps, not 0."""
    schedule_steps: int | None = None
    """Length of the schedule, including warmup; none: training.steps. Set it if the run may be extended later."""
    decay_steps_fraction: float = 0.2
    """Fraction of the schedule in which wsd decays. The decay never overlaps the warmup."""
    final_learning_rate_fraction: float = 0.1
    """Learning rate at the end of a decay, as a fraction of the peak."""
    b1: float = 0.9
    """Decay of AdamW's first moment. Muon's momentum decays by 0.95."""
    b2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """Epsilon of AdamW."""
    weight_decay: float = 0.1
    """Decoupled weight decay. Norms and biases are never decayed."""
    decay_embeddings: bool = False
    """Also decay the embedding and the output head."""
    clip_norm: float = 1.0
    """Maximum global norm of the accumulated gradient; larger gradients are scaled down to it."""
    first_moment_dtype: Fixed[Literal["float32", "bfloat16"]] = "float32"
    """Type in which AdamW's first moment and Muon's momentum are stored."""
    shard_over_data: Free[bool] = False
    """Also shard the moments and the accumulated gradient over mesh.data (ZeRO-1). This saves memory, but the new
    parameters must be gathered after each step, and gradients reduced after each microbatch instead of once a step."""
    offload_state: Free[bool] = False
    """Store the moments in host memory (TPU and GPU). A device then holds the moments of the embedding, the head and a
    few layers at a time."""

    def __post_init__(self) -> None:
        check_types(self, "optimizer.")
        require_positive(self, "optimizer.", "learning_rate", "adamw_learning_rate", "clip_norm", "eps")
        require(
            self.adamw_learning_rate is None or self.name != "adamw",
            "optimizer.adamw_learning_rate is only for optimizer.name muon; set it to None, use learning_rate",
        )
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name} is {value}; it cannot be negative")
        for name in ("decay_steps_fraction", "final_learning_rate_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name} is {value}; it must be between 0 and 1")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}; it must be at least 0 and below 1")
        length = self.schedule_steps or 0
        require(length >= 0, f"optimizer.schedule_steps is {length}; it cannot be negative")
        # Values whose norm is finite are below 2e19. AdamW divides them by eps at most.
        largest = min(self.clip_norm, 2e19) / self.eps * max(1, self.adamw_rate_ratio)
        message = f"optimizer.eps {self.eps} is so small that an update by clip_norm / eps could overflow; raise it"
        require(largest <= LARGEST_DIRECTION, message)
        decay = self.weight_decay
        require(decay <= LARGEST_DIRECTION, f"optimizer.weight_decay is {decay}; it must be finite and below 1e30")

    @property
    def adamw_rate_ratio(self) -> float:
        """adamw_learning_rate / learning_rate."""
        return 1.0 if self.adamw_learning_rate is None else self.adamw_learning_rate / self.learning_rate

    def schedule_length(self, training_steps: int) -> int:
        """Steps of the schedule, including warmup."""
        return self.schedule_steps or training_steps

    def warmup_length(self, training_steps: int) -> int:
        """Steps of warmup: warmup_steps, but at most half of the schedule."""
        return min(self.warmup_steps, self.schedule_length(training_steps) // 2)
