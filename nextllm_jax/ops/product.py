"""The product of activations with a matrix, whatever the matrix is kept as."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from nextllm_jax.ops.cpu_product import cpu_product
from nextllm_jax.ops.linear import linear
from nextllm_jax.ops.quantized import QTensor, dequantize

_FEW_ROWS = 8

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
    if kernel.minimum is None and all(kernel.scale.shape[axis] == 1 for axis in inputs):
        return _product_by_output(equation, x, kernel, result_type)

    def dequantized(x: jax.Array, kernel: QTensor) -> jax.Array:
        return _multiply(equation, x, dequantize(kernel, x.dtype), result_type)

    def grouped(x: jax.Array, kernel: QTensor) -> jax.Array:
        return _grouped_product(equation, x, kernel, inputs).astype(result_type or x.dtype)

    def tiled(x: jax.Array, kernel: QTensor) -> jax.Array:
        return _tiled_product(x, kernel, len(inputs), result_type or x.dtype, dequantized)

    if math.prod(x.shape[: x.ndim - len(inputs)]) > _FEW_ROWS:
        if per_device is None or x.dtype != jnp.bfloat16 or inputs[0] != 0:
            return dequantized(x, kernel)
        on_tpu = _with_gradients_of(dequantized, per_device(tiled))
        return jax.lax.platform_dependent(x, kernel, tpu=on_tpu, default=dequantized)
    # A CPU, which takes twice as long for the groups, has the memory.
    return jax.lax.platform_dependent(x, kernel, cpu=dequantized, default=grouped)


def _product_by_output(
    equation: str, x: jax.Array, kernel: QTensor, result_type: jax.typing.DTypeLike | None
) -> jax.Array:
    """The product with a matrix that has a scale for each output."""
    inputs = _input_axes(equation)

    def scaled(y: jax.Array, kernel: QTensor) -> jax.Array:
        scale = jnp.squeeze(kernel.scale, inputs).astype(jnp.float32)
        y = y.astype(jnp.float32) * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)
        return y.astype(result_type or x.dtype)

    def floats(x: jax.Array, kernel: QTensor) -> jax.Array:
        return scaled(_multiply(equation, x, kernel.q.astype(x.dtype), result_type), kernel)

    def on_cpu(x: jax.Array, kernel: QTensor) -> jax.Array:
        return scaled(cpu_product(x, kernel.q.astype(jnp.int8), len(inputs), inputs_first=inputs[0] == 0), kernel)

    return jax.lax.platform_dependent(x, kernel, cpu=_with_gradients_of(floats, on_cpu), default=floats)


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
    from nextllm_jax.ops.quantized_matmul import quantized_matmul, tile_sizes  # imports Pallas

    # In a loop over tokens, XLA would otherwise keep a copy of each part in the kernel's layout next to the weights.
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
