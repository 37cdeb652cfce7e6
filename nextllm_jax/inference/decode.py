"""`decode`: the compiled program that generates tokens. B is the number of its rows."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nextllm_jax.config.sampling import MAX_TOP_LOGPROBS
from nextllm_jax.inference.drafts import from_history, from_network
from nextllm_jax.inference.programs import Network, State
from nextllm_jax.inference.sampling import Penalties, Settings, mask_padding, only_allowed, penalized, row_keys, sample

CHUNK_TOKENS = 64
"""Maximum number of tokens per row in one call of `decode`."""


class Rows(NamedTuple):
    """The positions and the settings of the rows of a call of `decode`, [B] each."""

    slot_B: Any
    """Slots; N for rows that pad the batch. All N slots in order if B is N."""
    token_B: Any
    """The last token, which is not in the cache yet."""
    position_B: Any
    """Its position."""
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
    constrained_B: Any
    """Whether the next token must be an allowed one."""
    settings: Settings
    penalties: Penalties


class Progress(NamedTuple):
    """What changes of the rows, [B] each."""

    token_B: jax.Array
    position_B: jax.Array
    done_B: jax.Array
    new_B: jax.Array
    """Number of new tokens."""


class Decoded(NamedTuple):
    """The new tokens of a call; C is CHUNK_TOKENS, and K is MAX_TOP_LOGPROBS or V."""

    token_BC: jax.Array
    """-1 after the last token of a row."""
    accepted_B: jax.Array
    """Number of the tokens that were drafted."""
    logprob_BC: jax.Array
    top_logprob_BCK: jax.Array
    top_id_BCK: jax.Array


class _Carry(NamedTuple):
    """What a step of the loop changes."""

    state: State
    progress: Progress
    history_BS: jax.Array | None
    decoded: Decoded


@functools.partial(jax.jit, static_argnames=("vocab_size", "length", "draft_tokens"), donate_argnames=("state",))
def decode(
    network: Network,
    draft: Network | None,
    state: State,
    rows: Rows,
    allowed_BW: jax.Array,
    history_BS: jax.Array | None,
    limit: jax.Array,
    stop_early: jax.Array,
    *,
    vocab_size: int,
    length: int,
    draft_tokens: int = 0,
) -> tuple[State, Decoded]:
    """The state after the next tokens of the rows, and these tokens.

    Returns when all rows are done, or one has `limit` <= CHUNK_TOKENS new tokens, or, with `stop_early`, one ends. Ids
    from `vocab_size` on are never sampled. `allowed_BW` has the tokens that constrained rows may get, as the bits of
    uint32 words; `limit` must then be 1.

    Each step reads the last token of a row and `draft_tokens` guesses of what follows. They come from the draft model
    or, without one, from `history_BS`, the tokens of the rows by position. Then it samples the token after each of
    them, with the key of its position, and keeps those up to the first that differs from the guess. So guesses reduce
    the number of steps, and do not change the tokens.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    B, C, K = len(rows.token_B), CHUNK_TOKENS, min(MAX_TOP_LOGPROBS, network.model.config.vocab_size)

    def unfinished(carry: _Carry) -> jax.Array:
        done_B = carry.progress.done_B
        is_full = jnp.any(~done_B & (carry.progress.new_B >= limit))
        return ~jnp.all(done_B) & ~is_full & ~(stop_early & jnp.any(done_B & ~rows.done_B))

    def step(carry: _Carry) -> _Carry:
        # A row that is done gets a position that the cache does not have, so it writes nothing.
        position_B = jnp.where(carry.progress.done_B, length, carry.progress.position_B)
        state, drafts_BD = _drafts(draft, carry, position_B, rows, vocab_size, draft_tokens)
        tokens_BT = jnp.concatenate([carry.progress.token_B[:, None], drafts_BD], axis=1)
        positions_BT = position_B[:, None] + jnp.arange(1 + draft_tokens, dtype=jnp.int32)[None]
        hidden_BTD, cache = network.apply(jnp.maximum(tokens_BT, 0), positions_BT, state.cache)
        with jax.named_scope("sample"):
            logits_BTV = mask_padding(network.logits(hidden_BTD), vocab_size)
        carry = carry._replace(state=dataclasses.replace(state, cache=cache))
        return _verified(carry, logits_BTV, drafts_BD, rows, allowed_BW, limit)

    zeros_B = jnp.zeros(B, jnp.int32)
    zeros_BC, zeros_BCK = jnp.zeros((B, C), jnp.float32), jnp.zeros((B, C, K), jnp.float32)
    carry = _Carry(
        state.taken(rows.slot_B, length),
        Progress(rows.token_B, rows.position_B, rows.done_B, zeros_B),
        history_BS,
        Decoded(jnp.full((B, C), -1, jnp.int32), zeros_B, zeros_BC, zeros_BCK, zeros_BCK.astype(jnp.int32)),
    )
    carry = jax.lax.while_loop(unfinished, step, carry)
    return state.put(rows.slot_B, carry.state), carry.decoded


