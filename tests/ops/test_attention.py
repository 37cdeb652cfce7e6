"""Attention against a plain softmax, in values and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.ops.attention import cached_attention, causal_attention


def reference(q_BTNH, k_BSKH, v_BSKH, visible_BTS, scale=None, soft_cap=None):
    """Softmax over visible keys in float32, with repeated key heads."""
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x, group, axis=2) for x in (k_BSKH, v_BSKH))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * (scale or q_BTNH.shape[-1] ** -0.5)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v_BSNH)


def visible(B: int, T: int, window: int | None = None, segment_ids_BT: jax.Array | None = None) -> Any:
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    seen = (distance >= 0) & (distance < (window or T))
    seen = np.broadcast_to(seen, (B, T, T))
    return seen if segment_ids_BT is None else seen & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def inputs(B=2, T=64, N=4, K=2, H=16, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K, N)]


def segments(B, T, seed=0):
    return jnp.asarray(np.sort(np.random.default_rng(seed).integers(1, 5, size=(B, T)), axis=1))


def as_cached(x_BSKH):
    """[B, K, S, H], as the cache has it."""
    return jnp.swapaxes(x_BSKH, 1, 2)


def value_and_gradients(attend, q, k, v, d_out):
    def both(q, k, v, d_out):
        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(d_out)

    return jax.jit(both)(q, k, v, d_out)


@pytest.mark.parametrize(
    ("T", "packed", "window"),
    [(5, True, 2), (64, False, None), (131, True, None), (131, False, 7), (131, True, 100), (259, True, 150)],
)
def test_values_and_gradients_equal_the_reference(T, packed, window):
    q, k, v, d_out = inputs(T=T)
    ids = segments(2, T) if packed else None
    ours = value_and_gradients(
        lambda q, k, v: causal_attention(q, k, v, segment_ids_BT=ids, window=window), q, k, v, d_out
    )
    seen = visible(2, T, window, ids)
    plain = value_and_gradients(lambda q, k, v: reference(q, k, v, seen), q, k, v, d_out)
    for mine, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", [{"scale": 0.7}, {"soft_cap": 1.5}, {"scale": 0.4, "soft_cap": 0.9}])
@pytest.mark.parametrize("window", [None, 30])
def test_scale_and_soft_cap_in_values_and_gradients(rule, window):
    q, k, v, d_out = inputs(T=131)
    ids = segments(2, 131)
    ours = value_and_gradients(
        lambda q, k, v: causal_attention(q, k, v, segment_ids_BT=ids, window=window, **rule), q, k, v, d_out
    )
    seen = visible(2, 131, window, ids)
    plain = value_and_gradients(lambda q, k, v: reference(q, k, v, seen, **rule), q, k, v, d_out)
    for mine, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", [{"scale": 0.7}, {"scale": 0.4, "soft_cap": 0.9}])
def test_cached_attention_has_the_same_scale_and_soft_cap(rule):
    q, k, v, _ = inputs(T=12)
    positions_BT = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    cached = cached_attention(q, as_cached(k), as_cached(v), positions_BT=positions_BT, window=5, **rule)
    np.testing.assert_allclose(cached, reference(q, k, v, visible(2, 12, 5), **rule), atol=1e-5)


@pytest.mark.parametrize(("N", "K"), [(4, 4), (6, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("T", [1, 33])
def test_head_groups_in_both_types(N, K, T):
    """bfloat16 also because some layouts of its products fail only when they run, on a CPU."""
    q, k, v, d_out = inputs(T=T, N=N, K=K)
    seen = visible(2, T)
    plain = value_and_gradients(lambda q, k, v: reference(q, k, v, seen), q, k, v, d_out)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.06)):
        ours = value_and_gradients(causal_attention, *(x.astype(dtype) for x in (q, k, v, d_out)))
        for mine, other in zip(ours, plain, strict=True):
            assert mine.dtype == dtype
            np.testing.assert_allclose(mine.astype(jnp.float32), other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("B", "T", "N", "K"), [(1, 65, 2, 1), (2, 130, 4, 4), (2, 2, 4, 2)])
def test_more_shapes_run_in_bfloat16(B, T, N, K):
    q, k, v, d_out = inputs(B=B, T=T, N=N, K=K, dtype=jnp.bfloat16)
    ours = value_and_gradients(causal_attention, q, k, v, d_out)
    assert all(bool(jnp.isfinite(x).all()) for x in ours)


def test_no_position_depends_on_a_later_one():
    q, k, v, _ = inputs(B=1, T=130, N=2, K=1, H=8)

    def outputs(k, v):
        return causal_attention(q, k, v).sum(axis=(0, 2, 3))

    for d_TBSKH in jax.jit(jax.jacrev(outputs, argnums=(0, 1)))(k, v):
        d_TS = np.abs(np.asarray(d_TBSKH)).sum(axis=(1, 3, 4))
        assert (d_TS[np.triu_indices(130, k=1)] == 0).all()
        assert (d_TS[np.tril_indices(130)] > 0)[1:].all()  # the first position's only key has no gradient


def test_documents_are_isolated_exactly():
    T, cut = 130, 67
    q, k, v, d_out = inputs(T=T)
    ids = jnp.broadcast_to(jnp.where(jnp.arange(T) < cut, 1, 2), (2, T))
    d_out = d_out.at[:, :cut].set(0)
    packed, d_q, d_k, d_v = value_and_gradients(
        lambda q, k, v: causal_attention(q, k, v, segment_ids_BT=ids), q, k, v, d_out
    )
    for gradient in (d_q, d_k, d_v):
        assert (gradient[:, :cut] == 0).all()
        assert (gradient[:, cut:] != 0).any()

    alone = jax.jit(causal_attention)(q[:, cut:], k[:, cut:], v[:, cut:])
    np.testing.assert_allclose(packed[:, cut:], alone, atol=2e-6)


def test_an_array_over_all_pairs_is_not_kept_for_the_backward_pass():
    q, k, v, _ = inputs(B=1, T=256, N=2, K=2)
    _, backward = jax.jit(lambda q, k, v: jax.vjp(causal_attention, q, k, v))(q, k, v)
    assert max(x.size for x in jax.tree.leaves(backward)) <= q.size


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("N", "K"), [(4, 2), (4, 1)])
def test_cached_attention_equals_the_reference_at_any_offset(N, K, window):
    S, T = 48, 7
    q, k, v, _ = inputs(B=3, T=S, N=N, K=K)
    positions_BT = jnp.arange(T)[None, :] + jnp.asarray([0, 11, S - T])[:, None]
    q_BTNH = jnp.take_along_axis(q, positions_BT[:, :, None, None], axis=1)
    whole = jax.jit(reference)(q, k, v, visible(3, S, window))
    expected = jnp.take_along_axis(whole, positions_BT[:, :, None, None], axis=1)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
        attend = jax.jit(lambda q, k, v: cached_attention(q, k, v, positions_BT=positions_BT, window=window))
        out = attend(*(x.astype(dtype) for x in (q_BTNH, as_cached(k), as_cached(v))))
        assert out.dtype == dtype
        np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=tolerance)


@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_cached_query_ignores_what_later_slots_hold(B, dtype):
    q, k, v, _ = inputs(B=B, T=40, dtype=dtype)
    positions_BT = jnp.full((B, 1), 9)
    attend = jax.jit(lambda k, v: cached_attention(q[:, :1], as_cached(k), as_cached(v), positions_BT=positions_BT))
    out, junk = attend(k, v), attend(k.at[:, 10:].set(99), v.at[:, 10:].set(99))
    np.testing.assert_array_equal(out.astype(jnp.float32), junk.astype(jnp.float32))
    seen = np.broadcast_to(np.arange(40) <= 9, (B, 1, 40))
    q, k, v = (x.astype(jnp.float32) for x in (q[:, :1], k, v))
    expected = reference(q, k, v, seen)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=1e-5 if dtype == jnp.float32 else 0.05)
