"""Sampling of one token in numpy, in float64; only the noise is jax's."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nextllm_jax.config import SamplingConfig


def next_token(
    logits: Any, prompt: Sequence[int], new: Sequence[int], sampling: SamplingConfig, key: tuple[int, int, int]
) -> int:
    """The token after a prompt and new tokens, from logits [V]; `key` is (seed, sample, position)."""
    logits_V = np.array(logits, np.float64)
    V = len(logits_V)
    penalty = np.where(np.isin(np.arange(V), [*prompt, *new]), sampling.repetition_penalty, 1)
    logits_V = np.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    counts_V = np.bincount(np.asarray(new, int), minlength=V)
    logits_V -= sampling.presence_penalty * (counts_V > 0) + sampling.frequency_penalty * counts_V
    for token, bias in sampling.biases.items():
        logits_V[token] += bias
    if sampling.temperature == 0:
        return int(np.argmax(logits_V))
    order = np.argsort(-logits_V, kind="stable")[: sampling.top_k or None]
    scaled = logits_V[order] / sampling.temperature
    probabilities = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    is_kept = (np.cumsum(probabilities) - probabilities < sampling.top_p) | (sampling.top_p == 1)
    is_kept &= probabilities >= sampling.min_p * probabilities.max()
    kept_V = np.full(V, -np.inf)
    kept_V[order[is_kept]] = scaled[is_kept]
    seed, sample, position = key
    key_of_row = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
    noise_V = jax.vmap(lambda id: jax.random.gumbel(jax.random.fold_in(key_of_row, id)))(jnp.arange(V))
    return int(np.argmax(kept_V + np.asarray(noise_V)))
