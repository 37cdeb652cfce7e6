"""Matrices of small integers with a scale for each group of values, and products with them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nextllm_jax.ops.integer_product import integer_product
from nextllm_jax.ops.linear import linear
from nextllm_jax.ops.quantized_matmul import quantized_matmul, tile_sizes

_FEW_ROWS = 8


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


def quantize(x: jax.Array, like: QTensor, importance: jax.Array | None = None) -> QTensor:
    """`x` rounded to the steps of each group, in the shapes and types of `like`, which may be abstract.

    Without a minimum, int8 puts the greatest magnitude of a group on 127 or -127 and int4 on -8, whatever its sign.
    With one, the least value is the least q and the greatest the greatest. Scale and minimum are rounded to their
    type first. int4 then tries narrower ranges, whose finer steps can be worth the values that they cut off, and keeps
    the one with the least sum of squared errors, weighted by `importance` (which broadcasts against `x`; None: 1).
    """
    full, coarse = _groups(like)
    within = tuple(axis for axis, size in enumerate(coarse) if size == 1)
    x32 = x.astype(jnp.float32).reshape(full)
    weight = None if importance is None else jnp.broadcast_to(importance, x.shape).reshape(full)
    scale, minimum = fit(x32, like, within, weight)
    q = steps_of(x32, scale, minimum, like.q.dtype).reshape(like.q.shape)
    if minimum is not None and like.minimum is not None:
        minimum = minimum.reshape(like.minimum.shape)
    return QTensor(q, scale.reshape(like.scale.shape), minimum)


_NARROWER = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Parts of a group's range that int4 tries beside the whole range."""


def fit(
    x32: jax.Array, like: QTensor, within: tuple[int, ...], importance: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and minimum of groups that extend over the axes `within`, in the types of `like`."""
    low, high = (reduce(x32, axis=within, keepdims=True) for reduce in (jnp.min, jnp.max))
    least, greatest = (int(bound) for bound in (jnp.iinfo(like.q.dtype).min, jnp.iinfo(like.q.dtype).max))

    def steps_for(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        if like.minimum is not None:
            return ((high - low) / (greatest - least)).astype(like.scale.dtype), low.astype(like.minimum.dtype)
        extreme = jnp.where(high > -low, high, low)
        scale = extreme / least if like.q.dtype == jnp.int4 else jnp.abs(extreme) / greatest
        return scale.astype(like.scale.dtype), None

    def error_of(scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
        q = steps_of(x32, scale, minimum, like.q.dtype)
        squares = jnp.square(values_of(q, scale, minimum) - x32)
        return jnp.sum(squares if importance is None else squares * importance, axis=within, keepdims=True)

    whole = steps_for(low, high)
    if like.q.dtype != jnp.int4:
        return whole

    def try_part(best: Any, part: jax.Array) -> tuple[Any, None]:
        found = steps_for(low * part, high * part)
        error = error_of(*found)
        new = (error, *found)
        return jax.tree.map(lambda old, new: jnp.where(error < best[0], new, old), best, new), None

    (_, scale, minimum), _ = jax.lax.scan(try_part, (error_of(*whole), *whole), jnp.array(_NARROWER))
    return scale, minimum


def steps_of(x32: jax.Array, scale: jax.Array, minimum: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The integers nearest to values, given scale and minimum that broadcast against them."""
    least, greatest = int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)
    step = jnp.where(scale == 0, 1, scale.astype(jnp.float32))
    steps = x32 / step if minimum is None else (x32 - minimum.astype(jnp.float32)) / step + least
    return jnp.clip(jnp.round(steps), least, greatest).astype(dtype)


