"""What optimizers have in common: clipping, which parameters are decayed, and learning rates by shape."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nextllm_jax.config import ModelConfig, OptimizerConfig
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import Kind, Weight, by_name, of_kind, path_name


def decay_mask(config: OptimizerConfig, model: ModelConfig, params: Any) -> Any:
    """True for each parameter with weight decay: matrices, routers, and embeddings if `decay_embeddings` is set.

    `params` may be boxed, a part of the model's parameters (stacked over layers), or adapters, which are not decayed.
    """
    boxed = abstract_params(model)
    decayed: tuple[Kind, ...] = ("matrix", "router", "embedding") if config.decay_embeddings else ("matrix", "router")
    names = of_kind(boxed, *decayed)
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) in names, params)


def scale_rates(config: OptimizerConfig, model: ModelConfig) -> tuple[optax.GradientTransformation, ...]:
    """Multiplies the direction of each parameter by its `rate_factor`; nothing with the standard parametrization.

    It stands before weight decay, whose rate remains the same in all parameters and at all shapes.
    """
    if model.parametrization == "standard":
        return ()
    weights = by_name(abstract_params(model))

    def scale(path: Any, direction: jax.Array) -> jax.Array:
        name = path_name(path)
        return direction * rate_factor(config, model, name, weights[name])

    return (optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates)),)


def rate_factor(config: OptimizerConfig, model: ModelConfig, name: str, weight: Weight) -> float:
    """The learning rate of a parameter with completep, in relation to that at the base width and depth.

    It keeps the sizes of the changes of activations (Yang et al. 2022, arXiv:2203.03466; Dey et al. 2025,
    arXiv:2505.01618). An update of AdamW changes the outputs of a matrix by its size times the number of inputs. One of
    Muon has a spectral norm that grows with the square root of the width (Bernstein and Newhouse 2024,
    arXiv:2409.20325). The logits are divided by the width, which the scale of the final norm does here. The outputs of
    attention and MLP are divided by the depth, which their projections do here: a factor on a product is the same as a
    factor on the initial weights and on the learning rate, since directions do not depend on the size of the gradient.
    """
    factor = 1.0
    if weight.kind == "matrix":
        factor = math.sqrt(model.width_ratio) if config.name == "muon" else model.width_ratio
    elif weight.kind == "router" or name.startswith("final_norm/"):
        factor = model.width_ratio
    is_output = weight.kind in ("matrix", "bias") and weight.names[-1] in ("embed", "expert_embed")
    return factor * model.depth_ratio if is_output else factor


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` for updates that may be part of a gradient, whose global norm is `grad_norm`."""

    def clip(updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any) -> tuple[Any, Any]:
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        return jax.tree.map(
            lambda u: jnp.where(norm < max_norm, u, u / norm.astype(u.dtype) * max_norm), updates
        ), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), clip)
