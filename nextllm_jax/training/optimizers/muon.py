"""Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for embedding, head, norms and biases.

The direction of a matrix is its momentum with all singular values set to about 1, by five Newton-Schulz iterations.
It is scaled to the typical size of AdamW's direction (Liu et al. 2025, arXiv:2502.16982), so learning rates and weight
decay are those of AdamW.
"""

import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nextllm_jax.config import ModelConfig, OptimizerConfig
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import Weight, is_weight, of_kind, path_name
from nextllm_jax.sharding import constrain, per_layer
from nextllm_jax.training.optimizers.adamw import adamw
from nextllm_jax.training.optimizers.parts import scale_rates

_MOMENTUM, _DIRECTION_RMS = 0.95, 0.2
_NUM_ITERATIONS, _COEFFICIENTS, _EPS = 5, (3.4445, -4.7750, 2.0315), 1e-8
"""Of Newton-Schulz, as in optax.contrib.scale_by_muon. Its scaling by shape depends on the version of optax, so the
iterations are written out here."""


def muon(config: OptimizerConfig, model: ModelConfig) -> tuple[optax.GradientTransformation, ...]:
    """The direction of Muon for matrices; for the rest that of AdamW, in relation to the matrices' learning rate."""
    matrices = of_kind(abstract_params(model), "matrix")

    def labels(params: Any) -> Any:
        def label(path: Any, _: Any) -> str:
            return "matrix" if path_name(path) in matrices else "rest"

        return jax.tree_util.tree_map_with_path(label, params, is_leaf=is_weight)

    def orthogonalize(momentum: Any, _: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: direction(matrices[path_name(path)], leaf, config.shard_over_data), momentum
        )

    by_label: dict[Hashable, optax.GradientTransformation] = {
        "matrix": optax.chain(
            optax.trace(_MOMENTUM, nesterov=True, accumulator_dtype=jnp.dtype(config.first_moment_dtype)),
            optax.stateless(orthogonalize),
            *scale_rates(config, model),
            optax.add_decayed_weights(config.weight_decay),
        ),
        "rest": optax.chain(*adamw(config, model), optax.scale(config.adamw_rate_ratio)),
    }
    return (optax.partition(by_label, labels),)


def direction(weight: Weight, momentum: jax.Array, over_data: bool = False) -> jax.Array:
    """Muon's direction for the momentum of a matrix or of stacked matrices; its root mean square is about 0.2.

    `weight` is the matrix in the model; `momentum` may be of one layer of its stack. On a mesh, each device
    orthogonalizes some layers of a stack (see `sharding.per_layer`). A matrix outside a stack stays sharded.
    """
    weight = weight.replace(names=weight.names[-momentum.ndim :])
    batch, outputs = weight.num_stacked, weight.num_stacked + weight.num_inputs
    fan_in, fan_out = math.prod(momentum.shape[batch:outputs]), math.prod(momentum.shape[outputs:])

    def orthogonalized(x: jax.Array) -> jax.Array:
        return newton_schulz(x.reshape(*x.shape[:batch], fan_in, fan_out)).reshape(x.shape)

    if weight.num_stacked:
        found = per_layer(orthogonalized, momentum, weight.names, over_data=over_data)
    else:
        found = constrain(orthogonalized(momentum), *weight.names)
    return _DIRECTION_RMS * math.sqrt(max(fan_in, fan_out)) * found


def newton_schulz(x: jax.Array) -> jax.Array:
    """The matrices [..., M, N] with all singular values set to about 1; those near 0 become less."""
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT).mT
    a, b, c = _COEFFICIENTS

    def iteration(_: Any, x: jax.Array) -> jax.Array:
        gram = x @ x.mT
        return a * x + (b * gram + c * (gram @ gram)) @ x

    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    return jax.lax.fori_loop(0, _NUM_ITERATIONS, iteration, x / (norm + _EPS))
