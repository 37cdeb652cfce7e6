"""Grouped products on TPUs, by JAX's megablox kernels, which are written in Pallas. See `ops.grouped`."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

_TILE_BYTES = 2048
"""Bytes of a row of a tile of a matrix, at most. Two tiles of 1,024 x 1,024 bfloat16 values and a float32 sum fit in
the vector memory of a v5e next to the rows."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(
    x_PI: jax.Array, kernel_EIO: jax.Array, rows_E: jax.Array, tile_rows: int, interpret: bool = False
) -> jax.Array:
    """Each row times the matrix of its expert, [P, O] in the type of `x_PI`; sums in float32.

    Rows after those of the last expert are not defined.
    """
    return _gmm(x_PI, kernel_EIO, rows_E, tile_rows, interpret)


def _gmm(
    x: jax.Array, kernel: jax.Array, rows_E: jax.Array, tile_rows: int, interpret: bool, transposed: bool = False
) -> jax.Array:
    num_outputs = kernel.shape[1 if transposed else 2]
    tiles = _tiles(tile_rows, x.shape[1], num_outputs, x.dtype)
    return gmm(x, kernel, rows_E, x.dtype, tiles, transpose_rhs=transposed, interpret=interpret)  # pyright: ignore[reportReturnType]


def _backward(
    tile_rows: int, interpret: bool, residuals: tuple[jax.Array, jax.Array, jax.Array], d_PO: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_PI, kernel_EIO, rows_E = residuals
    tiles = _tiles(tile_rows, x_PI.shape[1], d_PO.shape[1], x_PI.dtype)
    d_kernel = tgmm(x_PI.T, d_PO, rows_E, x_PI.dtype, tiles, interpret=interpret)
    return _gmm(d_PO, kernel_EIO, rows_E, tile_rows, interpret, transposed=True), d_kernel, None  # pyright: ignore[reportReturnType]


product.defvjp(lambda *args: (product(*args), args[:3]), _backward)


def _tiles(rows: int, num_inputs: int, num_outputs: int, dtype: jnp.dtype) -> tuple[int, int, int]:
    most = _TILE_BYTES // jnp.dtype(dtype).itemsize
    return rows, min(num_inputs, most), min(num_outputs, most)
