"""From logits to the next token: small pure functions, and the sampler composed of them.

Dimension letters beyond the legend: C candidates, the V tokens of the vocabulary or the k that top_k keeps.
Dropped tokens have logit -inf.
"""

import jax
import jax.numpy as jnp

from nextllm_jax.config import SamplingConfig


def mask_padding(logits_BV: jax.Array, vocab_size: int) -> jax.Array:
    """The logits without the rows that pad the embedding beyond the tokenizer's `vocab_size`."""
    return jnp.where(jnp.arange(logits_BV.shape[-1])[None] < vocab_size, logits_BV, -jnp.inf)


def repetition_penalty(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """The logits with those of seen tokens divided by the penalty if positive, multiplied by it if negative.

    Source: Keskar et al. 2019, CTRL, arXiv:1909.05858, in the form that keeps the sign of a logit.
    """
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def temperature(logits_BC: jax.Array, value: float) -> jax.Array:
    """The logits over the temperature, which must be positive; shifted to a maximum of 0, so as not to overflow."""
    return (logits_BC - logits_BC.max(-1, keepdims=True)) / value


def top_k(logits_BV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Logits and ids, each [B, C], of the k most likely tokens; of all tokens if k is 0.

    What follows then works on k numbers, not on the vocabulary.
    """
    V = logits_BV.shape[-1]
    if k == 0 or k >= V:
        return logits_BV, jnp.broadcast_to(jnp.arange(V)[None], logits_BV.shape)
    logits_BC, ids_BC = jax.lax.top_k(logits_BV, k)
    return logits_BC, ids_BC


def top_p(logits_BC: jax.Array, p: float) -> jax.Array:
    """The logits of the fewest tokens whose probabilities sum to at least p; of equal ones the first are kept.

    The least probability kept is found by bisection over its bits, which order positive floats as integers: a CPU
    takes eight times as long to sort a vocabulary (92 ms instead of 12 for 8 rows of 50,304). Source: Holtzman et al.
    2019, arXiv:1904.09751.
    """
    probability_BC = jax.nn.softmax(logits_BC, axis=-1)
    bits_BC = jax.lax.bitcast_convert_type(probability_BC, jnp.int32)

    def mass(kept_BC: jax.Array) -> jax.Array:
        return jnp.sum(probability_BC, axis=-1, keepdims=True, where=kept_BC)

    def set_bit(i: jax.Array, least_B1: jax.Array) -> jax.Array:
        candidate_B1 = least_B1 | (jnp.int32(1) << (30 - i))
        return jnp.where(mass(bits_BC >= candidate_B1) >= p, candidate_B1, least_B1)

    least_B1 = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros_like(bits_BC[:, :1]))
    above_BC, equal_BC = bits_BC > least_B1, bits_BC == least_B1
    missing_B1 = (p - mass(above_BC)) / jax.lax.bitcast_convert_type(least_B1, jnp.float32)
    keep_BC = above_BC | (equal_BC & (jnp.cumsum(equal_BC, axis=-1) <= jnp.ceil(missing_B1)))
    return jnp.where(keep_BC, logits_BC, -jnp.inf)


def top_p_of_sorted(logits_BC: jax.Array, p: float) -> jax.Array:
    """`top_p` of logits in descending order, as `top_k` leaves them."""
    probability_BC = jax.nn.softmax(logits_BC, axis=-1)
    return jnp.where(jnp.cumsum(probability_BC, axis=-1) - probability_BC < p, logits_BC, -jnp.inf)


def min_p(logits_BC: jax.Array, p: float) -> jax.Array:
    """The logits of tokens at least p times as likely as the most likely one (Nguyen et al., arXiv:2407.01082)."""
    return jnp.where(logits_BC >= logits_BC.max(-1, keepdims=True) + jnp.log(p), logits_BC, -jnp.inf)


def row_keys(seed: jax.Array, sample_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """One random key a row, from the seed, the sample's index within its prompt, and the position of the token drawn.

    The row's place in the batch has no part in it, so a row's text does not depend on its company.
    """
    key = jax.random.key(seed)
    return jax.vmap(lambda sample, position: jax.random.fold_in(jax.random.fold_in(key, sample), position))(
        sample_B, position_B
    )


def draw(logits_BC: jax.Array, ids_BC: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Token ids [B], each drawn from softmax(logits) by its row's key (the Gumbel-max trick).

    The noise belongs to the token's id, not to its rank: two candidates that rounding makes change places in
    another batch still get their own noise.
    """
    token_noise = jax.vmap(lambda key, id: jax.random.gumbel(jax.random.fold_in(key, id)), in_axes=(None, 0))
    noise_BC = jax.vmap(token_noise)(keys_B, ids_BC)
    best_B = jnp.argmax(logits_BC + noise_BC, axis=-1)
    return jnp.take_along_axis(ids_BC, best_B[:, None], axis=-1)[:, 0]


def sample(
    logits_BV: jax.Array, seen_BV: jax.Array | None, keys_B: jax.Array, config: SamplingConfig, vocab_size: int
) -> jax.Array:
    """Token ids [B], int32, under the config: the composition of this file.

    `seen_BV` (bool: tokens in the prompt or the text) is needed only with a repetition penalty.
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
