"""Samples the next token of each row from its logits: small pure functions, and `sample`, which composes them.

Settings are arrays [B], so rows with any settings share a program. C is the number of candidates: all V tokens, or the
CANDIDATES most likely ones. Dropped candidates have the logit -inf.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_LEAST = float(jnp.finfo(jnp.float32).tiny)
"""The least positive float32; smaller settings would round to 0."""

CANDIDATES = 64
"""Rows with 0 < top_k <= CANDIDATES are sampled from their most likely tokens only, which is exact and much faster."""


class Settings(NamedTuple):
    """The settings of `SamplingConfig` that `sample` uses, [B] each."""

    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any


class Penalties(NamedTuple):
    """The settings of `SamplingConfig` that `penalized` uses, [B] each."""

    repetition_B: Any
    presence_B: Any
    frequency_B: Any


def mask_padding(logits: jax.Array, vocab_size: int) -> jax.Array:
    """The logits [..., V], with -inf for ids from the tokenizer's `vocab_size` on, which only pad the embedding."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < vocab_size, logits, -jnp.inf)


def only_allowed(logits_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
    """The logits of the tokens whose bit is set in `allowed_BW`, uint32 [B, ceil(V / 32)], the lowest bit first."""
    bits_BW32 = (allowed_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    bits_BV = bits_BW32.reshape(len(allowed_BW), -1)[:, : logits_BV.shape[-1]]
    return jnp.where(bits_BV == 1, logits_BV, -jnp.inf)


def penalized(logits_BV: jax.Array, in_prompt_BV: jax.Array, counts_BV: jax.Array, penalties: Penalties) -> jax.Array:
    """The logits with penalties for tokens in the prompt, and for tokens that the new text has `counts_BV` times.

    Logits of tokens in either are divided by the repetition penalty if positive, and multiplied by it if negative
    (Keskar et al. 2019, CTRL, arXiv:1909.05858, in the variant that keeps the sign). The presence penalty is subtracted
    once for tokens in the new text, and the frequency penalty as often as they occur there, as in the OpenAI API.
    """
    is_new_BV = counts_BV > 0
    penalty_B1 = penalties.repetition_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where(in_prompt_BV | is_new_BV, repeated_BV, logits_BV)
    return logits_BV - penalties.presence_B[:, None] * is_new_BV - penalties.frequency_B[:, None] * counts_BV


def temperature(logits_BC: jax.Array, value_B: jax.Array) -> jax.Array:
    """The logits divided by the temperature, which must be positive. Shifted to a maximum of 0 to avoid overflow."""
    return (logits_BC - logits_BC.max(-1, keepdims=True)) / jnp.maximum(value_B[:, None], _LEAST)


def top_k(logits_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """The logits of the k most likely tokens; of all if k is 0. Of equally likely tokens, the first are kept."""
    least_B1 = jnp.where(k_B == 0, logits_BV.shape[-1], k_B)[:, None].astype(jnp.float32)
    return _most_likely(logits_BV, jnp.ones_like(logits_BV), least_B1)


def top_p(logits_BC: jax.Array, p_B: jax.Array) -> jax.Array:
    """The logits of the smallest set of most likely tokens whose probabilities sum to at least p.

    Of equally likely tokens, the first ones are kept. Source: Holtzman et al. 2019, arXiv:1904.09751.
    """
    kept_BC = _most_likely(logits_BC, jax.nn.softmax(logits_BC, axis=-1), jnp.maximum(p_B[:, None], _LEAST))
    return jnp.where(p_B[:, None] < 1, kept_BC, logits_BC)


def _most_likely(logits_BC: jax.Array, weight_BC: jax.Array, least_B1: jax.Array) -> jax.Array:
    """The logits of the smallest set of most likely tokens whose weights sum to at least `least`.

    Equal logits must have equal weights. The smallest logit to keep is found by bisection over its bits. Sorting would
    take eight times as long on a CPU (92 ms instead of 12 ms for 8 rows of 50,304).
    """
    bits_BC = jax.lax.bitcast_convert_type(logits_BC, jnp.uint32)
    negative_BC = (bits_BC >> 31).astype(bool)
    order_BC = jnp.where(negative_BC, ~bits_BC, bits_BC | jnp.uint32(1 << 31))  # ascends with the logit

    def sum_of(kept_BC: jax.Array) -> jax.Array:
        return jnp.sum(weight_BC, axis=-1, keepdims=True, where=kept_BC)

    def set_bit(i: jax.Array, lowest_B1: jax.Array) -> jax.Array:
        candidate_B1 = lowest_B1 | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(sum_of(order_BC >= candidate_B1) >= least_B1, candidate_B1, lowest_B1)

    lowest_B1 = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros_like(order_BC[:, :1]))
    above_BC, equal_BC = order_BC > lowest_B1, order_BC == lowest_B1
    weight_B1 = jnp.max(weight_BC, axis=-1, keepdims=True, where=equal_BC, initial=_LEAST)
    missing_B1 = jnp.ceil((least_B1 - sum_of(above_BC)) / weight_B1)
    keep_BC = above_BC | (equal_BC & (jnp.cumsum(equal_BC, axis=-1) <= missing_B1))
    return jnp.where(keep_BC, logits_BC, -jnp.inf)


def top_p_of_sorted(logits_BC: jax.Array, p_B: jax.Array) -> jax.Array:
    """`top_p` for logits in descending order."""
    probability_BC = jax.nn.softmax(logits_BC, axis=-1)
    before_BC = jnp.cumsum(probability_BC, axis=-1) - probability_BC
    p_B1 = p_B[:, None]
    return jnp.where((before_BC < jnp.maximum(p_B1, _LEAST)) | (p_B1 >= 1), logits_BC, -jnp.inf)


def min_p(logits_BC: jax.Array, p_B: jax.Array) -> jax.Array:
    """The logits of tokens at least p times as likely as the most likely one (Nguyen et al., arXiv:2407.01082)."""
    least_B1 = logits_BC.max(-1, keepdims=True) + jnp.log(p_B[:, None])
    return jnp.where(logits_BC >= least_B1, logits_BC, -jnp.inf)


def row_keys(seed_B: jax.Array, sample_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """One random key per row, from the seed, the index among the prompt's samples, and the position of the new token.

    The batch index is not folded in, so a row's text does not depend on the other rows.
    """

    def key(seed: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)

    return jax.vmap(key)(seed_B, sample_B, position_B)


def draw(logits_BC: jax.Array, ids_BC: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Token ids [B], each sampled from softmax(logits) with its row's key (the Gumbel-max trick).

    The noise is a function of the token's id, not of its rank. So it does not change if rounding, in a batch of another
    size, swaps the ranks of two candidates.
    """
    token_noise = jax.vmap(lambda key, id: jax.random.gumbel(jax.random.fold_in(key, id)), in_axes=(None, 0))
    noise_BC = jax.vmap(token_noise)(keys_B, ids_BC)
    best_B = jnp.argmax(logits_BC + noise_BC, axis=-1)
    return jnp.take_along_axis(ids_BC, best_B[:, None], axis=-1)[:, 0]


def sample(logits_BV: jax.Array, settings: Settings, keys_B: jax.Array) -> jax.Array:
    """Token ids [B], int32, sampled from logits [B, V]. A row with temperature 0 takes the most likely token.

    If no row draws, nothing but the maximum is computed. If all rows that draw have 0 < top_k <= CANDIDATES, only these
    candidates are processed. Both give the same tokens as the general computation.
    """
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    draws_B = settings.temperature_B > 0
    wide_B = draws_B & ((settings.top_k_B == 0) | (settings.top_k_B > CANDIDATES))

    def drawn() -> jax.Array:
        drawn_B = jax.lax.cond(jnp.any(wide_B), _draw_from_all, _draw_from_few, logits_BV, settings, keys_B)
        return jnp.where(draws_B, drawn_B.astype(jnp.int32), likeliest_B)

    return jax.lax.cond(jnp.any(draws_B), drawn, lambda: likeliest_B)


def _draw_from_few(logits_BV: jax.Array, settings: Settings, keys_B: jax.Array) -> jax.Array:
    logits_BC, ids_BC = jax.lax.top_k(logits_BV, min(CANDIDATES, logits_BV.shape[-1]))
    logits_BC = jnp.where(jnp.arange(logits_BC.shape[-1])[None] < settings.top_k_B[:, None], logits_BC, -jnp.inf)
    logits_BC = temperature(logits_BC, settings.temperature_B)
    return draw(min_p(top_p_of_sorted(logits_BC, settings.top_p_B), settings.min_p_B), ids_BC, keys_B)


def _draw_from_all(logits_BV: jax.Array, settings: Settings, keys_B: jax.Array) -> jax.Array:
    truncated_BV = jax.lax.cond(jnp.any(settings.top_k_B > 0), top_k, lambda x, _: x, logits_BV, settings.top_k_B)
    logits_BV = temperature(truncated_BV, settings.temperature_B)
    logits_BV = jax.lax.cond(jnp.any(settings.top_p_B < 1), top_p, lambda x, _: x, logits_BV, settings.top_p_B)
    ids_BV = jnp.broadcast_to(jnp.arange(logits_BV.shape[-1])[None], logits_BV.shape)
    return draw(min_p(logits_BV, settings.min_p_B), ids_BV, keys_B)
