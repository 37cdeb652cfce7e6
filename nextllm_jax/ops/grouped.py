"""Products of rows with one of several matrices each: the experts of a sparse layer.

Dimension letters: M tokens, A assignments of a token to an expert, E experts, P rows sorted by expert, R rows of a
block, I inputs, O outputs. Each token has the same number A / M of assignments, which are next to each other.

The rows of an expert are consecutive and begin at a multiple of R. The last block of an expert is padded with rows of
zeros, so a block belongs to one expert. No assignment is dropped, whatever the load of the experts: P is large enough
for the worst case, and the products stop at the last block in use.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nextllm_jax.ops.quantized import QTensor, dequantize

_MOST_ROWS = 256
_TILE_ROWS = 128
_FEW_TILE_ROWS = 16
"""The fewest rows of a bfloat16 tile on a TPU."""


class Groups(NamedTuple):
    """Where the rows of each expert are."""

    row_A: jax.Array
    """int32: the row of an assignment; P for an assignment to no expert."""
    assignment_P: jax.Array
    """int32: the assignment of a row; A for a row of padding."""
    rows_E: jax.Array
    """int32: number of rows of each expert, with padding."""


def block_rows(num_assignments: int, num_experts: int) -> int:
    """R, a power of two: half of an expert's mean load up to 128 rows, and a quarter beyond that.

    Half of an expert's last block is padding on average. On a CPU, smaller blocks take longer, since each copies the
    matrix of its expert.
    """
    load = num_assignments // num_experts
    rows = 1
    while 2 * rows <= min(load // 2 if rows < _TILE_ROWS else load // 4, _MOST_ROWS):
        rows *= 2
    return rows


def tile_rows(num_assignments: int, num_experts: int) -> int:
    """A number of rows that divides P, for tiles of a TPU: R if that is not too small."""
    return max(block_rows(num_assignments, num_experts), _FEW_TILE_ROWS if num_assignments < _TILE_ROWS else _TILE_ROWS)


def num_rows(num_assignments: int, num_experts: int) -> int:
    """P, for any load."""
    most = num_assignments + min(num_assignments, num_experts) * (block_rows(num_assignments, num_experts) - 1)
    tile = tile_rows(num_assignments, num_experts)
    return -(-most // tile) * tile


def arrange(expert_A: jax.Array, num_experts: int) -> Groups:
    """The rows of assignments to the experts `expert_A`, int32; the number of experts stands for no expert."""
    A, E = len(expert_A), num_experts
    R = block_rows(A, E)
    P = num_rows(A, E)
    order_A = jnp.argsort(expert_A, stable=True)
    count_E = jnp.sum(expert_A[:, None] == jnp.arange(E)[None], axis=0, dtype=jnp.int32)
    rows_E = (count_E + R - 1) // R * R
    end_E, last_E = jnp.cumsum(count_E), jnp.cumsum(rows_E)
    begin_E, first_E = end_E - count_E, last_E - rows_E  # in sorted order, and in rows
    sorted_A = expert_A[order_A]
    shift_E = jnp.append(first_E - begin_E, P)
    row_of_sorted_A = jnp.minimum(jnp.arange(A, dtype=jnp.int32) + shift_E[sorted_A], P)
    row_A = jnp.zeros(A, jnp.int32).at[order_A].set(row_of_sorted_A, unique_indices=True)
    row_P = jnp.arange(P, dtype=jnp.int32)
    expert_P = jnp.minimum(jnp.searchsorted(last_E, row_P, side="right"), E - 1)
    within_P = row_P - first_E[expert_P]
    found_P = order_A[jnp.clip(begin_E[expert_P] + within_P, 0, A - 1)]
    return Groups(row_A, jnp.where(within_P < count_E[expert_P], found_P, A).astype(jnp.int32), rows_E)


@jax.custom_vjp
def spread(x_MI: jax.Array, groups: Groups) -> jax.Array:
    """The row of each assignment, [P, I]: that of its token; zeros for padding."""
    return x_MI.at[groups.assignment_P // _per_token(x_MI, groups)].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def collect(x_PI: jax.Array, groups: Groups, num_tokens: int) -> jax.Array:
    """The sum of the rows of each token's assignments, [M, I] in the type of `x_PI`; sums in float32."""
    row_MK = groups.row_A.reshape(num_tokens, -1)
    rows_MKI = x_PI.at[row_MK].get(mode="fill", fill_value=0)
    return jnp.sum(rows_MKI, axis=1, dtype=jnp.float32).astype(x_PI.dtype)


def _per_token(x_MI: jax.Array, groups: Groups) -> int:
    return len(groups.row_A) // len(x_MI)


# Each is the transpose of the other. Automatic differentiation would scatter rows, one at a time on a CPU.
spread.defvjp(
    lambda x_MI, groups: (spread(x_MI, groups), (groups, len(x_MI))),
    lambda residuals, d_PI: (collect(d_PI, *residuals), None),
)
collect.defvjp(
    lambda x_PI, groups, num_tokens: (collect(x_PI, groups, num_tokens), groups),
    lambda num_tokens, groups, d_MI: (spread(d_MI, groups), None),
)


