"""Cross-entropy of a language-model head that never holds the logits of all tokens.

Dimension letters: B batch, T time, D embed, V vocabulary, C tokens of one chunk.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def cross_entropy(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    logit_divisor: float = 1.0,
    soft_cap: float | None = None,
    chunk_tokens: int = 2048,
    batch_axes: tuple[str, ...] = (),
) -> jax.Array:
    """Negative log-likelihood of the targets, in nats, summed over mask: a float32 scalar.

    The logits are hidden @ head.T, multiplied in hidden's dtype (head is cast to it), accumulated and normalized in
    float32; in between `finish_logits` sees them. About chunk_tokens x V of them exist at once on each device, cut
    along time; fewer save memory, but below some 1,000 rows a TPU waits for the head and its gradient to pass through
    memory. `batch_axes` names the axes of the mesh in force (`jax.set_mesh`) over which B is divided: each device
    then sums its own part of the gradient for head, and the parts meet once, at the end.

    Under differentiation both gradients are made beside the logits, hidden's in its own dtype, head's summed in
    float32 and returned in head's dtype; the backward pass only scales them. So it is not differentiable twice,
    nor in the mask.
    """
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in batch_axes if mesh_shape.get(axis, 1) > 1)
    finish = (logit_divisor, soft_cap)
    return _nll_sum(chunk_tokens, axes, finish, hidden_BTD, head_VD, targets_BT, mask_BT.astype(jnp.float32))


def finish_logits(products: jax.Array, divisor: float, soft_cap: float | None) -> jax.Array:
    """Logits of float32 products of hidden states and head: divided, then bounded as cap * tanh(logit / cap)."""
    logits = products if divisor == 1 else products / divisor
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _divided(function: Callable, axes: tuple[str, ...], out_specs):
    """`function(hidden, head, targets, mask)`, run on each device's rows of the batch."""
    if not axes:
        return function
    rows, whole = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        function, in_specs=(rows, whole, rows, rows), out_specs=out_specs, axis_names=set(axes), check_vma=False
    )


def _chunks(x_BT: jax.Array, num_chunks: int) -> jax.Array:
    """[num_chunks, C, ...] of [B, T, ...], the time axis padded with zeros where it does not divide."""
    B, T, *rest = x_BT.shape
    length = -(-T // num_chunks)
    padding = [(0, 0), (0, num_chunks * length - T)] + [(0, 0)] * len(rest)
    x_BT = jnp.pad(x_BT, padding).reshape(B, num_chunks, length, *rest)
    return jnp.moveaxis(x_BT, 1, 0).reshape(num_chunks, B * length, *rest)


def _unchunk(x_C: jax.Array, B: int, T: int) -> jax.Array:
    """[B, T, ...] of [num_chunks, C, ...], without the padding."""
    x_C = x_C.reshape(x_C.shape[0], B, -1, *x_C.shape[2:])
    return jnp.moveaxis(x_C, 0, 1).reshape(B, -1, *x_C.shape[3:])[:, :T]


def _chunk_nll(finish: tuple[float, float | None], x_CD, head_VD, targets_C, mask_C):
    """(summed nll, its gradient for the products [C, V] of hidden states and head)."""
    divisor, soft_cap = finish
    logits_CV = finish_logits(_einsum("CD,VD->CV", x_CD, head_VD), divisor, soft_cap)
    max_C = logits_CV.max(axis=-1)
    weights_CV = jnp.exp(logits_CV - max_C[:, None])
    sum_C = weights_CV.sum(axis=-1)
    # A masked sum, not a gather, stays on its device where the vocabulary is divided.
    is_target_CV = jnp.arange(head_VD.shape[0])[None, :] == targets_C[:, None]
    target_logit_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=-1)
    nll = jnp.sum((max_C + jnp.log(sum_C) - target_logit_C) * mask_C)
    d_logits_CV = weights_CV * (mask_C / sum_C)[:, None] - jnp.where(is_target_CV, mask_C[:, None], 0)
    if soft_cap is not None:
        d_logits_CV *= 1 - jnp.square(logits_CV / soft_cap)
    return nll, d_logits_CV if divisor == 1 else d_logits_CV / divisor


def _scan_chunks(chunk_tokens: int, start, step, hidden_BTD, targets_BT, mask_BT):
    """`lax.scan` of `step` over the chunks (hidden [C, D], targets [C], mask [C])."""
    B, T, _ = hidden_BTD.shape
    num_chunks = -(-T // max(1, chunk_tokens // B))
    return jax.lax.scan(step, start, tuple(_chunks(x, num_chunks) for x in (hidden_BTD, targets_BT, mask_BT)))


def _nll_sum_primal(chunk_tokens, axes, finish, hidden_BTD, head_VD, targets_BT, mask_BT) -> jax.Array:
    def local(hidden_BTD, head_VD, targets_BT, mask_BT):
        def step(nll, chunk):
            x_CD, targets_C, mask_C = chunk
            return nll + _chunk_nll(finish, x_CD, head_VD, targets_C, mask_C)[0], None

        nll, _ = _scan_chunks(chunk_tokens, jnp.zeros((), jnp.float32), step, hidden_BTD, targets_BT, mask_BT)
        return jax.lax.psum(nll, axes)

    divided = _divided(local, axes, PartitionSpec())
    return divided(hidden_BTD, head_VD.astype(hidden_BTD.dtype), targets_BT, mask_BT)


def _nll_sum_forward(chunk_tokens, axes, finish, hidden_BTD, head_VD, targets_BT, mask_BT):
    def local(hidden_BTD, head_VD, targets_BT, mask_BT):
        def step(carry, chunk):
            nll, d_head_VD = carry
            x_CD, targets_C, mask_C = chunk
            chunk_nll, d_logits_CV = _chunk_nll(finish, x_CD, head_VD, targets_C, mask_C)
            d_logits_CV = d_logits_CV.astype(x_CD.dtype)
            d_x_CD = _einsum("CV,VD->CD", d_logits_CV, head_VD).astype(x_CD.dtype)
            d_head_VD += _einsum("CV,CD->VD", d_logits_CV, x_CD)
            return (nll + chunk_nll, d_head_VD), d_x_CD

        B, T, _ = hidden_BTD.shape
        start = (jnp.zeros((), jnp.float32), jnp.zeros(head_VD.shape, jnp.float32))
        totals, d_x = _scan_chunks(chunk_tokens, start, step, hidden_BTD, targets_BT, mask_BT)
        return *jax.lax.psum(totals, axes), _unchunk(d_x, B, T)

    divided = _divided(local, axes, (PartitionSpec(), PartitionSpec(), PartitionSpec(axes)))
    nll, d_head_VD, d_hidden_BTD = divided(hidden_BTD, head_VD.astype(hidden_BTD.dtype), targets_BT, mask_BT)
    return nll, (d_hidden_BTD, d_head_VD.astype(head_VD.dtype))


def _nll_sum_backward(chunk_tokens, axes, finish, residuals, d_nll):
    d_hidden_BTD, d_head_VD = ((d_nll * gradient).astype(gradient.dtype) for gradient in residuals)
    return d_hidden_BTD, d_head_VD, None, None


_nll_sum = jax.custom_vjp(_nll_sum_primal, nondiff_argnums=(0, 1, 2))
_nll_sum.defvjp(_nll_sum_forward, _nll_sum_backward)
