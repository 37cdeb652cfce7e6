"""Matrices of small integers with a scale for each group of values."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


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
    scale, minimum = fit(x32, like, within)
    q = steps_of(x32, scale, minimum, like.q.dtype).astype(like.q.dtype)
    return jax.tree.map(lambda part, wanted: part.reshape(wanted.shape), QTensor(q, scale, minimum), like)


_NARROWER = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Parts of a group's range that `fit` tries next to the whole range."""


def fit(
    x32: jax.Array, like: QTensor, within: tuple[int, ...], importance: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and minimum of groups that extend over the axes `within`, in the types of `like`.

    With `importance`, which broadcasts against `x32`, narrower ranges are tried, whose finer steps can be worth the
    values that they cut off: the least sum of squared errors with these weights decides.
    """
    low, high = (reduce(x32, axis=within, keepdims=True) for reduce in (jnp.min, jnp.max))
    least, greatest = (int(bound) for bound in (jnp.iinfo(like.q.dtype).min, jnp.iinfo(like.q.dtype).max))

    def steps_for(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        if like.minimum is not None:
            return ((high - low) / (greatest - least)).astype(like.scale.dtype), low.astype(like.minimum.dtype)
        extreme = jnp.where(high > -low, high, low)
        scale = extreme / least if like.q.dtype == jnp.int4 else jnp.abs(extreme) / greatest
        return scale.astype(like.scale.dtype), None

    whole = steps_for(low, high)
    if importance is None:
        return whole

    def error_of(scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
        steps = steps_of(x32, scale, minimum, like.q.dtype)
        squares = jnp.square(values_of(steps, scale, minimum, like.q.dtype) - x32)
        return jnp.sum(squares * importance, axis=within, keepdims=True)

    def try_part(best: Any, part: jax.Array) -> tuple[Any, None]:
        found = steps_for(low * part, high * part)
        error = error_of(*found)
        new = (error, *found)
        return jax.tree.map(lambda old, new: jnp.where(error < best[0], new, old), best, new), None

    (_, scale, minimum), _ = jax.lax.scan(try_part, (error_of(*whole), *whole), jnp.array(_NARROWER))
    return scale, minimum


def steps_of(x32: jax.Array, scale: jax.Array, minimum: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The integers of `dtype` nearest to values, as float32, given scale and minimum that broadcast against them."""
    least, greatest = int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)
    step = jnp.where(scale == 0, 1, scale.astype(jnp.float32))
    steps = x32 / step if minimum is None else (x32 - minimum.astype(jnp.float32)) / step + least
    return jnp.clip(jnp.round(steps), least, greatest)


def values_of(steps: jax.Array, scale: jax.Array, minimum: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What integers of `dtype`, as float32, stand for: float32, given scale and minimum that broadcast against them."""
    if minimum is None:
        return steps * scale.astype(jnp.float32)
    return (steps - int(jnp.iinfo(dtype).min)) * scale.astype(jnp.float32) + minimum.astype(jnp.float32)


def dequantize(x: jax.Array | QTensor, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The matrix itself in `dtype`, whatever it is kept as."""
    if not isinstance(x, QTensor):
        return x.astype(dtype)
    full, coarse = _groups(x)
    minimum = None if x.minimum is None else x.minimum.reshape(coarse)
    steps = x.q.reshape(full).astype(jnp.float32)
    return values_of(steps, x.scale.reshape(coarse), minimum, x.q.dtype).reshape(x.shape).astype(dtype)


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
