"""Matrices of 8-bit integers with a scale for each output channel, and products with them."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nextllm_jax.ops.linear import linear

_LARGEST = 127


@functools.partial(jax.tree_util.register_dataclass, data_fields=("q", "scale"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class QTensor:
    """q * scale."""

    q: jax.Array
    """int8, of the shape of the matrix. First, since Flax compares the first leaf with a parameter's shape."""
    scale: jax.Array
    """float32, with the input axes of size 1."""


def quantize(x: jax.Array, input_axes: Sequence[int]) -> QTensor:
    """`x` rounded to 255 steps for each output channel: no value is off by more than half its channel's scale.

    The scale is the greatest magnitude over `input_axes` / 127.
    """
    x32 = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x32), axis=tuple(input_axes), keepdims=True) / _LARGEST
    q = jnp.round(x32 / jnp.where(scale > 0, scale, 1))
    return QTensor(q.astype(jnp.int8), scale)


def dequantize(x: QTensor, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The matrix itself."""
    return (x.q.astype(jnp.float32) * x.scale).astype(dtype)


def product(equation: str, x: jax.Array, kernel: jax.Array | QTensor) -> jax.Array:
    """`linear(equation, x, kernel)` in the type of `x`, whatever the kernel is kept as.

    The output axes of the kernel are the last of it and of the result. A scale of its own for each of them can follow
    the product, so that the matrix is never written out in a wider type than that of `x`.
    """
    if not isinstance(kernel, QTensor):
        return linear(equation, x, kernel.astype(x.dtype))
    y = linear(equation, x, kernel.q.astype(x.dtype)).astype(jnp.float32)
    outputs = sum(letter in equation.split("->")[1] for letter in equation.split("->")[0].split(",")[1])
    scale = kernel.scale.reshape((1,) * (y.ndim - outputs) + kernel.scale.shape[kernel.scale.ndim - outputs :])
    return (y * scale).astype(x.dtype)
