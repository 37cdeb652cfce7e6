"""Norms of activations and gradients at each site of the model, which a train step measures at almost no cost.

The sites are the embedding, the attention and the MLP of each layer (with their norms), the final norm, and an untied
head. The residual stream is measured after each site up to the last MLP. There, the next norm computes its mean square
anyway.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nextllm_jax.config import ModelConfig
from nextllm_jax.model.weights import in_layer_order

_PARTS = ("attention", "mlp")


def places(config: ModelConfig) -> list[str]:
    """The names of the P sites in forward order, such as "layer 3 mlp". The first M have activations."""
    layers = [f"layer {layer} {part}" for layer in range(config.num_layers) for part in _PARTS]
    return ["embedding", *layers, "final norm", *([] if config.tie_embeddings else ["head"])]


def gradient_norms(config: ModelConfig, gradients: Any) -> jax.Array:
    """The norm of the gradient at each site, float32 [P]. A tied head is part of the embedding.

    It is 0 at sites without trained parameters, such as those without adapters in a pytree of adapters.
    """

    def squares(tree: Any, num_stacked: int = 0) -> jax.Array:
        leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
        summed = [jnp.sum(jnp.square(x), axis=range(num_stacked, x.ndim)) for x in leaves]
        return sum(summed, jnp.zeros(num_periods if num_stacked else ()))

    def parts(block: Any, num_stacked: int) -> jax.Array:
        unknown = [name for name in block if not name.startswith(_PARTS)]
        if unknown:
            raise ValueError(f"layer module {unknown[0]} has no norm; its name must start with {' or '.join(_PARTS)}")
        named = [[tree for name, tree in block.items() if name.startswith(part)] for part in _PARTS]
        return jnp.stack([squares(trees, num_stacked) for trees in named], axis=-1)

    num_periods = config.num_layers // len(config.period)
    layers = in_layer_order(config, gradients, parts).reshape(-1)
    after = ["final_norm", *([] if config.tie_embeddings else ["lm_head"])]
    embedding, *others = (squares(gradients.get(name, {}))[None] for name in ("embed", *after))
    return jnp.sqrt(jnp.concatenate([embedding, layers, *others]))


def mean_squares(config: ModelConfig, intermediates: Any) -> jax.Array:
    """The mean square of the residual stream after each of the first M = 2L + 1 sites, float32 [M].

    `intermediates` are those that the model records, each before the next site's norm.
    """

    def mean(recorded: tuple[jax.Array], first_axis: int = 0) -> jax.Array:
        return jnp.mean(recorded[0], axis=range(first_axis, recorded[0].ndim))

    def parts(block: Any, num_stacked: int) -> jax.Array:
        return jnp.stack([mean(block[f"before_{part}"], num_stacked) for part in _PARTS], axis=-1)

    layers = in_layer_order(config, intermediates, parts).reshape(-1)
    return jnp.concatenate([layers, mean(intermediates["before_final_norm"])[None]])
