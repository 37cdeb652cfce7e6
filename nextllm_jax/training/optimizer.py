"""The optimizer: a learning-rate schedule, global-norm clipping and AdamW with a decay mask."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nextllm_jax.config import ModelConfig, OptimizerConfig
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import of_kind, path_name


def schedule(config: OptimizerConfig, training_steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, with a warmup.

    The first step has `learning_rate` divided by the number of warmup steps, not zero, so no step is wasted. The last
    step of the schedule has the final learning rate, which later steps keep. The warmup takes at most half of the
    schedule, and the decay never overlaps it.
    """
    steps, warmup = config.schedule_length(training_steps), config.warmup_length(training_steps)
    peak = config.learning_rate
    final = peak * config.final_learning_rate_fraction
    last = steps - warmup - 1  # the last step of the schedule, counted from the end of the warmup
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif last == 0:
        main = optax.constant_schedule(final)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, last, alpha=config.final_learning_rate_fraction)
    else:
        wsd_decay = min(max(round(steps * config.decay_steps_fraction), 1), last)
        decay = wsd_decay if config.schedule == "wsd" else last
        main = optax.linear_schedule(peak, final, decay, transition_begin=last - decay)
    if not warmup:
        return main
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, main], [warmup])


def describe_warmup(config: OptimizerConfig, training_steps: int) -> str | None:
    """A message if the schedule is so short that the warmup is shorter than configured; else None."""
    steps, warmup = config.schedule_length(training_steps), config.warmup_length(training_steps)
    if warmup == config.warmup_steps:
        return None
    return (
        f"warming up for {warmup} steps instead of optimizer.warmup_steps {config.warmup_steps}, "
        f"since the warmup takes at most half of the schedule's {steps} steps"
    )


def decay_mask(config: OptimizerConfig, model: ModelConfig, params: Any) -> Any:
    """True for each parameter with weight decay: matrices, and embeddings if `decay_embeddings` is set.

    `params` may be boxed, a part of the model's parameters (stacked over layers), or adapters, which are not decayed.
    """
    boxed = abstract_params(model)
    names = of_kind(boxed, "matrix", "embedding") if config.decay_embeddings else of_kind(boxed, "matrix")
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) in names, params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` for updates that may be part of a gradient, whose global norm is `grad_norm`."""

    def clip(updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any) -> tuple[Any, Any]:
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        return jax.tree.map(
            lambda u: jnp.where(norm < max_norm, u, u / norm.astype(u.dtype) * max_norm), updates
        ), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), clip)


def make_optimizer(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping and AdamW with a learning rate of 1. The train step multiplies the update by the learning rate.

    It does so because the schedule counts skipped steps, which optax's own count does not. `update` takes the
    `grad_norm` of the whole gradient as an argument, or else computes it.
    """
    return optax.chain(
        clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.dtype(config.first_moment_dtype)),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(config, model, params)),
    )
