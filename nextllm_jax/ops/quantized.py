"""Matrices of small integers with a scale for each group of values, and products with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from nextllm_jax.ops.linear import linear


@functools.partial(jax.tree_util.register_dataclass, data_fields=("q", "scale", "minimum"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class QTensor:
    """q * scale, or (q - the least q) * scale + minimum.

    Each axis of `scale` and `minimum` divides that axis of `q`: it is as long, or a group of neighbours shares a value.
    """

    q: jax.Array
    """int8 or int4, of the shape of the matrix. First, since Flax compares the first leaf with a parameter's shape."""
    scale: jax.Array
    minimum: jax.Array | None = None
    """What the least q stands for; None: zero stands for zero."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return self.q.shape


def quantize(x: jax.Array, like: QTensor) -> QTensor:
    """`x` rounded to the steps of each group, in the shapes and types of `like`, which may be abstract.

    Without a minimum, int8 puts the greatest magnitude of a group on 127 or -127 and int4 on -8, whatever its sign.
    With one, the least value is the least q and the greatest the greatest. Scale and minimum are rounded to their
    type first. No value is off by more than half a step, but for that rounding and for int4 without a minimum, where
    values next to the opposite of the greatest magnitude are off by up to a whole step.
    """
    full, coarse = _groups(like)
    within = tuple(axis for axis, size in enumerate(coarse) if size == 1)
    x32 = x.astype(jnp.float32).reshape(full)
    low, high = (reduce(x32, axis=within, keepdims=True) for reduce in (jnp.min, jnp.max))
    least, greatest = (int(bound) for bound in (jnp.iinfo(like.q.dtype).min, jnp.iinfo(like.q.dtype).max))
    if like.minimum is not None:
        scale, minimum = (high - low) / (greatest - least), low.astype(like.minimum.dtype)
    else:
        extreme, minimum = jnp.where(high > -low, high, low), None
        scale = extreme / least if like.q.dtype == jnp.int4 else jnp.abs(extreme) / greatest
    scale = scale.astype(like.scale.dtype)
    step = jnp.where(scale == 0, 1, scale.astype(jnp.float32))
    steps = x32 / step if minimum is None else (x32 - minimum.astype(jnp.float32)) / step + least
    q = jnp.clip(jnp.round(steps), least, greatest).astype(like.q.dtype)
    if minimum is not None and like.minimum is not None:
        minimum = minimum.reshape(like.minimum.shape)
    return QTensor(q.reshape(like.q.shape), scale.reshape(like.scale.shape), minimum)


def dequantize(x: jax.Array | QTensor, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The matrix itself in `dtype`, whatever it is kept as."""
    if not isinstance(x, QTensor):
        return x.astype(dtype)
    full, coarse = _groups(x)
    steps, scale = x.q.reshape(full).astype(jnp.float32), x.scale.reshape(coarse).astype(jnp.float32)
    if x.minimum is None:
        values = steps * scale
    else:
        values = (steps - jnp.iinfo(x.q.dtype).min) * scale + x.minimum.reshape(coarse).astype(jnp.float32)
    return values.reshape(x.shape).astype(dtype)


def _groups(x: QTensor) -> tuple[list[int], list[int]]:
    """The shape of `q` with each axis of several groups split in two, [groups, group], and that of `scale` to go along.

    Axes of a single group, or with a value for each place, stay as they are.
    """
    full: list[int] = []
    coarse: list[int] = []
    for size, groups in zip(x.q.shape, x.scale.shape, strict=True):
        several = groups not in (1, size)
        full += [groups, size // groups] if several else [size]
        coarse += [groups, 1] if several else [groups]
    return full, coarse


def product(
    equation: str, x: jax.Array, kernel: jax.Array | QTensor, result_type: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """`einsum(equation, x, kernel)`, whatever the kernel is kept as: products in the type of `x`, sums in float32.

    The result is in `result_type`, or the type of `x`; its last axes are the output axes of the kernel, in their order.

    A scale for each output alone follows the product, so that the matrix is never written out in a wider type than that
    of `x`. Other matrices are dequantized on the way into it: where XLA reads the operand of a product with few rows
    through the computation that makes it, as on TPUs, no copy of the matrix is written.
    """
    kernel_dims, y_dims = equation.split("->")[0].split(",")[1], equation.split("->")[1]
    inputs = [axis for axis, letter in enumerate(kernel_dims) if letter not in y_dims]
    if not isinstance(kernel, QTensor) or kernel.minimum is not None or any(kernel.scale.shape[i] > 1 for i in inputs):
        return _multiply(equation, x, dequantize(kernel, x.dtype), result_type)
    y = _multiply(equation, x, kernel.q.astype(x.dtype), result_type).astype(jnp.float32)
    scale = jnp.squeeze(kernel.scale, inputs).astype(jnp.float32)
    return (y * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)).astype(result_type or x.dtype)


def _multiply(equation: str, x: jax.Array, kernel: jax.Array, result_type: jax.typing.DTypeLike | None) -> jax.Array:
    if result_type is None:
        return linear(equation, x, kernel)
    return jnp.einsum(equation, x, kernel, preferred_element_type=result_type)


def take_rows(table: jax.Array | QTensor, ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The rows of these ids of a table [rows, width], [..., width] in `dtype`."""
    return dequantize(jax.tree.map(lambda part: jnp.take(part, ids, axis=0), table), dtype)


def pack(x: QTensor) -> QTensor:
    """The tensor as files have it: of int4, two neighbours of the last axis in a byte, the first in its low half."""
    if x.q.dtype != jnp.int4:
        return x
    pairs = x.q.astype(jnp.uint8).reshape(*x.shape[:-1], -1, 2) & 15
    return dataclasses.replace(x, q=pairs[..., 0] | pairs[..., 1] << 4)


def unpack(x: QTensor) -> QTensor:
    """What `pack` was given."""
    if x.q.dtype != jnp.uint8:
        return x
    signed = jax.lax.bitcast_convert_type(x.q, jnp.int8)
    pairs = jnp.stack([signed << 4, signed], axis=-1) >> 4  # which copies the sign
    return dataclasses.replace(x, q=pairs.reshape(*x.shape[:-1], -1).astype(jnp.int4))
