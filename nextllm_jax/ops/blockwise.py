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

    q_nBTKGH: jax.Array
    ids_nBT: jax.Array
    start: jax.Array | int


class Keys(NamedTuple):
    """Keys and values in blocks, how many keys are not padding, and where they start."""

    k_mBSKH: jax.Array
    v_mBSKH: jax.Array
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


def split(x_BT: jax.Array, size: int) -> jax.Array:
    """The time axis in blocks, [n, B, T, ...]; the last is padded with zeros."""
    B, T, *rest = x_BT.shape
    x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % size), *((0, 0) for _ in rest)))
    return jnp.moveaxis(x_BT.reshape(B, -1, size, *rest), 1, 0)


def join(x_nBT: jax.Array, T: int) -> jax.Array:
    """What `split` took, [B, T, ...]."""
    n, B, size, *rest = x_nBT.shape
    return jnp.moveaxis(x_nBT, 0, 1).reshape(B, n * size, *rest)[:, :T]


def no_keys(queries: Queries) -> Partial:
    """What queries have before they meet a key."""
    n, B, T, K, G, H = queries.q_nBTKGH.shape
    out_nBKHGT = jnp.zeros((n, B, K, H, G, T), jnp.float32)
    sum_nBKGT = out_nBKHGT[:, :, :, 0]
    return Partial(sum_nBKGT + MASKED, sum_nBKGT, out_nBKHGT)


