"""Rotary positions: frequencies and their scalings, angles, and what a rotation keeps."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import ModelConfig
from nextllm_jax.diagnostics import reference
from nextllm_jax.model.transformer import rope_cos_sin
from nextllm_jax.ops import rope

PUBLISHED: dict[str, dict[str, Any]] = {
    "llama3_8b": {"head_dim": 128, "rope_theta": 500_000.0},
    "llama3.1_8b": {"head_dim": 128, "rope_theta": 500_000.0, "rope_scaling": "llama3", "rope_scaling_factor": 8.0},
    "llama3.2_1b": {"head_dim": 64, "rope_theta": 500_000.0, "rope_scaling": "llama3", "rope_scaling_factor": 32.0},
    "qwen2.5_yarn": {
        "head_dim": 128,
        "rope_theta": 1_000_000.0,
        "rope_scaling": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_original_context_length": 32_768,
    },
    "yarn_short_context": {
        "head_dim": 16,
        "rope_scaling": "yarn",
        "rope_scaling_factor": 2.0,
        "rope_original_context_length": 64,
    },
    "linear": {"head_dim": 64, "rope_scaling": "linear", "rope_scaling_factor": 4.0},
}


def at(*positions: int) -> jnp.ndarray:
    return jnp.asarray([positions], jnp.int32)


def rotated(x_BTNH: np.ndarray, position: int, frequencies: np.ndarray) -> np.ndarray:
    cos_sin = rope.cos_sin(jnp.full(x_BTNH.shape[:2], position, jnp.int32), frequencies)
    return np.asarray(rope.apply_rope(jnp.asarray(x_BTNH), *cos_sin))


def random_heads(seed: int, head_dim: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 3, 4, head_dim)).astype(np.float32)


@pytest.mark.parametrize("case", PUBLISHED)
def test_angles_of_published_models_follow_the_papers(case: str) -> None:
    config = ModelConfig(**PUBLISHED[case])
    frequencies, attention_factor = reference.rope_frequencies(config)
    cos, sin = rope_cos_sin(config, at(0, 1, 100))
    angles = np.array([0, 1, 100])[:, None] * frequencies
    np.testing.assert_allclose(cos[0], attention_factor * np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin[0], attention_factor * np.sin(angles), atol=1e-5)


def test_frequencies_fall_from_one_towards_one_over_theta() -> None:
    np.testing.assert_allclose(rope.frequencies(8, 10_000.0), [1, 0.1, 0.01, 0.001], rtol=1e-6)


def test_linear_scaling_divides_positions() -> None:
    frequencies = rope.frequencies(16, 10_000.0)
    plain = rope.cos_sin(at(5), frequencies)
    scaled = rope.cos_sin(at(20), rope.scale_linear(frequencies, 4.0))
    np.testing.assert_allclose(scaled, plain, atol=1e-6)


def test_llama3_scaling_keeps_short_wavelengths_and_divides_long_ones() -> None:
    frequencies = rope.frequencies(128, 500_000.0)
    scaled = rope.scale_llama3(
        frequencies, 8.0, original_context_length=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )
    wavelengths = 2 * np.pi / frequencies
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    np.testing.assert_array_equal(scaled[short], frequencies[short])
    np.testing.assert_allclose(scaled[long], frequencies[long] / 8, rtol=1e-6)
    between = scaled[~short & ~long] / frequencies[~short & ~long]
    assert len(between) > 2
    assert np.all((between > 1 / 8) & (between < 1))
    assert np.all(np.diff(between) < 0)


def test_yarn_scaling_keeps_the_first_pairs_and_divides_the_last() -> None:
    frequencies = rope.frequencies(128, 10_000.0)
    scaled = rope.scale_yarn(
        frequencies, 4.0, theta=10_000.0, original_context_length=4096, beta_fast=32.0, beta_slow=1.0
    )
    # 128 ln(4096 / 2 pi r) / (2 ln 10000) is 20.9 pairs for r = 32 rotations, 45.03 for 1.
    np.testing.assert_array_equal(scaled[:21], frequencies[:21])
    np.testing.assert_allclose(scaled[46:], frequencies[46:] / 4, rtol=1e-6)
    np.testing.assert_allclose(scaled[33] / frequencies[33], 1 - 13 / 26 * 0.75, rtol=1e-6)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 1.0), (4.0, 1.138629), (32.0, 1.346574)])
def test_yarn_attention_factor(factor: float, expected: float) -> None:
    np.testing.assert_allclose(rope.yarn_attention_factor(factor), expected, rtol=1e-6)


def test_rotation_multiplies_half_split_pairs_as_complex_numbers() -> None:
    x_BTNH, frequencies = random_heads(0), rope.frequencies(16, 10_000.0)
    turned = (x_BTNH[..., :8] + 1j * x_BTNH[..., 8:]) * np.exp(1j * 7 * frequencies)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotated(x_BTNH, 7, frequencies), expected, atol=1e-5)


def test_position_zero_changes_nothing() -> None:
    x_BTNH = random_heads(0)
    np.testing.assert_array_equal(rotated(x_BTNH, 0, rope.frequencies(16, 10_000.0)), x_BTNH)


def test_scores_depend_on_the_distance_alone() -> None:
    q, k, frequencies = random_heads(0), random_heads(1), rope.frequencies(16, 10_000.0)
    near = np.sum(rotated(q, 9, frequencies) * rotated(k, 4, frequencies), axis=-1)
    far = np.sum(rotated(q, 109, frequencies) * rotated(k, 104, frequencies), axis=-1)
    np.testing.assert_allclose(far, near, atol=2e-4)
    other = np.sum(rotated(q, 10, frequencies) * rotated(k, 4, frequencies), axis=-1)
    assert np.abs(other - near).max() > 0.1


def test_bfloat16_heads_are_turned_by_exact_positions_and_stay_bfloat16() -> None:
    """bfloat16 positions could not tell 256 from 257."""
    x_BTNH = jnp.ones((1, 2, 1, 16), jnp.bfloat16)
    turned = rope.apply_rope(x_BTNH, *rope.cos_sin(at(256, 257), rope.frequencies(16, 10_000.0)))
    assert turned.dtype == jnp.bfloat16
    expected = [np.cos(position) - np.sin(position) for position in (256, 257)]
    np.testing.assert_allclose(np.asarray(turned[0, :, 0, 0], np.float32), expected, atol=0.01)
