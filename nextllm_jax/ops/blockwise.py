"""Attention block by block in plain XLA: memory grows with the length of the sequence, not with its square.

A pass over blocks of keys carries the row maximum, the sum of exponentials and the unnormalised output of each query
(Rabe & Staats, arXiv:2112.05682); the backward pass makes the probabilities again from the log-sum-exp (Dao et al.,
FlashAttention, arXiv:2205.14135). Blocks that no query sees are not computed. `ops.ring` is made of the same passes.

Dimension letters: B batch, T query time, S key time, N query heads, K key heads, G = N / K, H head dim; a leading n
or m counts blocks of queries or of keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nextllm_jax.ops.scores import MASKED, ScoreRule, einsum, group, visible


class Blocks(NamedTuple):
    """Positions in a block of queries and in one of keys."""

    queries: int
    keys: int


class Queries(NamedTuple):
    """Queries in blocks, and the position in the sequence at which they start."""

    q_nBKHGT: jax.Array
    ids_nBT: jax.Array
    start: jax.Array | int


class Keys(NamedTuple):
    """Keys and values in blocks, how many keys are not padding, and where they start."""

    k_mBKSH: jax.Array
    v_mBKSH: jax.Array
    ids_mBS: jax.Array
    length: int
    start: jax.Array | int


class Partial(NamedTuple):
    """What the keys met so far give each query, float32: maximum, sum of exponentials, output times that sum."""

    max_nBKGT: jax.Array
    sum_nBKGT: jax.Array
    out_nBKHGT: jax.Array


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
    """`ops.attention.causal_attention` of sequences of any length, `blocks` of queries and keys at a time.

    With fewer queries than keys, S = n T, the queries are part number `shard` of n. Names for `jax.checkpoint` as in
    `causal_attention`.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    ids_BS = jnp.zeros((B, S), jnp.int32) if segment_ids_BS is None else segment_ids_BS
    rule, sizes = ScoreRule.of(H, window, scale, soft_cap), Blocks(min(blocks[0], T), min(blocks[1], S))
    start = jnp.asarray(shard * T, jnp.int32)
    return _attend(rule, sizes, group(q_BTNH, K), k_BSKH, v_BSKH, ids_BS, start).reshape(B, T, N, H)


def split_queries(x_BTKGH: jax.Array, size: int) -> jax.Array:
    """[n, B, K, H, G, T] blocks of queries, or of what else has their shape; the last is padded with zeros."""
    return jnp.einsum("nBTKGH->nBKHGT", _split(x_BTKGH, size))


def join_queries(x_nBKHGT: jax.Array, T: int) -> jax.Array:
    """What `split_queries` took, [B, T, K, G, H]."""
    x_BnTKGH = jnp.einsum("nBKHGT->BnTKGH", x_nBKHGT)
    B, n, size, *heads = x_BnTKGH.shape
    return x_BnTKGH.reshape(B, n * size, *heads)[:, :T]


def split_keys(x_BSKH: jax.Array, size: int) -> jax.Array:
    """[m, B, K, S, H] blocks of keys or values; the last is padded with zeros."""
    return jnp.einsum("mBSKH->mBKSH", _split(x_BSKH, size))


def join_keys(x_mBKSH: jax.Array, S: int) -> jax.Array:
    """What `split_keys` took, [B, S, K, H]."""
    x_BmSKH = jnp.einsum("mBKSH->BmSKH", x_mBKSH)
    B, m, size, *heads = x_BmSKH.shape
    return x_BmSKH.reshape(B, m * size, *heads)[:, :S]


def split_ids(ids_BT: jax.Array, size: int) -> jax.Array:
    """[n, B, T] blocks of segment ids."""
    return _split(ids_BT, size)


def _split(x_BT: jax.Array, size: int) -> jax.Array:
    B, T, *rest = x_BT.shape
    x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % size), *((0, 0) for _ in rest)))
    return jnp.moveaxis(x_BT.reshape(B, -1, size, *rest), 1, 0)


def no_keys(queries: Queries) -> Partial:
    """What queries have before they meet a key."""
    out_nBKHGT = jnp.zeros(queries.q_nBKHGT.shape, jnp.float32)
    sum_nBKGT = out_nBKHGT[:, :, :, 0]
    return Partial(sum_nBKGT + MASKED, sum_nBKGT, out_nBKHGT)


