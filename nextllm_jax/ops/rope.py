"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split as in Llama checkpoints.

Frequencies are float32 constants of the trace. Positions are int32 and angles float32, since bfloat16 cannot tell
position 256 from 257.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """float32 [H/2]: radians per position of each pair of dimensions, theta^(-2i/H)."""
    return (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)).astype(np.float32)


def scale_linear(frequencies_h: np.ndarray, factor: float) -> np.ndarray:
    """float32 [H/2]: every frequency divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""
    return (frequencies_h / factor).astype(np.float32)


def scale_llama3(
    frequencies_h: np.ndarray,
    factor: float,
    *,
    original_context_length: int,
    low_freq_factor: float,
    high_freq_factor: float,
) -> np.ndarray:
    """float32 [H/2]: long wavelengths divided by `factor`, short ones unchanged, and a linear blend between them.

    Source: the Llama 3.1 release; wavelengths are measured in original context lengths.
    """
    rotations = original_context_length * frequencies_h / (2 * math.pi)
    kept = np.clip((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (kept * frequencies_h + (1 - kept) * frequencies_h / factor).astype(np.float32)


def scale_yarn(
    frequencies_h: np.ndarray,
    factor: float,
    *,
    theta: float,
    original_context_length: int,
    beta_fast: float,
    beta_slow: float,
) -> np.ndarray:
    """float32 [H/2]: YaRN's blend of unchanged and divided frequencies (Peng et al. 2023, arXiv:2309.00071).

    The ramp runs over dimension indices, between those that rotate `beta_fast` and `beta_slow` times in the original
    context. `yarn_attention_factor` is YaRN's factor on cosine and sine.
    """
    half = len(frequencies_h)

    def index_of(rotations: float) -> float:
        return half * math.log(original_context_length / (rotations * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(index_of(beta_fast)), 0)
    high = min(math.ceil(index_of(beta_slow)), 2 * half - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return ((1 - ramp) * frequencies_h + ramp * frequencies_h / factor).astype(np.float32)


def yarn_attention_factor(factor: float) -> float:
    """YaRN's factor on cosine and sine, 0.1 ln(factor) + 1."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def scale_longrope(frequencies_h: np.ndarray, factors: Sequence[float]) -> np.ndarray:
    """float32 [H/2]: each frequency divided by its own factor (Ding et al. 2024, arXiv:2402.13753)."""
    return (frequencies_h / np.asarray(factors, np.float64)).astype(np.float32)


def longrope_attention_factor(factor: float, original_context_length: int) -> float:
    """LongRoPE's factor on cosine and sine, sqrt(1 + ln(factor) / ln(original context))."""
    return math.sqrt(1 + math.log(factor) / math.log(original_context_length)) if factor > 1 else 1.0


def cos_sin(
    positions_BT: jax.Array, frequencies_h: np.ndarray, attention_factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, H/2], of int32 positions."""
    angles_BTh = positions_BT.astype(jnp.float32)[..., None] * frequencies_h[None, None, :]
    return jnp.cos(angles_BTh) * attention_factor, jnp.sin(angles_BTh) * attention_factor


def apply_rope(x_BTNH: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
    """`x` with dimensions i and i + H/2 rotated as pairs. Computed in float32, returned in the dtype of `x`.

    With fewer than H/2 cosines and sines, only the leading dimensions are rotated.
    """
    rotary_dim = 2 * cos_BTh.shape[-1]
    if rotary_dim < x_BTNH.shape[-1]:
        rotated = apply_rope(x_BTNH[..., :rotary_dim], cos_BTh, sin_BTh)
        return jnp.concatenate([rotated, x_BTNH[..., rotary_dim:]], axis=-1)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTh[:, :, None, :], sin_BTh[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
