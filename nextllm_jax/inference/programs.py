"""The compiled programs of the engine: they read prompts into the cache, generate tokens, and prepare slots.

N is the number of slots, B the number of rows that a program processes. The state is donated, so it is updated in
place. A program works on a part of the cache: B of the slots and the first `length` positions. It copies this part out
before its loop and back after it, unless it is the whole cache.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from nextllm_jax.inference.request import MAX_TOP_LOGPROBS
from nextllm_jax.inference.sampling import Penalties, Settings, mask_padding, penalized, row_keys, sample
from nextllm_jax.model.kv_cache import KVCache
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.sharding import constrain

CHUNK_TOKENS = 64
"""Maximum number of tokens per row in one call of `decode`."""


@flax.struct.dataclass
class State:
    """What the engine keeps on the devices for its slots."""

    cache: KVCache
    counts_NV: jax.Array
    """2 x the number of times that a token is in the new text, + 1 if it is in the prompt; if `Rows.adjusts_B`."""
    bias_NV: jax.Array
    """Added to the logits if `Rows.adjusts_B`."""


class Rows(NamedTuple):
    """The positions and the settings of the rows of a call of `decode`, [B] each."""

    slot_B: Any
    """Slots; N for rows that pad the batch. All N slots in order if B is N."""
    token_B: Any
    """The last token, which is not in the cache yet."""
    position_B: Any
    """Its position. Rows that are done must have one that the cache does not have, so they write nothing."""
    done_B: Any
    remaining_B: Any
    """Number of new tokens after which a row is done."""
    min_left_B: Any
    """Number of new tokens that must not be stop ids."""
    stop_ids_BK: Any
    """Ids that end the row, padded with -1."""
    seed_B: Any
    sample_B: Any
    dropped_B: Any
    """Number of tokens that were dropped before position 0. Keys count them, so no key is used twice."""
    adjusts_B: Any
    """Whether the row has penalties or biases."""
    logprobs_B: Any
    """Whether the row asks for log probabilities."""
    settings: Settings
    penalties: Penalties


class Decoded(NamedTuple):
    """The result of `decode`; C is CHUNK_TOKENS, and K is MAX_TOP_LOGPROBS or V."""

    token_BC: jax.Array
    """-1 after the end of a row."""
    logprob_BC: jax.Array
    top_logprob_BCK: jax.Array
    top_id_BCK: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "num_slots", "length"))
def create(model: Transformer, *, num_slots: int, length: int) -> State:
    """The state of `num_slots` empty slots of `length` positions."""
    cache = KVCache.create(
        model.config, batch_size=num_slots, length=length, dtype=model.dtype, scan_layers=model.scan_layers
    )
    zeros_NV = constrain(jnp.zeros((num_slots, model.config.vocab_size)), "batch", "vocab")
    return State(cache, zeros_NV.astype(jnp.int32), zeros_NV)


@functools.partial(jax.jit, donate_argnames=("state",))
def place(state: State, slot: jax.Array, source: jax.Array, counts_V: jax.Array, bias_V: jax.Array) -> State:
    """The state after the cache of slot `source` is copied to `slot`, whose counts and biases are set."""
    return State(
        state.cache.copied(source, slot),
        state.counts_NV.at[slot].set(counts_V),
        state.bias_NV.at[slot].set(bias_V),
    )


@functools.partial(jax.jit, static_argnames=("model", "length"), donate_argnames=("state",))
def prefill(
    model: Transformer,
    params: Any,
    state: State,
    slot_B: jax.Array,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    *,
    length: int,
) -> State:
    """The state after the tokens, padded on the right, are written to the cache from position `start` on.

    Padding is written too. Nothing attends to it, since each position is written again before a query reaches it.
    """
    positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    _, cache = _apply(model, params, tokens_BT, positions_BT, state.cache.taken(slot_B, length))
    return dataclasses.replace(state, cache=state.cache.put(slot_B, cache))


@functools.partial(jax.jit, static_argnames=("model", "vocab_size", "length"), donate_argnames=("state",))
def decode(
    model: Transformer,
    params: Any,
    state: State,
    rows: Rows,
    limit: jax.Array,
    stop_early: jax.Array,
    *,
    vocab_size: int,
    length: int,
) -> tuple[State, Decoded]:
    """The state after at most `limit` <= CHUNK_TOKENS more tokens per row, and these tokens.

    With `stop_early`, it returns as soon as a row ends. Ids from `vocab_size` on are never sampled.
    """
    B, V = len(rows.token_B), model.config.vocab_size
    K = min(MAX_TOP_LOGPROBS, V)

    def unfinished(carry: Any) -> jax.Array:
        step, _, row, _ = carry
        ended = jnp.any(row.done_B & ~rows.done_B)
        return (step < limit) & ~jnp.all(row.done_B) & ~(stop_early & ended)

    def advance(carry: Any) -> Any:
        step, state, row, decoded = carry
        hidden_B1D, cache = _apply(model, params, row.token_B[:, None], row.position_B[:, None], state.cache)
        with jax.named_scope("sample"):
            logits_B1V: Any = model.apply({"params": params}, hidden_B1D, method="logits")
            logits_BV = mask_padding(logits_B1V[:, 0], vocab_size)
            position_B = row.position_B + 1
            keys_B = row_keys(rows.seed_B, rows.sample_B, rows.dropped_B + position_B)
            adjusted_BV = _adjusted(logits_BV, state, rows, step)
            token_B = sample(adjusted_BV, rows.settings, keys_B)
            decoded = _recorded(decoded, step, jnp.where(row.done_B, -1, token_B), logits_BV, rows.logprobs_B)
        counted_B = jnp.where(rows.adjusts_B & ~row.done_B, rows.slot_B, len(state.bias_NV))
        counts_NV = state.counts_NV.at[counted_B, token_B].add(2, mode="drop")
        ends_B = jnp.any(token_B[:, None] == rows.stop_ids_BK, axis=1) | (step + 1 >= rows.remaining_B)
        done_B = row.done_B | ends_B
        position_B = jnp.where(done_B, length, position_B)
        row = row._replace(token_B=token_B, position_B=position_B, done_B=done_B)
        return step + 1, dataclasses.replace(state, cache=cache, counts_NV=counts_NV), row, decoded

    decoded = Decoded(
        jnp.full((B, CHUNK_TOKENS), -1, jnp.int32),
        jnp.zeros((B, CHUNK_TOKENS), jnp.float32),
        jnp.zeros((B, CHUNK_TOKENS, K), jnp.float32),
        jnp.zeros((B, CHUNK_TOKENS, K), jnp.int32),
    )
    whole = state.cache
    part = dataclasses.replace(state, cache=whole.taken(rows.slot_B, length))
    start = (jnp.zeros((), jnp.int32), part, jax.tree.map(jnp.asarray, rows), decoded)
    _, part, _, decoded = jax.lax.while_loop(unfinished, advance, start)
    return dataclasses.replace(part, cache=whole.put(rows.slot_B, part.cache)), decoded


def _apply(
    model: Transformer, params: Any, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    return model.apply({"params": params}, tokens_BT, positions_BT, cache=cache)  # pyright: ignore[reportReturnType]


def _adjusted(logits_BV: jax.Array, state: State, rows: Rows, step: jax.Array) -> jax.Array:
    """The logits with the biases and penalties of the rows that have any, without stop ids where they are too early."""

    def biased(logits_BV: jax.Array) -> jax.Array:
        counts_BV = state.counts_NV.at[rows.slot_B].get(mode="clip")
        bias_BV = state.bias_NV.at[rows.slot_B].get(mode="clip")
        adjusted_BV = penalized(logits_BV, counts_BV % 2 == 1, counts_BV // 2, rows.penalties) + bias_BV
        return jnp.where(rows.adjusts_B[:, None], adjusted_BV, logits_BV)

    def without_stops(logits_BV: jax.Array) -> jax.Array:
        banned_BK = (rows.stop_ids_BK >= 0) & (step < rows.min_left_B[:, None])
        ids_BK = jnp.where(banned_BK, rows.stop_ids_BK, logits_BV.shape[-1])
        row_BK = jnp.broadcast_to(jnp.arange(len(ids_BK))[:, None], ids_BK.shape)
        return logits_BV.at[row_BK, ids_BK].set(-jnp.inf, mode="drop")

    logits_BV = jax.lax.cond(jnp.any(rows.adjusts_B), biased, lambda x: x, logits_BV)
    return jax.lax.cond(jnp.any(step < rows.min_left_B), without_stops, lambda x: x, logits_BV)


def _recorded(
    decoded: Decoded, step: jax.Array, token_B: jax.Array, logits_BV: jax.Array, logprobs_B: jax.Array
) -> Decoded:
    """`decoded` with the tokens of a step, and with their log probabilities if a row asks for them."""

    def with_logprobs(decoded: Decoded) -> Decoded:
        logprobs_BV = jax.nn.log_softmax(logits_BV)
        chosen_B1 = jnp.take_along_axis(logprobs_BV, jnp.maximum(token_B, 0)[:, None], axis=1)
        top_logprob_BK, top_id_BK = jax.lax.top_k(logprobs_BV, decoded.top_id_BCK.shape[-1])
        return decoded._replace(
            logprob_BC=decoded.logprob_BC.at[:, step].set(chosen_B1[:, 0]),
            top_logprob_BCK=decoded.top_logprob_BCK.at[:, step].set(top_logprob_BK),
            top_id_BCK=decoded.top_id_BCK.at[:, step].set(top_id_BK),
        )

    decoded = decoded._replace(token_BC=decoded.token_BC.at[:, step].set(token_B))
    return jax.lax.cond(jnp.any(logprobs_B), with_logprobs, lambda x: x, decoded)
