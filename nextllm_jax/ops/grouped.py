"""The sum of several experts' outputs for each token: the heart of a sparse layer.

Dimension letters: M tokens, A assignments of a token to an expert, K = A / M assignments of each token, which are next
to each other, E experts, P rows sorted by expert, R rows that a function gets at once, D width of a token, I inputs,
O outputs. No assignment to an expert is dropped, whatever its load.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nextllm_jax.ops.linear import linear
from nextllm_jax.ops.quantized import QTensor, dequantize

_TILE_ROWS = 128
_FEW_TILE_ROWS = 16
"""The fewest rows of a bfloat16 tile on a TPU."""
_MOST_ROWS = 64
"""The most rows of a small block."""
_BLOCKS_IN_LARGE = 8
"""The number of small blocks in a large one."""
_NO_ROW = jnp.iinfo(jnp.int32).max

Matrix = jax.Array | QTensor
Product = Callable[[jax.Array, Matrix], jax.Array]
"""Multiplies rows with one matrix of their experts."""
Function = Callable[[Product, jax.Array, jax.Array, list[Matrix]], jax.Array]
"""`function(product, x, weight, matrices)` of rows [R, D] and their weights [R, 1] returns rows [R, D], each of which
depends on the same row of the arguments. It multiplies with the matrices by `product` only."""


class Groups(NamedTuple):
    """Where the rows of each expert are. They follow each other without gaps."""

    row_A: jax.Array
    """int32: the row of an assignment; out of range for an assignment to no expert."""
    assignment_P: jax.Array
    """int32: the assignment of a row; A for rows after the last one."""
    rows_E: jax.Array
    """int32: number of rows of each expert."""


def tile_rows(num_assignments: int) -> int:
    """The number of rows of a tile on a TPU."""
    return _FEW_TILE_ROWS if num_assignments < _TILE_ROWS else _TILE_ROWS


def num_rows(num_assignments: int) -> int:
    """P: whole tiles."""
    tile = tile_rows(num_assignments)
    return -(-num_assignments // tile) * tile


def arrange(expert_A: jax.Array, num_experts: int) -> Groups:
    """The rows of the assignments, given the expert of each, int32, where `num_experts` stands for no expert."""
    A = len(expert_A)
    order_A = jnp.argsort(expert_A, stable=True)
    place_A = jnp.zeros(A, jnp.int32).at[order_A].set(jnp.arange(A, dtype=jnp.int32), unique_indices=True)
    rows_E = jnp.sum(expert_A[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)
    assignment_A = jnp.where(jnp.arange(A) < jnp.sum(rows_E), order_A, A).astype(jnp.int32)
    return Groups(
        row_A=jnp.where(expert_A < num_experts, place_A, _NO_ROW),
        assignment_P=jnp.pad(assignment_A, (0, num_rows(A) - A), constant_values=A),
        rows_E=rows_E,
    )


@jax.custom_vjp
def spread(x_MI: jax.Array, groups: Groups) -> jax.Array:
    """For each of P rows the values of its assignment's token, [P, I]; zeros after the last assignment."""
    return _rows(x_MI, groups.assignment_P, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def collect(x_PI: jax.Array, groups: Groups, num_tokens: int) -> jax.Array:
    """The sum of the rows of each token's assignments, [M, I] in the type of `x_PI`; sums in float32."""
    row_MK = groups.row_A.reshape(num_tokens, -1)
    rows_MKI = x_PI.at[row_MK].get(mode="fill", fill_value=0)
    return jnp.sum(rows_MKI, axis=1, dtype=jnp.float32).astype(x_PI.dtype)


def _rows(x_MI: jax.Array, assignment_R: jax.Array, groups: Groups) -> jax.Array:
    """The values of the assignments' tokens, [R, I]; zeros for assignment A. `x_MI` may be one row per assignment."""
    return x_MI.at[assignment_R // (len(groups.row_A) // len(x_MI))].get(mode="fill", fill_value=0)


# Each is the transpose of the other. Automatic differentiation would scatter rows, one at a time on a CPU.
spread.defvjp(
    lambda x_MI, groups: (spread(x_MI, groups), (groups, len(x_MI))),
    lambda residuals, d_PI: (collect(d_PI, *residuals), None),
)
collect.defvjp(
    lambda x_PI, groups, num_tokens: (collect(x_PI, groups, num_tokens), groups),
    lambda num_tokens, groups, d_MI: (spread(d_MI, groups), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_experts(
    function: Function, x_MD: jax.Array, weight_A1: jax.Array, matrices: list[Matrix], groups: Groups
) -> jax.Array:
    """The sum of `function` over the assignments of each token, [M, D] in the type of `x_MD`.

    The matrices are [E, I, O]; quantized ones have no gradients. The backward pass computes the function again.

    On TPUs, products are JAX's megablox kernels. Elsewhere this is a loop over the experts that have rows, and over
    blocks of their rows. Neither multiplies the FLOPs by the number of experts, as `jax.lax.ragged_dot` does on CPUs.
    """
    on_tpu, by_block = (functools.partial(apply, function) for apply in (_apply_by_product, _apply_by_block))
    return jax.lax.platform_dependent(x_MD, weight_A1, matrices, groups, tpu=on_tpu, default=by_block)


def _backward(function: Function, arguments: tuple[Any, ...], d_y_MD: jax.Array) -> tuple[Any, ...]:
    both = _gradients_by_product, _gradients_by_block
    on_tpu, by_block = (functools.partial(gradients, function) for gradients in both)
    return *jax.lax.platform_dependent(*arguments, d_y_MD, tpu=on_tpu, default=by_block), None


apply_experts.defvjp(lambda function, *arguments: (apply_experts(function, *arguments), arguments), _backward)


def _gradients(
    function: Callable[..., jax.Array], x: jax.Array, weight: jax.Array, matrices: list[Matrix], d_y: jax.Array
) -> tuple[jax.Array, jax.Array, list[jax.Array | None]]:
    """The gradients of `function(x, weight, matrices)`; None for a quantized matrix."""
    values = [dequantize(matrix, x.dtype) for matrix in matrices]
    d_x, d_weight, d_values = jax.vjp(function, x, weight, values)[1](d_y)
    kept = zip(matrices, d_values, strict=True)
    return d_x, d_weight, [None if isinstance(matrix, QTensor) else d_value for matrix, d_value in kept]


def _apply_by_product(
    function: Function, x_MD: jax.Array, weight_A1: jax.Array, matrices: list[Matrix], groups: Groups
) -> jax.Array:
    from nextllm_jax.ops import megablox  # imports Pallas, which takes a tenth of a start

    def product(x_PI: jax.Array, matrix: Matrix) -> jax.Array:
        return megablox.product(x_PI, dequantize(matrix, x_PI.dtype), groups.rows_E, tile_rows(len(groups.row_A)))

    y_PD = function(product, spread(x_MD, groups), spread(weight_A1, groups), matrices)
    return collect(y_PD, groups, len(x_MD))  # pyright: ignore[reportReturnType]


def _gradients_by_product(
    function: Function, x_MD: jax.Array, weight_A1: jax.Array, matrices: list[Matrix], groups: Groups, d_y_MD: Any
) -> tuple[Any, ...]:
    apply = functools.partial(_apply_by_product, function, groups=groups)
    return _gradients(apply, x_MD, weight_A1, matrices, d_y_MD)


def block_rows(num_assignments: int, num_experts: int) -> tuple[int, int]:
    """Rows of a small and of a large block.

    Those of a small one are the greatest power of two up to an eighth of an expert's mean load, from 1 to 64. A large
    one has 8 times as many.
    """
    load, rows = num_assignments // num_experts, 1
    while 2 * rows <= min(load // _BLOCKS_IN_LARGE, _MOST_ROWS):
        rows *= 2
    return rows, _BLOCKS_IN_LARGE * rows


class _Expert(NamedTuple):
    """An expert with its rows, from `row` to before `end`, and its matrices [I, O]."""

    index: jax.Array
    row: jax.Array
    end: jax.Array
    matrices: list[Matrix]


def _for_experts(groups: Groups, matrices: list[Matrix], step: Callable[[_Expert, Any], Any], carry: Any) -> Any:
    """`carry` after `carry = step(expert, carry)` for each expert that has rows, in order of their rows.

    Matrices of other experts are not read.
    """
    end_E = jnp.cumsum(groups.rows_E)
    first_E = jnp.argsort(groups.rows_E == 0, stable=True)  # those that have rows come first

    def of_expert(i: jax.Array, carry: Any) -> Any:
        e = first_E[i]
        own = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, e, keepdims=False), matrices)
        return step(_Expert(e, end_E[e] - groups.rows_E[e], end_E[e], own), carry)

    return jax.lax.fori_loop(0, jnp.sum(groups.rows_E > 0, dtype=jnp.int32), of_expert, carry)


def _for_blocks(expert: _Expert, groups: Groups, step: Callable[[jax.Array, jax.Array, Any], Any], carry: Any) -> Any:
    """`carry` after `carry = step(row, assignments, carry)` for each block of an expert's rows.

    `row` is the first of a block. The assignment of a row after the expert's last one is A. Such rows may be written:
    experts that follow overwrite theirs, and nothing reads rows after the last assignment.
    """
    A = len(groups.row_A)
    small, large = block_rows(A, len(groups.rows_E))
    assignment_P = jnp.pad(groups.assignment_P, (0, large), constant_values=A)

    def of_block(rows: int, i: jax.Array, carry: Any) -> Any:
        row = expert.row + i * rows
        assignment_R = jax.lax.dynamic_slice_in_dim(assignment_P, row, rows)
        return step(row, jnp.where(row + jnp.arange(rows) < expert.end, assignment_R, A), carry)

    count = expert.end - expert.row
    num_large = (count + large // 4) // large  # a large block is filled by three quarters at least
    carry = jax.lax.fori_loop(0, num_large, functools.partial(of_block, large), carry)
    bounds = num_large * _BLOCKS_IN_LARGE, (count + small - 1) // small
    return jax.lax.fori_loop(*bounds, functools.partial(of_block, small), carry)


def _block_product(x_RI: jax.Array, matrix: Matrix) -> jax.Array:
    return linear("RI,IO->RO", x_RI, dequantize(matrix, x_RI.dtype))


def _zeros(x_MI: jax.Array, groups: Groups) -> jax.Array:
    """Zeros in float32, as wide as `x_MI`, for the row of each assignment and for a block after the last one.

    XLA's CPU backend copies a whole bfloat16 array when it writes a part of it.
    """
    A = len(groups.row_A)
    return jnp.zeros((A + block_rows(A, len(groups.rows_E))[1], x_MI.shape[1]), jnp.float32)


def _put(y_PI: jax.Array, y_RI: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(y_PI, y_RI.astype(y_PI.dtype), row, axis=0)


def _apply_by_block(
    function: Function, x_MD: jax.Array, weight_A1: jax.Array, matrices: list[Matrix], groups: Groups
) -> jax.Array:
    def of_expert(expert: _Expert, y_PD: jax.Array) -> jax.Array:
        def of_block(row: jax.Array, assignment_R: jax.Array, y_PD: jax.Array) -> jax.Array:
            x_RD, weight_R1 = (_rows(each, assignment_R, groups) for each in (x_MD, weight_A1))
            return _put(y_PD, function(_block_product, x_RD, weight_R1, expert.matrices), row)

        return _for_blocks(expert, groups, of_block, y_PD)

    y_PD = _for_experts(groups, matrices, of_expert, _zeros(x_MD, groups))
    return jnp.asarray(collect(y_PD, groups, len(x_MD)), x_MD.dtype)


def _gradients_by_block(
    function: Function, x_MD: jax.Array, weight_A1: jax.Array, matrices: list[Matrix], groups: Groups, d_y_MD: Any
) -> tuple[Any, ...]:
    def of_expert(expert: _Expert, carry: Any) -> Any:
        def of_block(row: jax.Array, assignment_R: jax.Array, carry: Any) -> Any:
            d_x, d_weight, sums = carry
            x_RD, weight_R1, d_y_RD = (_rows(each, assignment_R, groups) for each in (x_MD, weight_A1, d_y_MD))
            apply = functools.partial(function, _block_product)
            own_x, own_weight, own = _gradients(apply, x_RD, weight_R1, expert.matrices, d_y_RD)
            return _put(d_x, own_x, row), _put(d_weight, own_weight, row), jax.tree.map(jnp.add, sums, own)

        d_x, d_weight, d_matrices = carry
        sums = [None if d is None else jnp.zeros(d.shape[1:], d.dtype) for d in d_matrices]
        d_x, d_weight, sums = _for_blocks(expert, groups, of_block, (d_x, d_weight, sums))
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=expert.index, axis=0)
        return d_x, d_weight, jax.tree.map(put, d_matrices, sums)

    zeros = [None if isinstance(matrix, QTensor) else jnp.zeros(matrix.shape, jnp.float32) for matrix in matrices]
    carry = _zeros(x_MD, groups), _zeros(weight_A1, groups), zeros
    d_x, d_weight, d_matrices = _for_experts(groups, matrices, of_expert, carry)
    d_rows = (jnp.asarray(collect(d, groups, len(x)), x.dtype) for d, x in ((d_x, x_MD), (d_weight, weight_A1)))
    pairs = zip(matrices, d_matrices, strict=True)
    return *d_rows, [None if isinstance(matrix, QTensor) else d.astype(matrix.dtype) for matrix, d in pairs]
