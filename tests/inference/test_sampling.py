"""Each transform against numpy, and the sampler against the distribution that it should draw from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nextllm_jax.config import SamplingConfig
from nextllm_jax.inference import sampling

top_p = jax.jit(lambda logits, p: sampling.top_p(logits, jnp.full(len(logits), p)))
LOGITS = arrays(np.float32, (2, 12), elements=st.integers(-6, 6).map(lambda tenth: np.float32(tenth / 2)))


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def kept(logits: jax.Array) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(logits)]


@jax.jit
def of_rows(logits, settings, keys):
    return sampling.sample(logits, settings, keys)


def sample(logits, keys, config: SamplingConfig, vocab_size: int) -> jax.Array:
    """The tokens of rows with the same settings."""
    values = (config.temperature, config.top_k, config.top_p, config.min_p)
    kinds = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    rows = (jnp.full(len(logits), value, kind) for value, kind in zip(values, kinds, strict=True))
    return of_rows(sampling.mask_padding(logits, vocab_size), sampling.Settings(*rows), keys)


def keys(count: int, *, seed: int = 0) -> jax.Array:
    return sampling.row_keys(
        jnp.full(count, seed, jnp.uint32), jnp.zeros(count, jnp.int32), jnp.arange(count, dtype=jnp.int32)
    )


@settings(max_examples=40, deadline=None)
@given(LOGITS, st.sampled_from([0.013, 0.1, 0.37, 0.5003, 0.77, 0.9, 0.981]))
def test_top_p_keeps_the_least_set(logits, p):
    out = top_p(jnp.asarray(logits), p)
    for row, got in zip(logits.astype(np.float64), kept(out), strict=True):
        order = np.argsort(-row, kind="stable")
        total = np.cumsum(softmax(row)[order])
        count = int(np.argmax(total >= p)) + 1
        if abs(total[count - 1] - p) > 1e-6 and (count < 2 or abs(total[count - 2] - p) > 1e-6):
            assert got == set(order[:count].tolist())
            (of_sorted,) = kept(sampling.top_p_of_sorted(jnp.asarray(row[order][None], jnp.float32), jnp.full(1, p)))
            assert of_sorted == set(range(count))


def test_top_p_takes_the_first_of_equal_tokens():
    assert kept(top_p(jnp.zeros((1, 10)), 0.45)) == [{0, 1, 2, 3, 4}]


def test_top_p_always_keeps_one():
    assert kept(top_p(jnp.asarray([[0.0, 40.0, 1.0]]), 1e-6)) == [{1}]


@settings(max_examples=20, deadline=None)
@given(LOGITS, st.sampled_from([0.05, 0.2, 0.71, 1.0]))
def test_min_p_is_a_share_of_the_most_likely(logits, p):
    for row, got in zip(logits, kept(sampling.min_p(jnp.asarray(logits), jnp.full(len(logits), p))), strict=True):
        probabilities = softmax(row.astype(np.float64))
        assert got == set(np.flatnonzero(probabilities >= p * probabilities.max() * (1 - 1e-6)).tolist())


@settings(max_examples=40, deadline=None)
@given(LOGITS, st.integers(0, 14))
def test_top_k_keeps_the_first_of_the_most_likely(logits, k):
    out = sampling.top_k(jnp.asarray(logits), jnp.full(len(logits), k))
    for row, got in zip(logits, kept(out), strict=True):
        assert got == set(np.argsort(-row, kind="stable")[: k or None].tolist())


def test_penalties_count_what_is_in_the_prompt_and_in_the_text():
    logits = np.array([[2.0, -2.0, 3.0, -3.0, 1.0]], np.float32)
    in_prompt, counts = np.array([[True, True, False, False, False]]), np.array([[0, 2, 0, 0, 3]])
    expected = [2 / 1.5, -2 * 1.5 - 0.25 - 2 * 0.1, 3, -3, 1 / 1.5 - 0.25 - 3 * 0.1]
    penalties = sampling.Penalties(*(jnp.asarray([value]) for value in (1.5, 0.25, 0.1)))
    np.testing.assert_allclose(
        sampling.penalized(jnp.asarray(logits), in_prompt, counts, penalties)[0], expected, rtol=1e-6
    )


def test_temperature_scales_differences_and_does_not_overflow():
    scaled = sampling.temperature(jnp.asarray([[1.0, 2.0, 4.0]]), jnp.asarray([0.5]))
    np.testing.assert_allclose(scaled, [[-6, -4, 0]])
    out = np.asarray(sampling.temperature(jnp.asarray([[100.0, 99.0]]), jnp.asarray([1e-30])))
    assert out[0, 0] == 0
    assert not np.isnan(out).any()


SMALL = [
    {"top_p": 1e-46},
    {"top_p": 1e-46, "top_k": 3},
    {"top_p": 1e-40},
    {"temperature": 1e-46},
    {"temperature": 1e-40},
]


@pytest.mark.parametrize("settings", SMALL, ids=str)
def test_settings_that_float32_rounds_to_zero_take_the_likeliest(settings):
    config = SamplingConfig(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings})
    logits = jnp.asarray([[0.0, 3, 1, 2], [9, 7, 8, 0], [1, 2, 3, 9]])
    assert sample(logits, keys(3), config, 3).tolist() == [1, 0, 2]


def test_draws_follow_the_probabilities():
    logits = jnp.asarray([0.0, 1.0, 2.0, -jnp.inf])
    count = 4000
    ids = sampling.draw(
        jnp.broadcast_to(logits[None], (count, 4)), jnp.broadcast_to(jnp.arange(4)[None], (count, 4)), keys(count)
    )
    shares = np.bincount(np.asarray(ids), minlength=4) / count
    np.testing.assert_allclose(shares, softmax(np.asarray(logits)), atol=0.03)  # 4 standard deviations
    assert shares[3] == 0


def test_draw_does_not_depend_on_the_order_of_candidates():
    logits = jax.random.normal(jax.random.key(1), (16, 50))
    ids = jnp.broadcast_to(jnp.arange(50)[None], (16, 50))
    order = np.random.default_rng(0).permutation(50)
    np.testing.assert_array_equal(
        sampling.draw(logits, ids, keys(16)), sampling.draw(logits[:, order], ids[:, order], keys(16))
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_vocabulary_is_never_sampled(temperature):
    logits = jnp.zeros((8, 40)).at[:, 30:].set(50.0)
    config = SamplingConfig(temperature=temperature, top_k=0, top_p=1.0)
    assert int(sample(logits, keys(8), config, 30).max()) < 30


def test_sampler_composes_the_transforms():
    logits = jax.random.normal(jax.random.key(2), (300, 20)) * 0.1 + jnp.arange(20.0)[None] / 4
    greedy = sample(logits, keys(300), SamplingConfig(temperature=0), 20)
    np.testing.assert_array_equal(greedy, jnp.argmax(logits, axis=-1))
    narrow = [
        SamplingConfig(temperature=1.0, top_k=1, top_p=1.0),
        SamplingConfig(temperature=1.0, top_k=0, top_p=1e-4),
        SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, min_p=1.0),
    ]
    for config in narrow:
        np.testing.assert_array_equal(sample(logits, keys(300), config, 20), greedy)
    wide = sample(logits, keys(300), SamplingConfig(temperature=1.0, top_k=0, top_p=1.0), 20)
    assert len(set(wide.tolist())) > 10
    three = sample(logits, keys(300), SamplingConfig(temperature=50.0, top_k=3, top_p=1.0), 20)
    allowed = np.argsort(-np.asarray(logits), axis=-1)[:, :3]
    assert all(token in row for token, row in zip(three.tolist(), allowed.tolist(), strict=True))


def test_rows_that_need_the_whole_vocabulary_do_not_change_the_others():
    """Candidates and the whole vocabulary give the same tokens."""
    logits = jax.random.normal(jax.random.key(3), (40, 300)) * 3
    few = SamplingConfig(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01)
    settings = sampling.Settings(jnp.full(40, 0.8), jnp.full(40, 50), jnp.full(40, 0.95), jnp.full(40, 0.01))
    wide = settings._replace(top_k_B=settings.top_k_B.at[7].set(0))
    alone = sample(logits, keys(40), few, 300)
    together = of_rows(logits, wide, keys(40))
    np.testing.assert_array_equal(np.delete(together, 7), np.delete(alone, 7))
