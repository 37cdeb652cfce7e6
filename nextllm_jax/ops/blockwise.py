"""Blockwise attention in plain XLA, with memory linear in the sequence length.

A loop over blocks of keys carries the row maximum, the sum of exponentials and the unnormalized output of each query
(Rabe & Staats, arXiv:2112.05682). The backward pass recomputes the probabilities from the log-sum-exp (Dao et al.,
FlashAttention, arXiv:2205.14135). Fully masked blocks are skipped.

Dimension letters: B batch, T query time, S key time, N query heads, K key heads, G = N / K, H head dim; a leading n
or m counts blocks of queries or of keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nextllm_jax.ops.attention_logits import MASKED, LogitsRule, einsum, group, visible


class Blocks(NamedTuple):
    """Positions per block of queries and per block of keys."""

    queries: int
    keys: int


class Inputs(NamedTuple):
    """Queries, keys and values in blocks."""

    q_nBTKGH: jax.Array
    q_ids_nBT: jax.Array
    q_start: jax.Array
    """Position in the sequence at which the queries start."""
    k_mBSKH: jax.Array
    v_mBSKH: jax.Array
    k_ids_mBS: jax.Array
    length: int
    """Number of keys without padding."""


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segment_ids_BS: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    blocks: tuple[int, int],
    shard: jax.Array | int = 0,
) -> jax.Array:
    """`ops.attention.causal_attention` in blocks, for sequences of any length.

    `blocks` are the positions per block of queries and of keys. With fewer queries than keys, S = n T, the queries are
    shard number `shard` of n. The names for `jax.checkpoint` are those of `causal_attention`.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    ids_BS = jnp.zeros((B, S), jnp.int32) if segment_ids_BS is None else segment_ids_BS
    rule, sizes = LogitsRule.of(H, window, scale, soft_cap), Blocks(min(blocks[0], T), min(blocks[1], S))
    start = jnp.asarray(shard * T, jnp.int32)
    return _attend(rule, sizes, group(q_BTNH, K), k_BSKH, v_BSKH, ids_BS, start).reshape(B, T, N, H)


def _split(x_BT: jax.Array, size: int) -> jax.Array:
    """The time axis in blocks, [n, B, T, ...]; the last is padded with zeros."""
    B, T, *rest = x_BT.shape
    x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % size), *((0, 0) for _ in rest)))
    return jnp.moveaxis(x_BT.reshape(B, -1, size, *rest), 1, 0)


def _join(x_nBT: jax.Array, T: int) -> jax.Array:
    """The inverse of `_split`, [B, T, ...]."""
    n, B, size, *rest = x_nBT.shape
    return jnp.moveaxis(x_nBT, 0, 1).reshape(B, n * size, *rest)[:, :T]


def _in_blocks(sizes: Blocks, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start) -> Inputs:
    """The inputs in blocks: queries from position `start` on, and the keys of the whole sequence."""
    q_ids_BT = lax.dynamic_slice_in_dim(ids_BS, start, q_BTKGH.shape[1], axis=1)
    q_nBTKGH, q_ids_nBT = (_split(x, sizes.queries) for x in (q_BTKGH, q_ids_BT))
    k_mBSKH, v_mBSKH, k_ids_mBS = (_split(x, sizes.keys) for x in (k_BSKH, v_BSKH, ids_BS))
    return Inputs(q_nBTKGH, q_ids_nBT, start, k_mBSKH, v_mBSKH, k_ids_mBS, k_BSKH.shape[1])


