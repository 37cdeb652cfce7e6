"""Every attention kernel against a plain softmax, in values and gradients; Pallas kernels interpreted."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.ops import splash as splash_kernel
from nextllm_jax.ops.attention import causal_attention
from nextllm_jax.ops.blockwise import blockwise_attention
from nextllm_jax.ops.cudnn import cudnn_attention
from nextllm_jax.ops.splash import default_blocks, splash_attention
from tests.ops.test_attention import inputs, reference, segments, value_and_gradients, visible


def blockwise(q, k, v, segment_ids_BS=None, **rule):
    return blockwise_attention(q, k, v, segment_ids_BS=segment_ids_BS, blocks=(32, 48), **rule)


def splash(q, k, v, segment_ids_BS=None, **rule):
    return splash_attention(q, k, v, segment_ids_BS=segment_ids_BS, blocks=(128, 256), interpret=True, **rule)


CASES = {  # T, N, K, H, documents, rule
    "plain": (130, 4, 2, 16, False, {}),
    "documents, window, one key head": (300, 3, 1, 8, True, {"window": 70}),
    "scale, soft cap, window of one": (33, 4, 4, 8, True, {"scale": 0.7, "soft_cap": 1.5, "window": 1}),
    "soft cap, three queries a key": (256, 6, 2, 24, True, {"soft_cap": 0.9, "window": 1000}),
}


@pytest.mark.parametrize("attend", [blockwise, splash])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference(attend, case):
    T, N, K, H, documents, rule = CASES[case]
    q, k, v, d_out = inputs(T=T, N=N, K=K, H=H)
    ids = segments(2, T) if documents else None
    ours = value_and_gradients(lambda q, k, v: attend(q, k, v, ids, **rule), q, k, v, d_out)
    seen = visible(2, T, rule.get("window"), ids)
    rest = {name: value for name, value in rule.items() if name != "window"}
    plain = value_and_gradients(lambda q, k, v: reference(q, k, v, seen, **rest), q, k, v, d_out)
    for mine, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("attend", [blockwise, splash])
def test_bfloat16_is_as_close_as_its_rounding(attend):
    q, k, v, d_out = inputs(T=130)
    plain = value_and_gradients(lambda q, k, v: reference(q, k, v, visible(2, 130)), q, k, v, d_out)
    ours = value_and_gradients(attend, *(x.astype(jnp.bfloat16) for x in (q, k, v, d_out)))
    for mine, other in zip(ours, plain, strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(mine.astype(jnp.float32), other, atol=0.06, rtol=0.06)


@pytest.mark.parametrize("attend", [causal_attention, blockwise, splash])
def test_another_document_does_not_change_a_bit(attend):
    T, cut = 300, 167
    q, k, v, d_out = inputs(T=T)
    ids = jnp.broadcast_to(jnp.where(jnp.arange(T) < cut, 1, 2), (2, T))
    name = "segment_ids_BT" if attend is causal_attention else "segment_ids_BS"
    run = functools.partial(value_and_gradients, lambda q, k, v: attend(q, k, v, **{name: ids}))
    here, there = run(q, k, v, d_out), run(*(x.at[:, :cut].multiply(-3.7) for x in (q, k, v, d_out)))
    for mine, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(mine[:, cut:], other[:, cut:])
        assert (mine[:, :cut] != other[:, :cut]).any()


@pytest.mark.parametrize("attend", [blockwise, splash])
@pytest.mark.parametrize("window", [None, 150])
def test_a_part_of_the_queries_sees_its_part_of_the_keys(attend, window):
    q, k, v, _ = inputs(T=256)
    ids = segments(2, 256)
    whole = reference(q, k, v, visible(2, 256, window, ids))
    part = jax.jit(lambda q, shard: attend(q, k, v, ids, window=window, shard=shard))
    for shard in (0, 1):
        rows = slice(128 * shard, 128 * (shard + 1))
        np.testing.assert_allclose(part(q[:, rows], shard), whole[:, rows], atol=2e-5)


def test_blockwise_needs_no_array_over_all_pairs():
    """Temporaries: with twice the length they double, and those of the plain kernel are four times as large."""

    def temporaries(attend, T):
        shapes = [jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32) for _ in range(4)]
        program = jax.jit(lambda q, k, v, d: jax.vjp(attend, q, k, v)[1](d)).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    short, long = (temporaries(blockwise, T) for T in (1024, 2048))
    assert long < 2.2 * short
    assert temporaries(causal_attention, 2048) > 10 * long


def test_splash_refuses_blocks_that_do_not_fit():
    q, k, v, _ = inputs(T=384)
    with pytest.raises(ValueError, match="100 and 128; they must be multiples of 128"):
        splash_attention(q, k, v, blocks=(100, 128))
    with pytest.raises(ValueError, match="192 queries of 384 positions are not divisible"):
        splash_attention(q[:, :192], k, v, blocks=(128, 128))
    assert all(block % 128 == 0 for kind in ("TPU v5", "TPU v6 lite", "cpu") for block in default_blocks(kind))


@pytest.mark.parametrize("window", [None, 1, 128, 129, 300])
def test_the_mask_of_splash_answers_for_whole_blocks_as_jax_does(window):
    settings = ((1024, 1024), (None if window is None else window - 1, 0), 0)
    ours, theirs = splash_kernel._Mask(*settings), splash_kernel.masks.LocalMask(*settings)
    for rows, columns in itertools.product(range(0, 1024, 256), range(0, 1024, 128)):
        block = (slice(rows, rows + 256), slice(columns, columns + 128))
        assert (ours[block].any(), ours[block].all()) == (theirs[block].any(), theirs[block].all())
        assert ours[block].size == 1 or ours[block].shape == (256, 128)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("documents", [False, True])
def test_cudnn_is_lowered_to_its_own_kernel_with_every_mask(monkeypatch, window, documents):
    """Nothing is run: there is no CUDA here."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)

    def gradients(q, k, v, ids):
        attend = functools.partial(cudnn_attention, segment_ids_BT=ids if documents else None, window=window)
        out, backward = jax.vjp(attend, q, k, v)
        return backward(out)

    shapes = [jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    traced = jax.jit(gradients).trace(*shapes, jax.ShapeDtypeStruct((2, 256), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')
    bias = "ScaleBias" if documents else ""
    assert re.findall(r"custom_call @(__cudnn\S+?)\(", text) == [
        f"__cudnn$fmha{bias}Softmax", f"__cudnn$fmha{bias}SoftmaxBackward"
    ]  # fmt: skip
    assert text.count('"mask_type": "CAUSAL"') == text.count(f'"sliding_window_length": {window or 0}') == 2


def test_cudnn_refuses_what_it_cannot_honour():
    q, k, v, _ = inputs(dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="no soft cap"):
        cudnn_attention(q, k, v, soft_cap=30.0)
    with pytest.raises(NotImplementedError, match="as many queries as keys"):
        cudnn_attention(q[:, :32], k, v)