def _drafts(
    draft: Network | None, carry: _Carry, position_B: jax.Array, rows: Rows, vocab_size: int, count: int
) -> tuple[State, jax.Array]:
    """The state, and guesses of the next tokens of each row, int32 [B, D]; -1 where there is none."""
    state, history_BS = carry.state, carry.history_BS
    if draft is not None and state.draft_cache is not None:

        def next_token(logits_BV: jax.Array, position_B: jax.Array) -> jax.Array:
            return sample(mask_padding(logits_BV, vocab_size), rows.settings, _keys(rows, position_B + 1))

        token_B = carry.progress.token_B
        drafts_BD, cache = from_network(draft, state.draft_cache, token_B, position_B, count, next_token)
        return dataclasses.replace(state, draft_cache=cache), drafts_BD
    if history_BS is not None:
        return state, from_history(history_BS, position_B, count)
    return state, jnp.zeros((len(position_B), 0), jnp.int32)


def _verified(
    carry: _Carry, logits_BTV: jax.Array, drafts_BD: jax.Array, rows: Rows, allowed_BW: jax.Array, limit: jax.Array
) -> _Carry:
    """The carry with the tokens of a step: one for each row, and one more for each draft that equals the token."""

    def take(loop: tuple[jax.Array, jax.Array, _Carry]) -> tuple[jax.Array, jax.Array, _Carry]:
        t, active_B, (state, progress, history_BS, decoded) = loop
        logits_BV = jax.lax.dynamic_index_in_dim(logits_BTV, t, axis=1, keepdims=False)
        position_B = progress.position_B + 1
        with jax.named_scope("sample"):
            adjusted_BV = _adjusted(logits_BV, state, rows, allowed_BW, progress.new_B)
            token_B = sample(adjusted_BV, rows.settings, _keys(rows, position_B))
            decoded = _recorded(decoded, jnp.where(active_B, progress.new_B, CHUNK_TOKENS), token_B, logits_BV, rows)
            decoded = decoded._replace(accepted_B=decoded.accepted_B + (active_B & (t > 0)))
        counted_B = jnp.where(rows.adjusts_B & active_B, rows.slot_B, len(state.counts_NV))
        state = dataclasses.replace(state, counts_NV=state.counts_NV.at[counted_B, token_B].add(2, mode="drop"))
        if history_BS is not None:
            row_B, end = jnp.arange(len(token_B)), history_BS.shape[1]
            history_BS = history_BS.at[row_B, jnp.where(active_B, position_B, end)].set(token_B, mode="drop")
        new_B = progress.new_B + active_B
        ends_B = jnp.any(token_B[:, None] == rows.stop_ids_BK, axis=1) | (new_B >= rows.remaining_B)
        progress = Progress(
            token_B=jnp.where(active_B, token_B, progress.token_B),
            position_B=jnp.where(active_B, position_B, progress.position_B),
            done_B=progress.done_B | (active_B & ends_B),
            new_B=new_B,
        )
        if D:
            draft_B = jax.lax.dynamic_index_in_dim(drafts_BD, t, axis=1, keepdims=False)  # the last one for t = D
            active_B &= ~progress.done_B & (new_B < limit) & (token_B == draft_B)
        return t + 1, active_B, _Carry(state, progress, history_BS, decoded)

    D = drafts_BD.shape[1]
    loop = (jnp.zeros((), jnp.int32), ~carry.progress.done_B, carry)
    if D:
        return jax.lax.while_loop(lambda loop: (loop[0] <= D) & jnp.any(loop[1]), take, loop)[2]
    return take(loop)[2]


