"""The optimizers of `optimizer.name`, one module each.

A builder returns the transformations that turn a clipped gradient into a direction. The train step subtracts this
direction times the learning rate.
"""

from collections.abc import Callable

import optax

from nextllm_jax.config import ModelConfig, OptimizerConfig
from nextllm_jax.training.optimizers.adamw import adamw
from nextllm_jax.training.optimizers.muon import muon
from nextllm_jax.training.optimizers.parts import clip_by_global_norm

_BUILDERS: dict[str, Callable[[OptimizerConfig, ModelConfig], tuple[optax.GradientTransformation, ...]]] = {
    "adamw": adamw,
    "muon": muon,
}


def make_optimizer(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping and the optimizer `config.name` with a learning rate of 1. The train step multiplies by the schedule.

    It does so because the schedule counts skipped steps, which optax's own count does not. `update` takes the
    `grad_norm` of the whole gradient as an argument, or else computes it.
    """
    return optax.chain(clip_by_global_norm(config.clip_norm), *_BUILDERS[config.name](config, model))
