"""Rounding of a matrix for the inputs that it will be multiplied with (GPTQ)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from nextllm_jax.ops.quantized import QTensor, fit, steps_of, values_of

_DAMPING = 0.01
"""Part of the mean of the Hessian's diagonal that is added to the diagonal."""


@functools.partial(jax.jit, static_argnames="like")
def quantize_for_inputs(kernel: jax.Array, hessian_II: jax.Array, like: QTensor) -> QTensor:
    """The kernel [..., outputs] rounded so that `x @ kernel` changes little for the x that made the Hessian.

    `hessian_II` is the sum of x^T x, float32, with all input axes flattened; they come first in the kernel. `like` has
    the shapes and types of the result. Inputs are rounded in order, and the remaining ones are updated to compensate
    (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    arXiv:2210.17323).
    """
    num_inputs = len(hessian_II)
    w_IO = kernel.astype(jnp.float32).reshape(num_inputs, -1)
    num_groups = like.scale.size // w_IO.shape[1]
    size = num_inputs // num_groups
    importance = jnp.diag(hessian_II)
    factor_II = _inverse_factor(hessian_II)

    def round_group(w_IO: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        rows, corrections, weight = (
            jax.lax.dynamic_slice_in_dim(array, start, size) for array in (w_IO, factor_II, importance)
        )
        within = jax.lax.dynamic_slice_in_dim(corrections, start, size, axis=1)
        scale, minimum = fit(rows, like, (0,), weight[:, None])
        row_scale, row_minimum = scale[0], None if minimum is None else minimum[0]

        def round_row(rows: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
            steps = steps_of(rows[i], row_scale, row_minimum, like.q.dtype)
            error = (rows[i] - values_of(steps, row_scale, row_minimum, like.q.dtype)) / within[i, i]
            return rows - jnp.outer(within[i], error), (steps, error)

        _, (steps, errors) = jax.lax.scan(round_row, rows, jnp.arange(size))
        return w_IO - corrections.T @ errors, QTensor(steps.astype(like.q.dtype), scale, minimum)

    _, rounded = jax.lax.scan(round_group, w_IO, jnp.arange(num_groups) * size)
    return jax.tree.map(lambda part, wanted: part.reshape(wanted.shape), rounded, like)


def _inverse_factor(hessian_II: jax.Array) -> jax.Array:
    """The upper Cholesky factor of the inverse of the damped Hessian."""
    diagonal = jnp.diag(hessian_II)
    damped = hessian_II + jnp.diag(jnp.where(diagonal == 0, 1, _DAMPING * jnp.mean(diagonal)))
    # H = R R^T with R upper triangular, so H^-1 = U^T U with U = R^-1: the inverse itself is never formed.
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(damped), dtype=damped.dtype), lower=False)
