"""Grouped-query attention in plain XLA: whole sequences for training, a key-value cache for decoding.

Dimension letters: B batch, T query time, S key time, N query heads, K key heads, G = N / K, H head dim.
"""

import itertools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nextllm_jax.ops.attention_logits import MASKED, LogitsRule, einsum, group, visible


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention output [B, T, N, H] of each position over itself and earlier ones, in q's dtype.

    Position t sees s if s <= t, both have the same segment id (if given), and t - s < window (if given). Logits
    are multiplied by `scale` (None: 1/sqrt(H)) and then capped as soft_cap * tanh(logit / soft_cap) (None: no cap).
    Logits and softmax are float32 for any input dtype. No T x T array is saved for the backward pass, which recomputes
    the probabilities from the log-sum-exp, one block of queries at a time (Dao et al., FlashAttention,
    arXiv:2205.14135). For `jax.checkpoint`, the output is named "attention_out" and the log-sum-exp
    "attention_residuals".
    """
    K = k_BTKH.shape[2]
    rule = LogitsRule.of(q_BTNH.shape[-1], window, scale, soft_cap)
    return _attend(rule, group(q_BTNH, K), k_BTKH, v_BTKH, segment_ids_BT).reshape(q_BTNH.shape)


def cached_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    k_scale_BKS: jax.Array | None = None,
    v_scale_BKS: jax.Array | None = None,
    *,
    positions_BT: jax.Array,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention output [B, T, N, H] of queries at absolute positions over the slots of a cache, in q's dtype.

    A query at position p sees slot s if s <= p and p - s < window (if given). The other slots may hold any finite
    values. Scale, soft cap and softmax are as in `causal_attention`. The keys and values of an int8 cache are
    multiplied by `k_scale_BKS` and `v_scale_BKS`.
    """
    rule = LogitsRule.of(q_BTNH.shape[-1], window, scale, soft_cap)
    q_BKGTH = jnp.einsum("BTKGH->BKGTH", group(q_BTNH, k_BKSH.shape[1]))
    products_BKGTS = einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH.astype(q_BTNH.dtype))
    if k_scale_BKS is not None:
        products_BKGTS *= k_scale_BKS[:, :, None, None]
    logits_BKGTS = rule.logits(products_BKGTS)
    distance_BTS = positions_BT[:, :, None] - jnp.arange(k_BKSH.shape[2])[None, None, :]
    visible_BTS = visible(distance_BTS, window)
    weights_BKGTS = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], logits_BKGTS, MASKED), axis=-1)
    if v_scale_BKS is not None:
        weights_BKGTS *= v_scale_BKS[:, :, None, None]
        v_BKSH = v_BKSH.astype(q_BTNH.dtype)
    out_BKGTH = einsum("BKGTS,BKSH->BKGTH", weights_BKGTS.astype(v_BKSH.dtype), v_BKSH)
    return jnp.einsum("BKGTH->BTKGH", out_BKGTH).reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def _query_blocks(T: int, window: int | None) -> list[tuple[slice, slice]]:
    """(queries, keys) slices of the time axis for each block of queries; the queries see no keys outside the slice.

    Blocks skip most of the upper triangle, which a single product would compute in vain.
    """
    num_blocks = max(1, min(8, T // 64))
    edges = [T * i // num_blocks for i in range(num_blocks + 1)]
    reach = T if window is None else window - 1
    return [(slice(start, stop), slice(max(0, start - reach), stop)) for start, stop in itertools.pairwise(edges)]


def _logits(q_BTKGH, k_BTKH, segment_ids_BT, queries: slice, keys: slice, rule: LogitsRule) -> jax.Array:
    """Masked float32 logits [B, K, S, G, T] of one block.

    Keys come before queries: softmax then reduces over whole rows, and no product of the forward or backward
    pass transposes this large array, but only operands with H columns.
    """
    q_BKHGT, k_BKSH = jnp.einsum("BTKGH->BKHGT", q_BTKGH[:, queries]), jnp.einsum("BSKH->BKSH", k_BTKH[:, keys])
    logits_BKSGT = rule.logits(einsum("BKSH,BKHGT->BKSGT", k_BKSH, q_BKHGT))
    distance_ST = jnp.arange(queries.start, queries.stop)[None, :] - jnp.arange(keys.start, keys.stop)[:, None]
    visible_BST = visible(distance_ST, rule.window)[None]
    if segment_ids_BT is not None:
        visible_BST &= segment_ids_BT[:, keys, None] == segment_ids_BT[:, None, queries]
    return jnp.where(visible_BST[:, None, :, None, :], logits_BKSGT, MASKED)


def _attend_primal(rule: LogitsRule, q_BTKGH, k_BTKH, v_BTKH, segment_ids_BT) -> jax.Array:
    return _attend_forward(rule, q_BTKGH, k_BTKH, v_BTKH, segment_ids_BT)[0]


def _attend_forward(rule, q_BTKGH, k_BTKH, v_BTKH, segment_ids_BT):
    outs, log_sums = [], []
    for queries, keys in _query_blocks(q_BTKGH.shape[1], rule.window):
        logits_BKSGT = _logits(q_BTKGH, k_BTKH, segment_ids_BT, queries, keys, rule)
        max_BKGT = logits_BKSGT.max(axis=2)
        weights_BKSGT = jnp.exp(logits_BKSGT - max_BKGT[:, :, None])
        sum_BKGT = weights_BKSGT.sum(axis=2)
        out_BKHGT = einsum(
            "BKHS,BKSGT->BKHGT", jnp.einsum("BSKH->BKHS", v_BTKH[:, keys]), weights_BKSGT.astype(v_BTKH.dtype)
        )
        # Dividing after the product takes T x H divisions instead of T x S.
        out_BKHGT = (out_BKHGT / sum_BKGT[:, :, None]).astype(q_BTKGH.dtype)
        outs.append(jnp.einsum("BKHGT->BTKGH", out_BKHGT))
        log_sums.append(max_BKGT + jnp.log(sum_BKGT))
    out_BTKGH, log_sum_BKGT = jnp.concatenate(outs, axis=1), jnp.concatenate(log_sums, axis=3)
    out_BTKGH = checkpoint_name(out_BTKGH, "attention_out")
    log_sum_BKGT = checkpoint_name(log_sum_BKGT, "attention_residuals")
    return out_BTKGH, (q_BTKGH, k_BTKH, v_BTKH, segment_ids_BT, out_BTKGH, log_sum_BKGT)


def _attend_backward(rule, residuals, d_out_BTKGH):
    q_BTKGH, k_BTKH, v_BTKH, segment_ids_BT, out_BTKGH, log_sum_BKGT = residuals
    T, dtype = q_BTKGH.shape[1], q_BTKGH.dtype
    # The softmax's backward needs sum_S(weight * d_weight), which is out . d_out.
    row_BTKG = jnp.sum(out_BTKGH.astype(jnp.float32) * d_out_BTKGH.astype(jnp.float32), axis=-1)
    row_BKGT = jnp.einsum("BTKG->BKGT", row_BTKG)
    d_qs, d_ks, d_vs = [], [], []
    for queries, keys in _query_blocks(T, rule.window):
        q, d_out, k, v = q_BTKGH[:, queries], d_out_BTKGH[:, queries], k_BTKH[:, keys], v_BTKH[:, keys]
        logits_BKSGT = _logits(q_BTKGH, k_BTKH, segment_ids_BT, queries, keys, rule)
        weights_BKSGT = jnp.exp(logits_BKSGT - log_sum_BKGT[:, :, None, :, queries])
        d_weights_BKSGT = einsum("BKSH,BKHGT->BKSGT", jnp.einsum("BSKH->BKSH", v), jnp.einsum("BTKGH->BKHGT", d_out))
        d_logits_BKSGT = weights_BKSGT * (d_weights_BKSGT - row_BKGT[:, :, None, :, queries])
        d_logits_BKSGT = rule.d_products(d_logits_BKSGT, logits_BKSGT)
        weights_BKSGT, d_logits_BKSGT = weights_BKSGT.astype(dtype), d_logits_BKSGT.astype(dtype)
        d_q_BKHGT = einsum("BKHS,BKSGT->BKHGT", jnp.einsum("BSKH->BKHS", k), d_logits_BKSGT)
        d_qs.append(jnp.einsum("BKHGT->BTKGH", d_q_BKHGT.astype(dtype)))
        outside = ((0, 0), (0, 0), (keys.start, T - keys.stop), (0, 0))
        d_ks.append(jnp.pad(einsum("BKSGT,BKGTH->BKSH", d_logits_BKSGT, jnp.einsum("BTKGH->BKGTH", q)), outside))
        d_vs.append(jnp.pad(einsum("BKSGT,BKGTH->BKSH", weights_BKSGT, jnp.einsum("BTKGH->BKGTH", d_out)), outside))
    d_k_BTKH, d_v_BTKH = (jnp.einsum("BKTH->BTKH", sum(d_xs)) for d_xs in (d_ks, d_vs))
    return jnp.concatenate(d_qs, axis=1), d_k_BTKH.astype(k_BTKH.dtype), d_v_BTKH.astype(v_BTKH.dtype), None


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))
_attend.defvjp(_attend_forward, _attend_backward)