def grouped_product(x_PI: jax.Array, kernel_EIO: jax.Array | QTensor, groups: Groups) -> jax.Array:
    """Each row times the matrix of its expert, [P, O] in the type of `x_PI`; sums in float32.

    Rows after those of the last expert are not defined, and not read by `collect`. On TPUs this is JAX's megablox
    kernel. Elsewhere it is a loop over the blocks, which reads only the matrices of experts that have rows. Neither
    multiplies the FLOPs by the number of experts, as `jax.lax.ragged_dot` does on CPUs; also not in the backward pass.
    """
    return _product(x_PI, kernel_EIO if isinstance(kernel_EIO, QTensor) else kernel_EIO.astype(x_PI.dtype), groups)


@jax.custom_vjp
def _product(x_PI: jax.Array, kernel_EIO: jax.Array | QTensor, groups: Groups) -> jax.Array:
    return _by_platform(x_PI, kernel_EIO, groups, transposed=False)


def _by_platform(x: jax.Array, kernel_EIO: jax.Array | QTensor, groups: Groups, *, transposed: bool) -> jax.Array:
    on_tpu, loop = (functools.partial(f, transposed=transposed) for f in (_on_tpu, _loop))
    return jax.lax.platform_dependent(x, kernel_EIO, groups, tpu=on_tpu, default=loop)


def _forward(x_PI: jax.Array, kernel_EIO: jax.Array | QTensor, groups: Groups) -> tuple[jax.Array, Any]:
    return _product(x_PI, kernel_EIO, groups), (x_PI, kernel_EIO, groups)


def _backward(residuals: Any, d_PO: jax.Array) -> tuple[jax.Array, jax.Array | None, None]:
    x_PI, kernel_EIO, groups = residuals
    d_x = _by_platform(d_PO, kernel_EIO, groups, transposed=True)
    if isinstance(kernel_EIO, QTensor):
        return d_x, None, None
    d_kernel = jax.lax.platform_dependent(x_PI, d_PO, groups, tpu=_kernel_gradient_on_tpu, default=_kernel_gradient)
    return d_x, d_kernel, None


_product.defvjp(_forward, _backward)


def _for_blocks(groups: Groups, step: Any, carry: Any) -> Any:
    """`carry` after `carry = step(first row, expert, carry)` for each block in use. The rows of a block are R."""
    R = block_rows(len(groups.row_A), len(groups.rows_E))
    last_E = jnp.cumsum(groups.rows_E)

    def block(i: jax.Array, carry: Any) -> Any:
        return step(i * R, jnp.sum(last_E <= i * R, dtype=jnp.int32), carry)

    return jax.lax.fori_loop(0, last_E[-1] // R, block, carry)


def _loop(x_PI: jax.Array, kernel: jax.Array | QTensor, groups: Groups, *, transposed: bool) -> jax.Array:
    """The product, block by block; with `transposed`, with the transposed matrices."""
    R = block_rows(len(groups.row_A), len(groups.rows_E))
    equation = "RO,IO->RI" if transposed else "RI,IO->RO"

    def step(row: jax.Array, expert: jax.Array, y: jax.Array) -> jax.Array:
        x_RI = jax.lax.dynamic_slice_in_dim(x_PI, row, R)
        matrix = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, expert, keepdims=False), kernel)
        y_RO = jnp.einsum(equation, x_RI, dequantize(matrix, x_PI.dtype), preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(y, y_RO.astype(y.dtype), row, axis=0)

    return _for_blocks(groups, step, jnp.zeros((len(x_PI), kernel.shape[1 if transposed else 2]), x_PI.dtype))


def _kernel_gradient(x_PI: jax.Array, d_PO: jax.Array, groups: Groups) -> jax.Array:
    """The gradient of the matrices, block by block, summed in float32."""
    R, shape = block_rows(len(groups.row_A), len(groups.rows_E)), (len(groups.rows_E), x_PI.shape[1], d_PO.shape[1])

    def step(row: jax.Array, expert: jax.Array, sums_EIO: jax.Array) -> jax.Array:
        x_RI, d_RO = (jax.lax.dynamic_slice_in_dim(x, row, R) for x in (x_PI, d_PO))
        old_IO = jax.lax.dynamic_index_in_dim(sums_EIO, expert, keepdims=False)
        new_IO = old_IO + jnp.einsum("RI,RO->IO", x_RI, d_RO, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_index_in_dim(sums_EIO, new_IO, expert, axis=0)

    return _for_blocks(groups, step, jnp.zeros(shape, jnp.float32)).astype(x_PI.dtype)


def _on_tpu(x_PI: jax.Array, kernel: jax.Array | QTensor, groups: Groups, *, transposed: bool) -> jax.Array:
    from nextllm_jax.ops import megablox  # imports Pallas, which takes a tenth of a start

    rows = tile_rows(len(groups.row_A), len(groups.rows_E))
    return megablox.product(x_PI, dequantize(kernel, x_PI.dtype), groups.rows_E, rows, transposed=transposed)


def _kernel_gradient_on_tpu(x_PI: jax.Array, d_PO: jax.Array, groups: Groups) -> jax.Array:
    from nextllm_jax.ops import megablox

    rows = tile_rows(len(groups.row_A), len(groups.rows_E))
    return megablox.kernel_gradient(x_PI, d_PO, groups.rows_E, rows)
