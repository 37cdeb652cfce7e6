"""Guesses of the next tokens, which the model then verifies together: speculative decoding.

D is the number of guesses.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nextllm_jax.inference.programs import Network
from nextllm_jax.model.kv_cache import KVCache

_LONGEST_MATCH = 3


def from_history(history_BS: jax.Array, position_B: jax.Array, count: int) -> jax.Array:
    """The `count` tokens that followed the last tokens of each row earlier in its history, int32 [B, D].

    `history_BS` has the tokens of the rows up to `position_B`. Of all earlier places, the one that shares the most of
    the last 3 tokens counts, and of these the latest. Where it is so late that fewer than D tokens follow, they repeat.
    Without such a place, the guesses are -1. Source: Saxena 2023, prompt lookup decoding.
    """
    place_S = jnp.arange(history_BS.shape[1], dtype=jnp.int32)
    matches_BS = jnp.ones(history_BS.shape, bool)
    length_BS = jnp.zeros(history_BS.shape, jnp.int32)
    for back in range(_LONGEST_MATCH):
        token_B1 = jnp.take_along_axis(history_BS, jnp.maximum(position_B - back, 0)[:, None], axis=1, mode="clip")
        earlier_BS = jnp.pad(history_BS, ((0, 0), (back, 0)), constant_values=-1)[:, : history_BS.shape[1]]
        matches_BS &= (earlier_BS == token_B1) & (position_B >= back)[:, None]
        length_BS += matches_BS
    is_earlier_BS = place_S[None] < position_B[:, None]
    score_BS = jnp.where(is_earlier_BS, length_BS * len(place_S) + place_S[None], -1)
    best_B = jnp.argmax(score_BS, axis=1).astype(jnp.int32)
    found_B = jnp.take_along_axis(length_BS, best_B[:, None], axis=1)[:, 0] > 0
    period_B1 = jnp.maximum(position_B - best_B, 1)[:, None]
    place_BD = best_B[:, None] + 1 + jnp.arange(count, dtype=jnp.int32)[None] % period_B1
    drafts_BD = jnp.take_along_axis(history_BS, place_BD, axis=1, mode="clip")
    return jnp.where((found_B & (position_B > 0))[:, None], drafts_BD, -1)


def from_network(
    draft: Network,
    cache: KVCache,
    token_B: jax.Array,
    position_B: jax.Array,
    count: int,
    next_token: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, KVCache]:
    """The `count` tokens that a smaller model continues each row with, int32 [B, D], and its cache.

    `next_token` samples the token after `position_B` from logits [B, V]. The cache gets the keys and values of the last
    token and of all guesses. Source: Leviathan et al. 2022, arXiv:2211.17192.
    """

    def step(carry: tuple[jax.Array, jax.Array, KVCache], _: None) -> tuple[Any, jax.Array]:
        token_B, position_B, cache = carry
        hidden_B1D, cache = draft.apply(token_B[:, None], position_B[:, None], cache)
        token_B = next_token(draft.logits(hidden_B1D)[:, 0], position_B)
        return (token_B, position_B + 1, cache), token_B

    # One more step than guesses, since the last guess must be in the cache too if it is accepted.
    (_, _, cache), drafts_DB = jax.lax.scan(step, (token_B, position_B, cache), length=count + 1)
    return drafts_DB[:count].T, cache