def _keys(rows: Rows, position_B: jax.Array) -> jax.Array:
    """The random keys of new tokens at `position_B`."""
    return row_keys(rows.seed_B, rows.sample_B, rows.dropped_B + position_B)


def _adjusted(logits_BV: jax.Array, state: State, rows: Rows, allowed_BW: jax.Array, new_B: jax.Array) -> jax.Array:
    """The logits with the biases and penalties of the rows that have any, without the tokens that may not follow."""

    def biased(logits_BV: jax.Array) -> jax.Array:
        counts_BV = state.counts_NV.at[rows.slot_B].get(mode="clip")
        bias_BV = state.bias_NV.at[rows.slot_B].get(mode="clip")
        adjusted_BV = penalized(logits_BV, counts_BV % 2 == 1, counts_BV // 2, rows.penalties) + bias_BV
        return jnp.where(rows.adjusts_B[:, None], adjusted_BV, logits_BV)

    def without_stops(logits_BV: jax.Array) -> jax.Array:
        banned_BK = (rows.stop_ids_BK >= 0) & is_early_B[:, None]
        ids_BK = jnp.where(banned_BK, rows.stop_ids_BK, logits_BV.shape[-1])
        row_BK = jnp.broadcast_to(jnp.arange(len(ids_BK))[:, None], ids_BK.shape)
        return logits_BV.at[row_BK, ids_BK].set(-jnp.inf, mode="drop")

    def constrained(logits_BV: jax.Array) -> jax.Array:
        return jnp.where(rows.constrained_B[:, None], only_allowed(logits_BV, allowed_BW), logits_BV)

    is_early_B = new_B < rows.min_left_B
    logits_BV = jax.lax.cond(jnp.any(rows.adjusts_B), biased, lambda x: x, logits_BV)
    logits_BV = jax.lax.cond(jnp.any(is_early_B), without_stops, lambda x: x, logits_BV)
    return jax.lax.cond(jnp.any(rows.constrained_B), constrained, lambda x: x, logits_BV)


def _recorded(decoded: Decoded, place_B: jax.Array, token_B: jax.Array, logits_BV: jax.Array, rows: Rows) -> Decoded:
    """`decoded` with a token of each row at `place_B`, and its log probabilities if a row asks for them.

    A place past the end records nothing.
    """
    at = (jnp.arange(len(token_B)), place_B)

    def with_logprobs(decoded: Decoded) -> Decoded:
        logprobs_BV = jax.nn.log_softmax(logits_BV)
        chosen_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0]
        top_logprob_BK, top_id_BK = jax.lax.top_k(logprobs_BV, decoded.top_id_BCK.shape[-1])
        return decoded._replace(
            logprob_BC=decoded.logprob_BC.at[at].set(chosen_B, mode="drop"),
            top_logprob_BCK=decoded.top_logprob_BCK.at[at].set(top_logprob_BK, mode="drop"),
            top_id_BCK=decoded.top_id_BCK.at[at].set(top_id_BK, mode="drop"),
        )

    decoded = decoded._replace(token_BC=decoded.token_BC.at[at].set(token_B, mode="drop"))
    return jax.lax.cond(jnp.any(rows.logprobs_B), with_logprobs, lambda x: x, decoded)