def values_of(q: jax.Array, scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
    """What integers stand for, float32, given scale and minimum that broadcast against them."""
    steps = q.astype(jnp.float32)
    if minimum is None:
        return steps * scale.astype(jnp.float32)
    return (steps - int(jnp.iinfo(q.dtype).min)) * scale.astype(jnp.float32) + minimum.astype(jnp.float32)


def dequantize(x: jax.Array | QTensor, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The matrix itself in `dtype`, whatever it is kept as."""
    if not isinstance(x, QTensor):
        return x.astype(dtype)
    full, coarse = _groups(x)
    minimum = None if x.minimum is None else x.minimum.reshape(coarse)
    return values_of(x.q.reshape(full), x.scale.reshape(coarse), minimum).reshape(x.shape).astype(dtype)


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


Product = Callable[[jax.Array, QTensor], jax.Array]
"""Multiplies an array with a quantized matrix."""


def product(
    equation: str,
    x: jax.Array,
    kernel: jax.Array | QTensor,
    result_type: jax.typing.DTypeLike | None = None,
    per_device: Callable[[Product], Product] | None = None,
) -> jax.Array:
    """`einsum(equation, x, kernel)`, whatever the kernel is kept as: products in the type of `x`, sums in float32.

    The result is in `result_type`, or the type of `x`; its last axes are the output axes of the kernel, in their order,
    and the last axes of `x` are the input axes of the kernel.

    A scale for each output follows the product. Groups of inputs are multiplied apart and scaled then, if `x` has few
    rows: with more, these partial sums take more memory than the matrix, which is dequantized instead. On TPUs that is
    done tile by tile, in a kernel that XLA cannot shard: `per_device` turns a product of one device's parts into that
    of whole arrays. None: there is no such function, and the matrix is dequantized as a whole.
    """
    if not isinstance(kernel, QTensor):
        return _multiply(equation, x, kernel.astype(x.dtype), result_type)
    inputs = _input_axes(equation)
    few_rows = math.prod(x.shape[: x.ndim - len(inputs)]) <= _FEW_ROWS
    if kernel.minimum is None and all(kernel.scale.shape[axis] == 1 for axis in inputs):
        return _product_by_output(equation, x, kernel, result_type, few_rows)

    def dequantized(x: jax.Array, kernel: QTensor) -> jax.Array:
        return _multiply(equation, x, dequantize(kernel, x.dtype), result_type)

    def grouped(x: jax.Array, kernel: QTensor) -> jax.Array:
        return _grouped_product(equation, x, kernel, inputs).astype(result_type or x.dtype)

    def tiled(x: jax.Array, kernel: QTensor) -> jax.Array:
        return _tiled_product(x, kernel, len(inputs), result_type or x.dtype, dequantized)

    if not few_rows:
        if per_device is None or x.dtype != jnp.bfloat16 or inputs[0] != 0:
            return dequantized(x, kernel)
        on_tpu = _with_gradients_of(dequantized, per_device(tiled))
        return jax.lax.platform_dependent(x, kernel, tpu=on_tpu, default=dequantized)
    # A CPU, which takes twice as long for the groups, has the memory.
    return jax.lax.platform_dependent(x, kernel, cpu=dequantized, default=grouped)


def _product_by_output(
    equation: str, x: jax.Array, kernel: QTensor, result_type: jax.typing.DTypeLike | None, few_rows: bool
) -> jax.Array:
    """The product with a matrix that has a scale for each output; a CPU multiplies few rows as integers."""
    inputs = _input_axes(equation)

    def scaled(y: jax.Array, kernel: QTensor) -> jax.Array:
        scale = jnp.squeeze(kernel.scale, inputs).astype(jnp.float32)
        y = y.astype(jnp.float32) * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)
        return y.astype(result_type or x.dtype)

    def floats(x: jax.Array, kernel: QTensor) -> jax.Array:
        return scaled(_multiply(equation, x, kernel.q.astype(x.dtype), result_type), kernel)

    def integers(x: jax.Array, kernel: QTensor) -> jax.Array:
        return scaled(integer_product(x, kernel.q, len(inputs), inputs_first=inputs[0] == 0), kernel)

    if not few_rows:
        return floats(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=_with_gradients_of(floats, integers), default=floats)


def _input_axes(equation: str) -> tuple[int, ...]:
    """The axes of the kernel that the product contracts."""
    kernel_dims, y_dims = equation.split("->")[0].split(",")[1], equation.split("->")[1]
    return tuple(axis for axis, letter in enumerate(kernel_dims) if letter not in y_dims)


def _grouped_product(equation: str, x: jax.Array, kernel: QTensor, inputs: Sequence[int]) -> jax.Array:
    """The product in float32, group by group, with exact scales.

    `x` is padded to _FEW_ROWS rows: on a TPU (v5e), XLA writes a float copy of the matrix for one row, for eight none.
    """
    (x_dims, kernel_dims), y_dims = equation.split("->")[0].split(","), equation.split("->")[1]
    *outer, axis = inputs
    last, num_groups, num_rows = kernel_dims[axis], kernel.scale.shape[axis], len(x)
    batch = x_dims[: -len(inputs)]
    summed = "".join(kernel_dims[i] for i in outer) + "z"  # input axes of the partial sums; z counts groups
    outputs = y_dims.removeprefix(batch)

    def as_sums(part: jax.Array) -> jax.Array:
        """Scales or minima with the axes of `sums`, but for those of the batch."""
        return jnp.einsum(f"{kernel_dims.replace(last, 'z')}->{summed}{outputs}", part.astype(jnp.float32))

    padding = max(0, -(-_FEW_ROWS // math.prod(x.shape[1 : len(batch)])) - num_rows)
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    x = x.reshape(*x.shape[:-1], num_groups, -1)
    q = kernel.q.reshape(*kernel.q.shape[:axis], num_groups, -1, *kernel.q.shape[axis + 1 :])
    dims = f"{x_dims.replace(last, 'z' + last)},{kernel_dims.replace(last, 'z' + last)}->{batch}{summed}{outputs}"
    sums = jnp.einsum(dims, x, q.astype(x.dtype), preferred_element_type=jnp.float32)
    rows, scale = (None,) * len(batch), as_sums(kernel.scale)
    if kernel.minimum is None:
        y = sums * scale[rows]
    else:
        x_sums = jnp.sum(x.astype(jnp.float32), axis=-1).reshape(*x.shape[:-1], *(1,) * len(outputs))
        y = (sums - jnp.iinfo(kernel.q.dtype).min * x_sums) * scale[rows] + x_sums * as_sums(kernel.minimum)[rows]
    return jnp.sum(y, axis=tuple(range(len(batch), len(batch) + len(inputs))))[:num_rows]


def _tiled_product(
    x: jax.Array, kernel: QTensor, num_inputs: int, result_type: jax.typing.DTypeLike, untiled: Product
) -> jax.Array:
    """The product by the Pallas kernel for TPUs; `untiled(x, kernel)` if no tiles divide the matrix.

    The inputs are the first axes of the matrix and the last of `x`.
    """
    # In a loop over tokens, XLA would otherwise keep a copy of each part in the kernel's layout beside the weights.
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    flat = jax.tree.map(lambda part: part.reshape(math.prod(part.shape[:num_inputs]), -1), kernel)
    if tile_sizes(flat.q, flat.scale) is None:
        return untiled(x, kernel)
    rows, outputs = x.shape[: x.ndim - num_inputs], kernel.shape[num_inputs:]
    y = quantized_matmul(x.reshape(math.prod(rows), -1), flat.q, flat.scale, flat.minimum, result_type)
    return y.reshape(*rows, *outputs)


def _with_gradients_of(plain: Product, kernel: Product) -> Product:
    """`kernel`, with the gradients of `plain`: a Pallas kernel has none, and those of rounding are zero."""
    differentiable = jax.custom_vjp(kernel)
    differentiable.defvjp(lambda *args: (kernel(*args), args), lambda args, d_y: jax.vjp(plain, *args)[1](d_y))
    return differentiable


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