def finish(partial: Partial, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The output [n, B, T, K, G, H] in `dtype` and the log-sum-exp [n, B, K, G, T]."""
    sum_nBKGT = jnp.maximum(partial.sum_nBKGT, jnp.finfo(jnp.float32).tiny)  # 0 for padding that met no block
    out_nBKHGT = (partial.out_nBKHGT / sum_nBKGT[:, :, :, None]).astype(dtype)
    return jnp.einsum("nBKHGT->nBTKGH", out_nBKHGT), partial.max_nBKGT + jnp.log(sum_nBKGT)


def _key_blocks(rule: ScoreRule, queries: Queries, keys: Keys, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first block of keys that a query of block i may see, and the one after the last."""
    size_q, (m, _, size_k, *_) = queries.q_nBTKGH.shape[2], keys.k_mBSKH.shape
    start = queries.start + i * size_q - keys.start
    first = 0 if rule.window is None else jnp.clip((start - rule.window + 1) // size_k, 0, m)
    return jnp.asarray(first), jnp.clip((start + size_q - 1) // size_k + 1, 0, m)


def _query_blocks(rule: ScoreRule, queries: Queries, keys: Keys, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first block of queries that may see a key of block j, and the one after the last."""
    (n, _, size_q, *_), size_k = queries.q_nBTKGH.shape, keys.k_mBSKH.shape[2]
    start = keys.start + j * size_k - queries.start
    last = n if rule.window is None else jnp.clip((start + size_k + rule.window - 2) // size_q + 1, 0, n)
    return jnp.clip(start // size_q, 0, n), jnp.asarray(last)


def _scores(rule: ScoreRule, queries: Queries, keys: Keys, i: jax.Array, j: jax.Array) -> jax.Array:
    """Masked scores [B, K, S, G, T] of query block i and key block j; laid out as in `ops.attention`."""
    k_BKSH, q_BKHGT = jnp.einsum("BSKH->BKSH", keys.k_mBSKH[j]), jnp.einsum("BTKGH->BKHGT", queries.q_nBTKGH[i])
    scores_BKSGT = rule.scores(einsum("BKSH,BKHGT->BKSGT", k_BKSH, q_BKHGT))
    S, T = scores_BKSGT.shape[2], scores_BKSGT.shape[4]
    index_S = j * S + jnp.arange(S)
    distance_ST = (queries.start + i * T + jnp.arange(T))[None, :] - (keys.start + index_S)[:, None]
    visible_ST = visible(distance_ST, rule.window) & (index_S < keys.length)[:, None]
    visible_BST = visible_ST[None] & (keys.ids_mBS[j][:, :, None] == queries.ids_nBT[i][:, None, :])
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
        v_BKHS = jnp.einsum("BSKH->BKHS", keys.v_mBSKH[j])
        more_BKHGT = einsum("BKHS,BKSGT->BKHGT", v_BKHS, weights_BKSGT.astype(v_BKHS.dtype))
        sum_BKGT = sum_BKGT * decay_BKGT + weights_BKSGT.sum(axis=2)
        return Partial(new_max_BKGT, sum_BKGT, out_BKHGT * decay_BKGT[:, :, None] + more_BKHGT)

    def one_query_block(i: jax.Array, so_far: Partial) -> Partial:
        first, last = _key_blocks(rule, queries, keys, i)
        return lax.fori_loop(first, last, lambda j, block: meet_block(i, j, block), so_far)

    numbers = jnp.arange(queries.q_nBTKGH.shape[0])
    return lax.map(lambda block: one_query_block(*block), (numbers, partial))


class Backward(NamedTuple):
    """What the backward pass needs of the queries, beside them."""

    d_out_nBTKGH: jax.Array
    log_sum_nBKGT: jax.Array
    row_nBKGT: jax.Array
    """out . d_out: the softmax's backward needs sum_S(weight * d_weight), which is this."""

    @classmethod
    def of(cls, size: int, out_BTKGH: jax.Array, d_out_BTKGH: jax.Array, log_sum_nBKGT: jax.Array) -> "Backward":
        row_BTKG = jnp.sum(out_BTKGH.astype(jnp.float32) * d_out_BTKGH.astype(jnp.float32), axis=-1)
        row_nBKGT = jnp.einsum("nBTKG->nBKGT", split(row_BTKG, size))
        return cls(split(d_out_BTKGH, size), log_sum_nBKGT, row_nBKGT)


def gradients(
    rule: ScoreRule, queries: Queries, keys: Keys, backward: Backward, d_q_nBKHGT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32: `d_q_nBKHGT` with what these keys add to it, and the gradients of keys and values, [m, B, K, S, H]."""

    def block(i: jax.Array, j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_q_nBKHGT, d_k_BKSH, d_v_BKSH = sums
        q_BTKGH, d_out_BTKGH = queries.q_nBTKGH[i], backward.d_out_nBTKGH[i]
        k_BSKH, v_BKSH = keys.k_mBSKH[j], jnp.einsum("BSKH->BKSH", keys.v_mBSKH[j])
        scores_BKSGT = _scores(rule, queries, keys, i, j)
        weights_BKSGT = jnp.exp(scores_BKSGT - backward.log_sum_nBKGT[i][:, :, None])
        d_weights_BKSGT = einsum("BKSH,BKHGT->BKSGT", v_BKSH, jnp.einsum("BTKGH->BKHGT", d_out_BTKGH))
        d_scores_BKSGT = weights_BKSGT * (d_weights_BKSGT - backward.row_nBKGT[i][:, :, None])
        d_scores_BKSGT = rule.d_products(d_scores_BKSGT, scores_BKSGT).astype(q_BTKGH.dtype)
        weights_BKSGT = weights_BKSGT.astype(q_BTKGH.dtype)
        more_BKHGT = einsum("BKHS,BKSGT->BKHGT", jnp.einsum("BSKH->BKHS", k_BSKH), d_scores_BKSGT)
        d_k_BKSH += einsum("BKSGT,BKGTH->BKSH", d_scores_BKSGT, jnp.einsum("BTKGH->BKGTH", q_BTKGH))
        d_v_BKSH += einsum("BKSGT,BKGTH->BKSH", weights_BKSGT, jnp.einsum("BTKGH->BKGTH", d_out_BTKGH))
        return d_q_nBKHGT.at[i].add(more_BKHGT), d_k_BKSH, d_v_BKSH

    def one_key_block(d_q_nBKHGT: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        zeros_BKSH = jnp.zeros_like(jnp.einsum("BSKH->BKSH", keys.k_mBSKH[0]), jnp.float32)
        first, last = _query_blocks(rule, queries, keys, j)
        sums = (d_q_nBKHGT, zeros_BKSH, zeros_BKSH)
        d_q_nBKHGT, d_k_BKSH, d_v_BKSH = lax.fori_loop(first, last, lambda i, sums: block(i, j, sums), sums)
        return d_q_nBKHGT, (d_k_BKSH, d_v_BKSH)

    d_q_nBKHGT, (d_k_mBKSH, d_v_mBKSH) = lax.scan(one_key_block, d_q_nBKHGT, jnp.arange(keys.k_mBSKH.shape[0]))
    return d_q_nBKHGT, d_k_mBKSH, d_v_mBKSH


def no_gradients(queries: Queries) -> jax.Array:
    """What the queries' gradients are before they meet a key, [n, B, K, H, G, T] in float32."""
    return no_keys(queries).out_nBKHGT


def finish_gradients(q_BTKGH, k_BSKH, v_BSKH, d_q_nBKHGT, d_k_mBKSH, d_v_mBKSH) -> tuple[jax.Array, ...]:
    """The sums of `gradients` in the shapes and types of what they are gradients of."""
    d_q_BTKGH = join(jnp.einsum("nBKHGT->nBTKGH", d_q_nBKHGT), q_BTKGH.shape[1])
    d_k_BSKH, d_v_BSKH = (join(jnp.einsum("mBKSH->mBSKH", x), k_BSKH.shape[1]) for x in (d_k_mBKSH, d_v_mBKSH))
    return d_q_BTKGH.astype(q_BTKGH.dtype), d_k_BSKH.astype(k_BSKH.dtype), d_v_BSKH.astype(v_BSKH.dtype)


def _in_blocks(sizes: Blocks, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start) -> tuple[Queries, Keys]:
    """Queries from position `start` on, and the keys of the whole sequence."""
    q_ids_BT = lax.dynamic_slice_in_dim(ids_BS, start, q_BTKGH.shape[1], axis=1)
    queries = Queries(split(q_BTKGH, sizes.queries), split(q_ids_BT, sizes.queries), start)
    k_mBSKH, v_mBSKH, ids_mBS = (split(x, sizes.keys) for x in (k_BSKH, v_BSKH, ids_BS))
    return queries, Keys(k_mBSKH, v_mBSKH, ids_mBS, k_BSKH.shape[1], 0)


def _attend_primal(rule: ScoreRule, sizes: Blocks, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start) -> jax.Array:
    return _attend_forward(rule, sizes, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start)[0]


def _attend_forward(rule: ScoreRule, sizes: Blocks, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start):
    queries, keys = _in_blocks(sizes, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start)
    out_nBTKGH, log_sum_nBKGT = finish(meet_keys(rule, queries, keys, no_keys(queries)), q_BTKGH.dtype)
    out_BTKGH = checkpoint_name(join(out_nBTKGH, q_BTKGH.shape[1]), "attention_out")
    log_sum_nBKGT = checkpoint_name(log_sum_nBKGT, "attention_residuals")
    return out_BTKGH, (q_BTKGH, k_BSKH, v_BSKH, ids_BS, start, out_BTKGH, log_sum_nBKGT)


def _attend_backward(rule: ScoreRule, sizes: Blocks, residuals, d_out_BTKGH):
    q_BTKGH, k_BSKH, v_BSKH, ids_BS, start, out_BTKGH, log_sum_nBKGT = residuals
    queries, keys = _in_blocks(sizes, q_BTKGH, k_BSKH, v_BSKH, ids_BS, start)
    backward = Backward.of(sizes.queries, out_BTKGH, d_out_BTKGH, log_sum_nBKGT)
    sums = gradients(rule, queries, keys, backward, no_gradients(queries))
    return *finish_gradients(q_BTKGH, k_BSKH, v_BSKH, *sums), None, None


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0, 1))
_attend.defvjp(_attend_forward, _attend_backward)