def finish(partial: Partial, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The output [n, B, K, H, G, T] in `dtype` and the log-sum-exp [n, B, K, G, T]."""
    sum_nBKGT = jnp.maximum(partial.sum_nBKGT, jnp.finfo(jnp.float32).tiny)  # 0 for padding that met no block
    out_nBKHGT = (partial.out_nBKHGT / sum_nBKGT[:, :, :, None]).astype(dtype)
    return out_nBKHGT, partial.max_nBKGT + jnp.log(sum_nBKGT)


def _key_blocks(rule: ScoreRule, queries: Queries, keys: Keys, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first block of keys that a query of block i may see, and the one after the last."""
    size_q, (m, size_k) = queries.q_nBKHGT.shape[-1], (keys.k_mBKSH.shape[0], keys.k_mBKSH.shape[3])
    start = queries.start + i * size_q - keys.start
    first = 0 if rule.window is None else jnp.clip((start - rule.window + 1) // size_k, 0, m)
    return jnp.asarray(first), jnp.clip((start + size_q - 1) // size_k + 1, 0, m)


def _query_blocks(rule: ScoreRule, queries: Queries, keys: Keys, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first block of queries that may see a key of block j, and the one after the last."""
    (n, size_q), size_k = (queries.q_nBKHGT.shape[0], queries.q_nBKHGT.shape[-1]), keys.k_mBKSH.shape[3]
    start = keys.start + j * size_k - queries.start
    last = n if rule.window is None else jnp.clip((start + size_k + rule.window - 2) // size_q + 1, 0, n)
    return jnp.clip(start // size_q, 0, n), jnp.asarray(last)


def _scores(rule: ScoreRule, queries: Queries, keys: Keys, i: jax.Array, j: jax.Array) -> jax.Array:
    """Masked scores [B, K, S, G, T] of query block i and key block j; keys before queries as in `ops.attention`."""
    scores_BKSGT = rule.scores(einsum("BKSH,BKHGT->BKSGT", keys.k_mBKSH[j], queries.q_nBKHGT[i]))
    S, T = scores_BKSGT.shape[2], scores_BKSGT.shape[4]
    index_S = j * S + jnp.arange(S)
    distance_ST = (queries.start + i * T + jnp.arange(T))[None, :] - (keys.start + index_S)[:, None]
    visible_ST = visible(distance_ST, rule.window) & (index_S < keys.length)[:, None]
    visible_BST = visible_ST & (keys.ids_mBS[j][:, :, None] == queries.ids_nBT[i][:, None, :])
    return jnp.where(visible_BST[:, None, :, None, :], scores_BKSGT, MASKED)


def meet_keys(rule: ScoreRule, queries: Queries, keys: Keys, partial: Partial) -> Partial:
    """`partial` after the queries have also met these keys."""

    def meet_block(i: jax.Array, j: jax.Array, so_far: Partial) -> Partial:
        max_BKGT, sum_BKGT, out_BKHGT = so_far
        scores_BKSGT = _scores(rule, queries, keys, i, j)
        new_max_BKGT = jnp.maximum(max_BKGT, scores_BKSGT.max(axis=2))
        # Where all keys so far were masked the maximum is MASKED and their weights are 1: the first visible key
        # multiplies them with exp(MASKED - its score), which is exactly 0.
        decay_BKGT = jnp.exp(max_BKGT - new_max_BKGT)
        weights_BKSGT = jnp.exp(scores_BKSGT - new_max_BKGT[:, :, None])
        v_BKSH = keys.v_mBKSH[j]
        more_BKHGT = einsum("BKHS,BKSGT->BKHGT", jnp.einsum("BKSH->BKHS", v_BKSH), weights_BKSGT.astype(v_BKSH.dtype))
        sum_BKGT = sum_BKGT * decay_BKGT + weights_BKSGT.sum(axis=2)
        return Partial(new_max_BKGT, sum_BKGT, out_BKHGT * decay_BKGT[:, :, None] + more_BKHGT)

    def one_query_block(i: jax.Array, so_far: Partial) -> Partial:
        first, last = _key_blocks(rule, queries, keys, i)
        return lax.fori_loop(first, last, lambda j, block: meet_block(i, j, block), so_far)

    numbers = jnp.arange(queries.q_nBKHGT.shape[0])
    return lax.map(lambda block: one_query_block(*block), (numbers, partial))


class Backward(NamedTuple):
    """What the backward pass needs of the queries, beside them."""

    d_out_nBKHGT: jax.Array
    log_sum_nBKGT: jax.Array
    row_nBKGT: jax.Array
    """out . d_out: the softmax's backward needs sum_S(weight * d_weight), which is this."""

    @classmethod
    def of(cls, out_nBKHGT: jax.Array, d_out_nBKHGT: jax.Array, log_sum_nBKGT: jax.Array) -> "Backward":
        return cls(d_out_nBKHGT, log_sum_nBKGT, einsum("nBKHGT,nBKHGT->nBKGT", out_nBKHGT, d_out_nBKHGT))


def gradients(
    rule: ScoreRule, queries: Queries, keys: Keys, backward: Backward, d_q_nBKHGT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32: `d_q_nBKHGT` with what these keys add to it, and the gradients of these keys and values."""

    def block(i: jax.Array, j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_q_nBKHGT, d_k_BKSH, d_v_BKSH = sums
        q_BKHGT, d_out_BKHGT, k_BKSH = queries.q_nBKHGT[i], backward.d_out_nBKHGT[i], keys.k_mBKSH[j]
        scores_BKSGT = _scores(rule, queries, keys, i, j)
        weights_BKSGT = jnp.exp(scores_BKSGT - backward.log_sum_nBKGT[i][:, :, None])
        d_weights_BKSGT = einsum("BKSH,BKHGT->BKSGT", keys.v_mBKSH[j], d_out_BKHGT)
        d_scores_BKSGT = weights_BKSGT * (d_weights_BKSGT - backward.row_nBKGT[i][:, :, None])
        d_scores_BKSGT = rule.d_products(d_scores_BKSGT, scores_BKSGT).astype(q_BKHGT.dtype)
        d_v_BKSH += einsum("BKSGT,BKGTH->BKSH", weights_BKSGT.astype(q_BKHGT.dtype), _turn(d_out_BKHGT))
        d_k_BKSH += einsum("BKSGT,BKGTH->BKSH", d_scores_BKSGT, _turn(q_BKHGT))
        more_BKHGT = einsum("BKHS,BKSGT->BKHGT", jnp.einsum("BKSH->BKHS", k_BKSH), d_scores_BKSGT)
        return d_q_nBKHGT.at[i].add(more_BKHGT), d_k_BKSH, d_v_BKSH

    def one_key_block(d_q_nBKHGT: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        zeros_BKSH = jnp.zeros(keys.k_mBKSH.shape[1:], jnp.float32)
        first, last = _query_blocks(rule, queries, keys, j)
        sums = (d_q_nBKHGT, zeros_BKSH, zeros_BKSH)
        d_q_nBKHGT, d_k_BKSH, d_v_BKSH = lax.fori_loop(first, last, lambda i, sums: block(i, j, sums), sums)
        return d_q_nBKHGT, (d_k_BKSH, d_v_BKSH)

    d_q_nBKHGT, (d_k_mBKSH, d_v_mBKSH) = lax.scan(one_key_block, d_q_nBKHGT, jnp.arange(keys.k_mBKSH.shape[0]))
    return d_q_nBKHGT, d_k_mBKSH, d_v_mBKSH


def _turn(x_BKHGT: jax.Array) -> jax.Array:
    return jnp.einsum("BKHGT->BKGTH", x_BKHGT)


def blocks_of(sizes: Blocks, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start) -> tuple[Queries, Keys]:
    """Queries from position `start` on, and the keys of the whole sequence, in blocks."""
    q_ids_BT = lax.dynamic_slice_in_dim(ids_BS, start, q_BTKGH.shape[1], axis=1)
    queries = Queries(split_queries(q_BTKGH, sizes.queries), split_ids(q_ids_BT, sizes.queries), start)
    k_mBKSH, v_mBKSH = (split_keys(x, sizes.keys) for x in (k_BSKH, v_BSKH))
    return queries, Keys(k_mBKSH, v_mBKSH, split_ids(ids_BS, sizes.keys), k_BSKH.shape[1], 0)


def _attend_primal(rule: ScoreRule, sizes: Blocks, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start) -> jax.Array:
    return _attend_forward(rule, sizes, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start)[0]


def _attend_forward(rule: ScoreRule, sizes: Blocks, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start):
    queries, keys = blocks_of(sizes, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start)
    out_nBKHGT, log_sum_nBKGT = finish(meet_keys(rule, queries, keys, no_keys(queries)), q_BTKGH.dtype)
    out_BTKGH = checkpoint_name(join_queries(out_nBKHGT, q_BTKGH.shape[1]), "attention_out")
    log_sum_nBKGT = checkpoint_name(log_sum_nBKGT, "attention_residuals")
    return out_BTKGH, (q_BTKGH, k_BSKH, v_BSKH, ids_BS, start, out_BTKGH, log_sum_nBKGT)


def _attend_backward(rule: ScoreRule, sizes: Blocks, residuals, d_out_BTKGH):
    q_BTKGH, k_BSKH, v_BSKH, ids_BS, start, out_BTKGH, log_sum_nBKGT = residuals
    queries, keys = blocks_of(sizes, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start)
    out_nBKHGT, d_out_nBKHGT = (split_queries(x, sizes.queries) for x in (out_BTKGH, d_out_BTKGH))
    backward = Backward.of(out_nBKHGT, d_out_nBKHGT, log_sum_nBKGT)
    d_q_nBKHGT = jnp.zeros(queries.q_nBKHGT.shape, jnp.float32)
    d_q_nBKHGT, d_k_mBKSH, d_v_mBKSH = gradients(rule, queries, keys, backward, d_q_nBKHGT)
    d_q_BTKGH = join_queries(d_q_nBKHGT, q_BTKGH.shape[1])
    d_k_BSKH, d_v_BSKH = (join_keys(x, k_BSKH.shape[1]) for x in (d_k_mBKSH, d_v_mBKSH))
    return d_q_BTKGH.astype(q_BTKGH.dtype), d_k_BSKH.astype(k_BSKH.dtype), d_v_BSKH.astype(v_BSKH.dtype), None, None


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0, 1))
_attend.defvjp(_attend_forward, _attend_backward)
