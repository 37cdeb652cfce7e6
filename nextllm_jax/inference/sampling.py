"""Samples the next token from logits: small pure functions, and `sample`, which composes them.

C is the number of candidates: all V tokens, or the k that top_k keeps. Dropped candidates have the logit -inf.
"""

import jax
import jax.numpy as jnp

from nextllm_jax.config import SamplingConfig

_LEAST = float(jnp.finfo(jnp.float32).tiny)
"""The least positive float32; smaller settings would round to 0."""


def mask_padding(logits_BV: jax.Array, vocab_size: int) -> jax.Array:
    """The logits, with -inf for ids from the tokenizer's `vocab_size` on, which only pad the embedding."""
    return jnp.where(jnp.arange(logits_BV.shape[-1])[None] < vocab_size, logits_BV, -jnp.inf)


def repetition_penalty(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """The logits; those of seen tokens are divided by the penalty if positive, and multiplied by it if negative.

    Source: Keskar et al. 2019, CTRL, arXiv:1909.05858, in the variant that keeps the sign of a logit.
    """
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def temperature(logits_BC: jax.Array, value: float) -> jax.Array:
    """The logits divided by the temperature, which must be positive. Shifted to a maximum of 0 to avoid overflow."""
    return (logits_BC - logits_BC.max(-1, keepdims=True)) / jnp.maximum(value, _LEAST)


def top_k(logits_BV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Logits and ids, each [B, C], of the k most likely tokens in descending order; of all V in order of id if k is 0.

    Later stages then process k numbers instead of V.
    """
    V = logits_BV.shape[-1]
    if k == 0 or k >= V:
        return logits_BV, jnp.broadcast_to(jnp.arange(V)[None], logits_BV.shape)
    logits_BC, ids_BC = jax.lax.top_k(logits_BV, k)
    return logits_BC, ids_BC


def top_p(logits_BC: jax.Array, p: float) -> jax.Array:
    """The logits of the smallest set of most likely tokens whose probabilities sum to at least p.

    Of equally likely tokens, the first ones are kept. The smallest probability to keep is found by bisection over its
    bits, since positive floats are ordered like their bits. Sorting would take eight times as long on a CPU (92 ms
    instead of 12 ms for 8 rows of 50,304). Source: Holtzman et al. 2019, arXiv:1904.09751.
    """
    least_mass = jnp.maximum(p, _LEAST)
    probability_BC = jax.nn.softmax(logits_BC, axis=-1)
    bits_BC = jax.lax.bitcast_convert_type(probability_BC, jnp.int32)

    def mass(kept_BC: jax.Array) -> jax.Array:
        return jnp.sum(probability_BC, axis=-1, keepdims=True, where=kept_BC)

    def set_bit(i: jax.Array, least_B1: jax.Array) -> jax.Array:
        candidate_B1 = least_B1 | (jnp.int32(1) << (30 - i))
        return jnp.where(mass(bits_BC >= candidate_B1) >= least_mass, candidate_B1, least_B1)

    least_B1 = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros_like(bits_BC[:, :1]))
    above_BC, equal_BC = bits_BC > least_B1, bits_BC == least_B1
    missing_B1 = (least_mass - mass(above_BC)) / jax.lax.bitcast_convert_type(least_B1, jnp.float32)
    keep_BC = above_BC | (equal_BC & (jnp.cumsum(equal_BC, axis=-1) <= jnp.ceil(missing_B1)))
    return jnp.where(keep_BC, logits_BC, -jnp.inf)


def top_p_of_sorted(logits_BC: jax.Array, p: float) -> jax.Array:
    """`top_p` for logits in descending order, such as those of `top_k`."""
    probability_BC = jax.nn.softmax(logits_BC, axis=-1)
    return jnp.where(jnp.cumsum(probability_BC, axis=-1) - probability_BC < jnp.maximum(p, _LEAST), logits_BC, -jnp.inf)


def min_p(logits_BC: jax.Array, p: float) -> jax.Array:
    """The logits of tokens at least p times as likely as the most likely one (Nguyen et al., arXiv:2407.01082)."""
    return jnp.where(logits_BC >= logits_BC.max(-1, keepdims=True) + jnp.log(p), logits_BC, -jnp.inf)


def row_keys(seed: jax.Array, sample_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """One random key per row, from the seed, the index among the prompt's samples, and the position of the new token.

    The batch index is not folded in, so a row's text does not depend on the other rows.
    """
    key = jax.random.key(seed)
    return jax.vmap(lambda sample, position: jax.random.fold_in(jax.random.fold_in(key, sample), position))(
        sample_B, position_B
    )


def draw(logits_BC: jax.Array, ids_BC: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Token ids [B], each sampled from softmax(logits) with its row's key (the Gumbel-max trick).

    The noise is a function of the token's id, not of its rank. So it does not change if rounding, in a batch of another
    size, swaps the ranks of two candidates.
    """
    token_noise = jax.vmap(lambda key, id: jax.random.gumbel(jax.random.fold_in(key, id)), in_axes=(None, 0))
    noise_BC = jax.vmap(token_noise)(keys_B, ids_BC)
    best_B = jnp.argmax(logits_BC + noise_BC, axis=-1)
    return jnp.take_along_axis(ids_BC, best_B[:, None], axis=-1)[:, 0]


def sample(
    logits_BV: jax.Array, seen_BV: jax.Array | None, keys_B: jax.Array, config: SamplingConfig, vocab_size: int
) -> jax.Array:
    """Token ids [B], int32, sampled from logits [B, V] according to the config.

    `seen_BV`, bool, marks the tokens of the prompt and the text. Only a repetition penalty needs it.
    """
    logits_BV = mask_padding(logits_BV, vocab_size)
    if config.repetition_penalty != 1:
        assert seen_BV is not None
        logits_BV = repetition_penalty(logits_BV, seen_BV, config.repetition_penalty)
    if config.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BC, ids_BC = top_k(logits_BV, config.top_k)
    logits_BC = temperature(logits_BC, config.temperature)
    if config.top_p < 1:
        are_sorted = logits_BC.shape != logits_BV.shape
        logits_BC = (top_p_of_sorted if are_sorted else top_p)(logits_BC, config.top_p)
    if config.min_p > 0:
        logits_BC = min_p(logits_BC, config.min_p)
    return draw(logits_BC, ids_BC, keys_B).astype(jnp.int32)
