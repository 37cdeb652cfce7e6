"""How large activations and gradients are, layer by layer: what a train step says of itself at next to no cost.

A place is the embedding, the attention or the MLP of a layer (each with its norms), the final norm, or a head
that is not tied. The residual stream is measured behind each place up to the last MLP: before a norm, which computes
its mean square anyway.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nextllm_jax.config import ModelConfig

_PARTS = ("attention", "mlp")


def places(config: ModelConfig) -> list[str]:
    """Names of the places in forward order, such as "layer 3 mlp"; P of them, the first M with activations."""
    layers = [f"layer {layer} {part}" for layer in range(config.num_layers) for part in _PARTS]
    return ["embedding", *layers, "final norm", *([] if config.tie_embeddings else ["head"])]


def _blocks(config: ModelConfig, tree: Any) -> tuple[list[Any], list[Any]]:
    """The blocks of a tree laid out as the parameters: those of the scanned pattern, stacked, and the remainder."""
    size = len(config.layer_pattern)
    stacked = [tree["layers"][f"block_{i}"] for i in range(size)] if config.num_layers >= size else []
    return stacked, [tree[f"remainder_{i}"] for i in range(config.num_layers % size)]


def _in_order(stacked: list[jax.Array], rest: list[jax.Array]) -> jax.Array:
    """One value a layer part, [2L], of arrays [periods, 2] a block of the pattern and [2] a block of the remainder."""
    scanned = [jnp.stack(stacked, axis=1).reshape(-1)] if stacked else []
    return jnp.concatenate([*scanned, *rest])


def gradient_norms(config: ModelConfig, gradients: Any) -> jax.Array:
    """The norm of the gradient at each place, float32 [P]; a tied head is part of the embedding.

    It is 0 where nothing is trained, as of all but the adapted matrices in a tree of adapters.
    """
    periods = config.num_layers // len(config.layer_pattern)

    def squares(tree: Any, shape: tuple[int, ...] = ()) -> jax.Array:
        leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
        return sum((jnp.sum(jnp.square(x), axis=range(len(shape), x.ndim)) for x in leaves), jnp.zeros(shape))

    def parts(block: Any, *shape: int) -> jax.Array:
        named = [[tree for name, tree in block.items() if name.startswith(part)] for part in _PARTS]
        return jnp.stack([squares(trees, shape) for trees in named], axis=-1)

    stacked, rest = _blocks(config, gradients)
    layers = _in_order([parts(block, periods) for block in stacked], [parts(block) for block in rest])
    after = ["final_norm", *([] if config.tie_embeddings else ["lm_head"])]
    embedding, *others = (squares(gradients.get(name, {}))[None] for name in ("embed", *after))
    return jnp.sqrt(jnp.concatenate([embedding, layers, *others]))


def mean_squares(config: ModelConfig, intermediates: Any) -> jax.Array:
    """The mean square of the residual stream behind each place that has it, float32 [M] with M = 2L + 1.

    `intermediates` are what the model keeps of it: behind a place is before the next.
    """

    def mean(recorded: tuple[jax.Array], *, first_axis: int = 0) -> jax.Array:
        return jnp.mean(recorded[0], axis=range(first_axis, recorded[0].ndim))

    def parts(block: Any, first_axis: int) -> jax.Array:
        return jnp.stack([mean(block[f"before_{part}"], first_axis=first_axis) for part in _PARTS], axis=-1)

    stacked, rest = _blocks(config, intermediates)
    layers = _in_order([parts(block, 1) for block in stacked], [parts(block, 0) for block in rest])
    return jnp.concatenate([layers, mean(intermediates["before_final_norm"])[None]])
