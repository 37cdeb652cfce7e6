"""What optimizers have in common: clipping, and which parameters are decayed."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nextllm_jax.config import ModelConfig, OptimizerConfig
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import Kind, of_kind, path_name


def decay_mask(config: OptimizerConfig, model: ModelConfig, params: Any) -> Any:
    """True for each parameter with weight decay: matrices, routers, and embeddings if `decay_embeddings` is set.

    `params` may be boxed, a part of the model's parameters (stacked over layers), or adapters, which are not decayed.
    """
    boxed = abstract_params(model)
    decayed: tuple[Kind, ...] = ("matrix", "router", "embedding") if config.decay_embeddings else ("matrix", "router")
    names = of_kind(boxed, *decayed)
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) in names, params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` for updates that may be part of a gradient, whose global norm is `grad_norm`."""

    def clip(updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any) -> tuple[Any, Any]:
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        return jax.tree.map(
            lambda u: jnp.where(norm < max_norm, u, u / norm.astype(u.dtype) * max_norm), updates
        ), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), clip)
