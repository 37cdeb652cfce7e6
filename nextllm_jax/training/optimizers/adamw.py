"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

import jax.numpy as jnp
import optax

from nextllm_jax.config import ModelConfig, OptimizerConfig
from nextllm_jax.training.optimizers.parts import decay_mask, scale_rates


def adamw(config: OptimizerConfig, model: ModelConfig) -> tuple[optax.GradientTransformation, ...]:
    """AdamW's direction, with weight decay for the parameters of `decay_mask`."""
    return (
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.dtype(config.first_moment_dtype)),
        *scale_rates(config, model),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(config, model, params)),
    )
