"""Grouped-query attention in plain XLA: whole sequences for training, a key-value cache for decoding.

Dimension letters: B batch, T query time, S key time, N query heads, K key heads, G = N / K, H head dim.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp

# Masked scores are finite: -inf minus a row maximum of -inf would be NaN.
_MASKED = -1e30


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Attention output [B, T, N, H] of each position over itself and earlier ones, in q's dtype.

    Position t sees s if s <= t, both have the same segment id (if given), and t - s < window (if given). Scores
    are scaled by 1/sqrt(H); scores and softmax are float32 whatever the input dtype, products of bfloat16 inputs
    accumulate in float32. Neither pass holds a [T, T] array of all queries, nor keeps one between them: the
    backward pass recomputes probabilities from the log-sum-exp (Dao et al., FlashAttention, arXiv:2205.14135).
    """
    out_BTNH, _ = _attend(window, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    return out_BTNH


def cached_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    positions_BT: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Attention output [B, T, N, H] of queries at absolute positions over the slots of a cache, in q's dtype.

    A query at position p sees slot s if s <= p and p - s < window (if given); what later slots hold, zeros or an
    earlier use's keys, does not matter as long as it is finite. Softmax is float32.
    """
    q_BTKGH = _group(q_BTNH, k_BSKH.shape[2])
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    slots_S = jnp.arange(k_BSKH.shape[1])
    distance_BTS = positions_BT[:, :, None] - slots_S[None, None, :]
    visible_BTS = distance_BTS >= 0
    if window is not None:
        visible_BTS &= distance_BTS < window
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS * _scale(q_BTNH), _MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH, preferred_element_type=jnp.float32)
    return out_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def _scale(q_BTNH: jax.Array) -> float:
    return 1 / math.sqrt(q_BTNH.shape[-1])


def _group(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)


def _query_blocks(T: int, window: int | None) -> list[tuple[int, int, int]]:
    """[(key_start, start, stop)]: queries [start, stop) meet keys [key_start, stop) and no others.

    Blocks leave out most of the upper triangle, which a full product would compute and throw away.
    """
    num_blocks = max(1, min(8, T // 128))
    edges = [T * i // num_blocks for i in range(num_blocks + 1)]
    reach = T if window is None else window - 1
    return [(max(0, start - reach), start, stop) for start, stop in itertools.pairwise(edges)]


def _mask_scores(scores_BKGTS, segment_ids_BT, block: tuple[int, int, int], window: int | None):
    """The block's scores with invisible keys at a large negative number."""
    key_start, start, stop = block
    distance_TS = jnp.arange(start, stop)[:, None] - jnp.arange(key_start, stop)[None, :]
    visible_BTS = (distance_TS >= 0)[None]
    if window is not None:
        visible_BTS &= (distance_TS < window)[None]
    if segment_ids_BT is not None:
        visible_BTS &= segment_ids_BT[:, start:stop, None] == segment_ids_BT[:, None, key_start:stop]
    return jnp.where(visible_BTS[:, None, None], scores_BKGTS, _MASKED)


def _scores(q_BTKGH, k_BSKH, segment_ids_BT, block: tuple[int, int, int], window: int | None):
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    return _mask_scores(scores_BKGTS / math.sqrt(q_BTKGH.shape[-1]), segment_ids_BT, block, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    """(output [B, T, N, H], log-sum-exp of the scores [B, K, G, T])."""
    q_BTKGH = _group(q_BTNH, k_BTKH.shape[2])
    outs, log_sums = [], []
    for block in _query_blocks(q_BTNH.shape[1], window):
        key_start, start, stop = block
        k_BSKH, v_BSKH = k_BTKH[:, key_start:stop], v_BTKH[:, key_start:stop]
        scores_BKGTS = _scores(q_BTKGH[:, start:stop], k_BSKH, segment_ids_BT, block, window)
        max_BKGT = scores_BKGTS.max(-1)
        weights_BKGTS = jnp.exp(scores_BKGTS - max_BKGT[..., None])
        sum_BKGT = weights_BKGTS.sum(-1)
        out_BKGTH = jnp.einsum(
            "BKGTS,BSKH->BKGTH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32
        )
        # Dividing after the product touches T x H numbers, not T x S.
        outs.append((out_BKGTH / sum_BKGT[..., None]).astype(q_BTNH.dtype))
        log_sums.append(max_BKGT + jnp.log(sum_BKGT))
    out_BTKGH = jnp.einsum("BKGTH->BTKGH", jnp.concatenate(outs, axis=3))
    return out_BTKGH.reshape(q_BTNH.shape), jnp.concatenate(log_sums, axis=3)


def _attend_forward(window, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    out_BTNH, log_sum_BKGT = _attend(window, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    return (out_BTNH, log_sum_BKGT), (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, log_sum_BKGT)


def _attend_backward(window, residuals, cotangents):
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, log_sum_BKGT = residuals
    d_out_BTNH, _ = cotangents
    K, dtype = k_BTKH.shape[2], q_BTNH.dtype
    q_BTKGH, d_out_BTKGH = _group(q_BTNH, K), _group(d_out_BTNH, K)
    product_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * d_out_BTNH.astype(jnp.float32), axis=-1)
    row_BKGT = jnp.einsum("BTKG->BKGT", product_BTN.reshape(q_BTKGH.shape[:-1]))
    d_qs = []
    d_k_BSKH = jnp.zeros(k_BTKH.shape, jnp.float32)
    d_v_BSKH = jnp.zeros(v_BTKH.shape, jnp.float32)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for block in _query_blocks(q_BTNH.shape[1], window):
        key_start, start, stop = block
        q, k, v = q_BTKGH[:, start:stop], k_BTKH[:, key_start:stop], v_BTKH[:, key_start:stop]
        d_out = d_out_BTKGH[:, start:stop]
        scores_BKGTS = _scores(q, k, segment_ids_BT, block, window)
        weights_BKGTS = jnp.exp(scores_BKGTS - log_sum_BKGT[..., start:stop, None])
        d_weights_BKGTS = einsum("BTKGH,BSKH->BKGTS", d_out, v)
        d_scores_BKGTS = weights_BKGTS * (d_weights_BKGTS - row_BKGT[..., start:stop, None]) * _scale(q_BTNH)
        d_scores_BKGTS = d_scores_BKGTS.astype(dtype)
        d_qs.append(einsum("BKGTS,BSKH->BTKGH", d_scores_BKGTS, k))
        d_k = einsum("BKGTS,BTKGH->BSKH", d_scores_BKGTS, q)
        d_v = einsum("BKGTS,BTKGH->BSKH", weights_BKGTS.astype(dtype), d_out)
        d_k_BSKH = d_k_BSKH.at[:, key_start:stop].add(d_k)
        d_v_BSKH = d_v_BSKH.at[:, key_start:stop].add(d_v)
    d_q_BTNH = jnp.concatenate(d_qs, axis=1).reshape(q_BTNH.shape)
    return d_q_BTNH.astype(dtype), d_k_BSKH.astype(k_BTKH.dtype), d_v_BSKH.astype(v_BTKH.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