def _key_blocks(rule: LogitsRule, x: Inputs, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The range [first, end) of blocks of keys that query block i may see."""
    size_q, (m, _, size_k, *_) = x.q_nBTKGH.shape[2], x.k_mBSKH.shape
    start = x.q_start + i * size_q
    first = 0 if rule.window is None else jnp.clip((start - rule.window + 1) // size_k, 0, m)
    return jnp.asarray(first), jnp.clip((start + size_q - 1) // size_k + 1, 0, m)


def _query_blocks(rule: LogitsRule, x: Inputs, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The range [first, end) of blocks of queries that may see key block j."""
    (n, _, size_q, *_), size_k = x.q_nBTKGH.shape, x.k_mBSKH.shape[2]
    start = j * size_k - x.q_start
    last = n if rule.window is None else jnp.clip((start + size_k + rule.window - 2) // size_q + 1, 0, n)
    return jnp.clip(start // size_q, 0, n), jnp.asarray(last)


def _logits(rule: LogitsRule, x: Inputs, i: jax.Array, j: jax.Array) -> jax.Array:
    """Masked logits [B, K, S, G, T] of query block i and key block j; laid out as in `ops.attention`."""
    k_BKSH, q_BKHGT = jnp.einsum("BSKH->BKSH", x.k_mBSKH[j]), jnp.einsum("BTKGH->BKHGT", x.q_nBTKGH[i])
    logits_BKSGT = rule.logits(einsum("BKSH,BKHGT->BKSGT", k_BKSH, q_BKHGT))
    S, T = logits_BKSGT.shape[2], logits_BKSGT.shape[4]
    index_S = j * S + jnp.arange(S)
    distance_ST = (x.q_start + i * T + jnp.arange(T))[None, :] - index_S[:, None]
    visible_ST = visible(distance_ST, rule.window) & (index_S < x.length)[:, None]
    visible_BST = visible_ST[None] & (x.k_ids_mBS[j][:, :, None] == x.q_ids_nBT[i][:, None, :])
    return jnp.where(visible_BST[:, None, :, None, :], logits_BKSGT, MASKED)


def _outputs(rule: LogitsRule, x: Inputs) -> tuple[jax.Array, jax.Array]:
    """The output [n, B, T, K, G, H] and, in float32, the log-sum-exp [n, B, K, G, T]."""

    def add_block(i: jax.Array, j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        max_BKGT, sum_BKGT, out_BKHGT = carry
        logits_BKSGT = _logits(rule, x, i, j)
        new_max_BKGT = jnp.maximum(max_BKGT, logits_BKSGT.max(axis=2))
        # If all keys so far were masked, the maximum is MASKED and their weights are 1. The first visible key then
        # multiplies them by exp(MASKED - its logit), which is exactly 0.
        decay_BKGT = jnp.exp(max_BKGT - new_max_BKGT)
        weights_BKSGT = jnp.exp(logits_BKSGT - new_max_BKGT[:, :, None])
        v_BKHS = jnp.einsum("BSKH->BKHS", x.v_mBSKH[j])
        more_BKHGT = einsum("BKHS,BKSGT->BKHGT", v_BKHS, weights_BKSGT.astype(v_BKHS.dtype))
        sum_BKGT = sum_BKGT * decay_BKGT + weights_BKSGT.sum(axis=2)
        return new_max_BKGT, sum_BKGT, out_BKHGT * decay_BKGT[:, :, None] + more_BKHGT

    def one_query_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        B, T, K, G, H = x.q_nBTKGH.shape[1:]
        zeros_BKHGT = jnp.zeros((B, K, H, G, T), jnp.float32)
        start = zeros_BKHGT[:, :, 0] + MASKED, zeros_BKHGT[:, :, 0], zeros_BKHGT
        first, last = _key_blocks(rule, x, i)
        max_BKGT, sum_BKGT, out_BKHGT = lax.fori_loop(first, last, functools.partial(add_block, i), start)
        sum_BKGT = jnp.maximum(sum_BKGT, jnp.finfo(jnp.float32).tiny)  # 0 for padding without any block
        out_BKHGT = (out_BKHGT / sum_BKGT[:, :, None]).astype(x.q_nBTKGH.dtype)
        return jnp.einsum("BKHGT->BTKGH", out_BKHGT), max_BKGT + jnp.log(sum_BKGT)

    return lax.map(one_query_block, jnp.arange(x.q_nBTKGH.shape[0]))


def _gradients(
    rule: LogitsRule, x: Inputs, d_out_nBTKGH: jax.Array, log_sum_nBKGT: jax.Array, row_nBKGT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of queries, keys and values, float32: [n, B, K, H, G, T] and twice [m, B, K, S, H].

    `row_nBKGT` is out . d_out, which equals the sum over S of weight * d_weight in the gradient of the softmax.
    """

    def block(j: jax.Array, i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_q_nBKHGT, d_k_BKSH, d_v_BKSH = sums
        q_BTKGH, d_out_BTKGH = x.q_nBTKGH[i], d_out_nBTKGH[i]
        k_BSKH, v_BKSH = x.k_mBSKH[j], jnp.einsum("BSKH->BKSH", x.v_mBSKH[j])
        logits_BKSGT = _logits(rule, x, i, j)
        weights_BKSGT = jnp.exp(logits_BKSGT - log_sum_nBKGT[i][:, :, None])
        d_weights_BKSGT = einsum("BKSH,BKHGT->BKSGT", v_BKSH, jnp.einsum("BTKGH->BKHGT", d_out_BTKGH))
        d_logits_BKSGT = weights_BKSGT * (d_weights_BKSGT - row_nBKGT[i][:, :, None])
        d_logits_BKSGT = rule.d_products(d_logits_BKSGT, logits_BKSGT).astype(q_BTKGH.dtype)
        weights_BKSGT = weights_BKSGT.astype(q_BTKGH.dtype)
        more_BKHGT = einsum("BKHS,BKSGT->BKHGT", jnp.einsum("BSKH->BKHS", k_BSKH), d_logits_BKSGT)
        d_k_BKSH += einsum("BKSGT,BKGTH->BKSH", d_logits_BKSGT, jnp.einsum("BTKGH->BKGTH", q_BTKGH))
        d_v_BKSH += einsum("BKSGT,BKGTH->BKSH", weights_BKSGT, jnp.einsum("BTKGH->BKGTH", d_out_BTKGH))
        return d_q_nBKHGT.at[i].add(more_BKHGT), d_k_BKSH, d_v_BKSH

    def one_key_block(d_q_nBKHGT: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        zeros_BKSH = jnp.zeros_like(jnp.einsum("BSKH->BKSH", x.k_mBSKH[0]), jnp.float32)
        sums = (d_q_nBKHGT, zeros_BKSH, zeros_BKSH)
        d_q_nBKHGT, *d_kv = lax.fori_loop(*_query_blocks(rule, x, j), functools.partial(block, j), sums)
        return d_q_nBKHGT, (d_kv[0], d_kv[1])

    zeros_nBKHGT = jnp.zeros_like(jnp.einsum("nBTKGH->nBKHGT", x.q_nBTKGH), jnp.float32)
    d_q_nBKHGT, (d_k_mBKSH, d_v_mBKSH) = lax.scan(one_key_block, zeros_nBKHGT, jnp.arange(x.k_mBSKH.shape[0]))
    return d_q_nBKHGT, d_k_mBKSH, d_v_mBKSH


def _attend_primal(rule: LogitsRule, sizes: Blocks, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start) -> jax.Array:
    return _attend_forward(rule, sizes, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start)[0]


def _attend_forward(rule: LogitsRule, sizes: Blocks, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start):
    out_nBTKGH, log_sum_nBKGT = _outputs(rule, _in_blocks(sizes, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start))
    out_BTKGH = checkpoint_name(_join(out_nBTKGH, q_BTKGH.shape[1]), "attention_out")
    log_sum_nBKGT = checkpoint_name(log_sum_nBKGT, "attention_residuals")
    return out_BTKGH, (q_BTKGH, k_BSKH, v_BSKH, ids_BS, start, out_BTKGH, log_sum_nBKGT)


def _attend_backward(rule: LogitsRule, sizes: Blocks, residuals, d_out_BTKGH):
    q_BTKGH, k_BSKH, v_BSKH, ids_BS, start, out_BTKGH, log_sum_nBKGT = residuals
    row_BTKG = jnp.sum(out_BTKGH.astype(jnp.float32) * d_out_BTKGH.astype(jnp.float32), axis=-1)
    row_nBKGT = jnp.einsum("nBTKG->nBKGT", _split(row_BTKG, sizes.queries))
    inputs = _in_blocks(sizes, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start)
    d_q_nBKHGT, *d_kv = _gradients(rule, inputs, _split(d_out_BTKGH, sizes.queries), log_sum_nBKGT, row_nBKGT)
    d_q_BTKGH = _join(jnp.einsum("nBKHGT->nBTKGH", d_q_nBKHGT), q_BTKGH.shape[1])
    d_k_BSKH, d_v_BSKH = (_join(jnp.einsum("mBKSH->mBSKH", x), k_BSKH.shape[1]) for x in d_kv)
    return d_q_BTKGH.astype(q_BTKGH.dtype), d_k_BSKH.astype(k_BSKH.dtype), d_v_BSKH.astype(v_BSKH.dtype), None, None


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0, 1))
_attend.defvjp(_attend_forward, _attend_backward)
