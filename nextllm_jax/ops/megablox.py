"""Grouped products on TPUs, by JAX's megablox kernels, which are written in Pallas. See `ops.grouped`."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

_TILE_BYTES = 2048
"""Bytes of a row of a tile of a matrix, at most. Two tiles of 1,024 x 1,024 bfloat16 values and a float32 sum fit in
the vector memory of a v5e next to the rows."""


def product(
    x_PI: jax.Array, kernel: jax.Array, rows_E: jax.Array, tile_rows: int, *, transposed: bool, interpret: bool = False
) -> jax.Array:
    """[P, O] of rows [P, I] and matrices [E, I, O], or [P, I] of [P, O] if `transposed`."""
    _, I, O = kernel.shape  # noqa: E741
    I, O = (O, I) if transposed else (I, O)  # noqa: E741
    tiles = _tiles(tile_rows, I, O, x_PI.dtype)
    return gmm(x_PI, kernel, rows_E, x_PI.dtype, tiles, transpose_rhs=transposed, interpret=interpret)  # pyright: ignore[reportReturnType]


def kernel_gradient(
    x_PI: jax.Array, d_PO: jax.Array, rows_E: jax.Array, tile_rows: int, *, interpret: bool = False
) -> jax.Array:
    """The gradient [E, I, O] of the matrices in `product`."""
    tiles = _tiles(tile_rows, x_PI.shape[1], d_PO.shape[1], x_PI.dtype)
    return tgmm(x_PI.T, d_PO, rows_E, x_PI.dtype, tiles, interpret=interpret)  # pyright: ignore[reportReturnType]


def _tiles(rows: int, num_inputs: int, num_outputs: int, dtype: jnp.dtype) -> tuple[int, int, int]:
    most = _TILE_BYTES // jnp.dtype(dtype).itemsize
    return rows, min(num_inputs, most), min(num_outputs, most)
