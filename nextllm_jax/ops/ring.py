"""Ring attention (Liu et al. 2023, arXiv:2310.01889): each device keeps its part of a sequence, and keys go around.

Every device meets its own keys first, then those of the device before it, and so on; while it computes, the keys for
the next turn are under way. It holds two parts of the keys at a time, whatever the length of the sequence. In the
backward pass the gradients of keys and values travel with them, in float32, and come home at the end.

The devices at the end of a causal sequence have more keys to meet than those at its beginning, which wait: n devices
take the time of n whole turns, nearly twice what an even division would take.

Dimension letters as in `ops.blockwise`; T is a device's part of the sequence.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nextllm_jax.ops.blockwise import (
    Backward,
    Blocks,
    Keys,
    Queries,
    finish,
    finish_gradients,
    gradients,
    join,
    meet_keys,
    no_gradients,
    no_keys,
    split,
)
from nextllm_jax.ops.scores import ScoreRule, group


def ring_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    blocks: tuple[int, int],
    axis_name: str,
) -> jax.Array:
    """`ops.attention.causal_attention` of sequences divided over a mesh axis, of which this device holds a part.

    Call it under `shard_map`, with equal parts. Names for `jax.checkpoint` as in `causal_attention`.
    """
    B, T, N, H = q_BTNH.shape
    ids_BT = jnp.zeros((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
    rule, sizes = ScoreRule.of(H, window, scale, soft_cap), Blocks(min(blocks[0], T), min(blocks[1], T))
    return _attend(rule, sizes, axis_name, group(q_BTNH, k_BTKH.shape[2]), k_BTKH, v_BTKH, ids_BT).reshape(B, T, N, H)


def _turns(rule: ScoreRule, axis_name: str, T: int) -> int:
    """How many parts of the keys a device meets: all, or those that its window reaches."""
    size = lax.axis_size(axis_name)
    return size if rule.window is None else min(size, 1 + -(-(rule.window - 1) // T))


def _pass_on(axis_name: str, x, steps: int = 1):
    size = lax.axis_size(axis_name)
    return lax.ppermute(x, axis_name, [(i, (i + steps) % size) for i in range(size)])


def _keys_at(axis_name: str, kv: tuple[jax.Array, jax.Array, jax.Array], T: int, turn: jax.Array) -> Keys:
    """The keys that are here at a turn, at their place in the sequence.

    Those of devices behind this one come around too, and lie after all queries: nothing of them is computed.
    """
    size = lax.axis_size(axis_name)
    k_mBSKH, v_mBSKH, ids_mBS = kv
    return Keys(k_mBSKH, v_mBSKH, ids_mBS, T, (lax.axis_index(axis_name) - turn) % size * T)


def _in_blocks(sizes: Blocks, axis_name: str, q_BTKGH, k_BTKH, v_BTKH, ids_BT):
    start = lax.axis_index(axis_name) * q_BTKGH.shape[1]
    queries = Queries(split(q_BTKGH, sizes.queries), split(ids_BT, sizes.queries), start)
    return queries, (split(k_BTKH, sizes.keys), split(v_BTKH, sizes.keys), split(ids_BT, sizes.keys))


def _attend_primal(rule: ScoreRule, sizes: Blocks, axis_name: str, q_BTKGH, k_BTKH, v_BTKH, ids_BT) -> jax.Array:
    return _attend_forward(rule, sizes, axis_name, q_BTKGH, k_BTKH, v_BTKH, ids_BT)[0]


def _attend_forward(rule: ScoreRule, sizes: Blocks, axis_name: str, q_BTKGH, k_BTKH, v_BTKH, ids_BT):
    T = q_BTKGH.shape[1]
    queries, kv = _in_blocks(sizes, axis_name, q_BTKGH, k_BTKH, v_BTKH, ids_BT)

    def turn(carry, number):
        kv, partial = carry
        passed_on = _pass_on(axis_name, kv)
        return (passed_on, meet_keys(rule, queries, _keys_at(axis_name, kv, T, number), partial)), None

    last = _turns(rule, axis_name, T) - 1
    (kv, partial), _ = lax.scan(turn, (kv, no_keys(queries)), jnp.arange(last))
    partial = meet_keys(rule, queries, _keys_at(axis_name, kv, T, jnp.asarray(last)), partial)
    out_nBTKGH, log_sum_nBKGT = finish(partial, q_BTKGH.dtype)
    out_BTKGH = checkpoint_name(join(out_nBTKGH, T), "attention_out")
    log_sum_nBKGT = checkpoint_name(log_sum_nBKGT, "attention_residuals")
    return out_BTKGH, (q_BTKGH, k_BTKH, v_BTKH, ids_BT, out_BTKGH, log_sum_nBKGT)


def _attend_backward(rule: ScoreRule, sizes: Blocks, axis_name: str, residuals, d_out_BTKGH):
    q_BTKGH, k_BTKH, v_BTKH, ids_BT, out_BTKGH, log_sum_nBKGT = residuals
    T = q_BTKGH.shape[1]
    queries, kv = _in_blocks(sizes, axis_name, q_BTKGH, k_BTKH, v_BTKH, ids_BT)
    backward = Backward.of(sizes.queries, out_BTKGH, d_out_BTKGH, log_sum_nBKGT)

    def turn(carry, number):
        kv, d_kv, d_q_nBKHGT = carry
        passed_on = _pass_on(axis_name, kv)
        d_q_nBKHGT, *more = gradients(rule, queries, _keys_at(axis_name, kv, T, number), backward, d_q_nBKHGT)
        d_kv = jax.tree.map(lambda total, x: total + x, d_kv, tuple(more))
        return (passed_on, _pass_on(axis_name, d_kv), d_q_nBKHGT), None

    turns = _turns(rule, axis_name, T)
    zeros = jnp.zeros_like(jnp.einsum("mBSKH->mBKSH", kv[0]), jnp.float32)
    carry = (kv, (zeros, zeros), no_gradients(queries))
    (_, d_kv, d_q_nBKHGT), _ = lax.scan(turn, carry, jnp.arange(turns))
    if turns < lax.axis_size(axis_name):
        d_kv = _pass_on(axis_name, d_kv, -turns)
    return *finish_gradients(q_BTKGH, k_BTKH, v_BTKH, d_q_nBKHGT, *d_kv), None


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0, 1, 2))
_attend.defvjp(_attend_forward, _attend_backward)
