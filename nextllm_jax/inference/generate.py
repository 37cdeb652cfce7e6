"""Generates tokens in rows: a jitted prefill, then a jitted while loop that is called until all rows are done.

Prompts are padded to a few bucket lengths, to limit the number of compilations. The loop's state (cache, last tokens,
positions, flags) is donated, so the cache is updated in place and never copied.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nextllm_jax.config import SamplingConfig
from nextllm_jax.config.checks import require_integer, require_seed
from nextllm_jax.errors import InputError
from nextllm_jax.inference.sampling import row_keys, sample
from nextllm_jax.model.kv_cache import KVCache
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.progress import phase
from nextllm_jax.sharding import on_mesh, padded_size, to_host

CHUNK_TOKENS = 64
"""Maximum number of tokens per row in one call of the loop."""


@flax.struct.dataclass
class State:
    """The carry of the decode loop. Finished rows stay in the batch. The last token of a row is not cached yet."""

    cache: KVCache
    token_B: jax.Array
    position_B: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Tokens and seconds of prefill and decode, excluding compilation."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second, summed over rows; padding does not count."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second, summed over rows."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


def _apply(
    model: Transformer, params: Any, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    return model.apply({"params": params}, tokens_BT, positions_BT, cache=cache)  # pyright: ignore[reportReturnType]


@functools.partial(jax.jit, static_argnames=("model", "cache_length", "track_seen"))
def prefill(
    model: Transformer, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, *, cache_length: int, track_seen: bool
) -> State:
    """The state after the prompts, int32 [B, T], which are padded on the right. Rows of length 0 are done.

    The first step of the loop processes the last token of each prompt again, so sampling happens only inside the loop.
    """
    B, T = tokens_BT.shape
    cache = KVCache.create(
        model.config, batch_size=B, length=cache_length, dtype=model.dtype, scan_layers=model.scan_layers
    )
    state = _read(model, params, cache, tokens_BT, lengths_B, jnp.zeros((), jnp.int32))
    if track_seen:
        seen_BV = jnp.zeros((B, model.config.vocab_size), bool)
        is_prompt_BT = jnp.arange(T)[None] < lengths_B[:, None]
        state = dataclasses.replace(state, seen_BV=seen_BV.at[jnp.arange(B)[:, None], tokens_BT].max(is_prompt_BT))
    return state


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def extend(
    model: Transformer, params: Any, cache: KVCache, tokens_BT: jax.Array, lengths_B: jax.Array, start: jax.Array
) -> State:
    """The state after more tokens, padded as in `prefill`, are written to a cache (donated) from position `start` on.

    What the cache held from `start` on is never attended to, since each slot is overwritten before a query reaches it.
    """
    return _read(model, params, cache, tokens_BT, lengths_B, start)


def _read(
    model: Transformer, params: Any, cache: KVCache, tokens_BT: jax.Array, lengths_B: jax.Array, start: jax.Array
) -> State:
    """Writes the tokens to the cache from position `start` on. Returns the state without `seen_BV`."""
    positions_BT = jnp.broadcast_to(start + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    _, cache = _apply(model, params, tokens_BT, positions_BT, cache)
    last_B = jnp.maximum(lengths_B - 1, 0)
    token_B = jnp.take_along_axis(tokens_BT, last_B[:, None], axis=1)[:, 0]
    return State(cache, token_B, start + last_B, lengths_B == 0, None)


@functools.partial(
    jax.jit, static_argnames=("model", "sampling", "vocab_size", "chunk_tokens"), donate_argnames=("state",)
)
def decode(
    model: Transformer,
    params: Any,
    state: State,
    limit: jax.Array,
    stopped_B: jax.Array,
    seed: jax.Array,
    sample_B: jax.Array,
    dropped_B: jax.Array,
    stop_ids: jax.Array,
    *,
    sampling: SamplingConfig,
    vocab_size: int,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[State, jax.Array]:
    """The state (donated) after at most `limit` <= chunk_tokens more tokens per row, and these tokens, int32 [B, C].

    A row ends with a stop id. Rows in `stopped_B` get no tokens. After a row's last token, the rest is -1. `dropped_B`
    counts the tokens of a row before position 0, so no random key is used twice.
    """
    B = state.token_B.shape[0]

    def unfinished(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
        step, state, _ = carry
        return (step < limit) & ~jnp.all(state.done_B)

    def advance(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
        step, state, tokens_BC = carry
        hidden_B1D, cache = _apply(model, params, state.token_B[:, None], state.position_B[:, None], state.cache)
        with jax.named_scope("sample"):
            logits_B1V: Any = model.apply({"params": params}, hidden_B1D, method="logits")
            position_B = state.position_B + 1
            keys_B = row_keys(seed, sample_B, dropped_B + position_B)
            token_B = sample(logits_B1V[:, 0], state.seen_BV, keys_B, sampling, vocab_size)
        tokens_BC = tokens_BC.at[:, step].set(jnp.where(state.done_B, -1, token_B))
        seen_BV = state.seen_BV
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(B), token_B].set(True)
        done_B = state.done_B | jnp.any(token_B[:, None] == stop_ids[None], axis=1)
        return step + 1, State(cache, token_B, position_B, done_B, seen_BV), tokens_BC

    state = dataclasses.replace(state, done_B=state.done_B | stopped_B)
    start = (jnp.zeros((), jnp.int32), state, jnp.full((B, chunk_tokens), -1, jnp.int32))
    _, state, tokens_BC = jax.lax.while_loop(unfinished, advance, start)
    return state, tokens_BC


def bucket(size: int, least: int) -> int:
    """The smallest of least x 1, 1.5, 2, 3, 4, 6, 8, ... that is at least `size`; `least` must be even, or 1."""
    power = least
    while power < size:
        if 2 * size <= 3 * power:
            return 3 * power // 2
        power *= 2
    return power


@dataclasses.dataclass(frozen=True)
class CachedRow:
    """The cache of a Generation of one row, and the tokens that it holds, from position 0 on.

    Another Generation that uses it donates the cache, so it can be used only once.
    """

    tokens: tuple[int, ...]
    cache: KVCache


class Generation:
    """Generates tokens in rows; row i continues prompts[i]. Call `advance` until `done`.

    `samples[i]` is the index of row i among the samples of its prompt. The random key of a token is a function of
    `seed`, this index and the token's position. Runs on `mesh`; None: on the mesh that the caller has set, or on the
    parameters' device.

    `cached` is the cache of an earlier Generation; it allows only one row. Only the tokens after the common prefix of
    its tokens and the prompt are processed, or all tokens if there is a repetition penalty. The cache has at least
    `least_cache_length` slots, but not more than the context. This avoids compiling for a larger cache later.

    With `slide`, prompts and new tokens may exceed the context C: whenever the tokens of a row exceed C, only its last
    C // 2 are kept, from position 0 on, and processed again. So the next token of a row depends on at least C // 2 and
    at most C tokens. `cached` does not go with it.

    Raises InputError if a prompt and the new tokens exceed the model's context without `slide`, if max_new_tokens is
    not positive, or if seed is not in 0 to 2^32 - 1.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        prompts: Sequence[Sequence[int]],
        *,
        samples: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        stop_ids: Sequence[int],
        vocab_size: int,
        cached: CachedRow | None = None,
        least_cache_length: int = 0,
        slide: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        require_seed(seed)
        self._context_length = model.config.context_length
        self.num_rows, self.num_new = len(prompts), 0
        self._remaining = max_new_tokens
        self._params = params
        self._mesh = mesh
        with on_mesh(mesh):
            batch_size = padded_size(bucket(self.num_rows, 1), "batch")
        longest = _longest(prompts, max_new_tokens, None if slide else self._context_length)
        self._kept = [list(prompt) for prompt in prompts] if slide else []
        self._dropped_B, self._stopped_B = np.zeros(batch_size, np.int32), np.zeros(batch_size, bool)
        if self._drop_beginnings():
            prompts, longest = self._kept, max(map(len, self._kept))
        track_seen = sampling.repetition_penalty != 1
        start = 0 if cached is None or track_seen else _num_shared(cached.tokens, prompts)
        tokens_BT, lengths_B = self._padded([prompt[start:] for prompt in prompts])
        cache_length = bucket(max(longest + max_new_tokens, least_cache_length), 16)
        cache_length = min(cache_length, self._context_length)
        if cached is not None and start:
            cache = cached.cache.grown(cache_length)
            read = functools.partial(extend, model, params, cache, tokens_BT, lengths_B, np.int32(start))
        else:
            read = functools.partial(
                prefill, model, params, tokens_BT, lengths_B, cache_length=cache_length, track_seen=track_seen
            )
        with on_mesh(mesh):
            with phase("compiling for the prompt"):
                read.func.lower(*read.args, **read.keywords).compile()  # before the clock starts
            started = time.perf_counter()
            self._state = jax.block_until_ready(read())
        self.speeds = Speeds(prefill_tokens=int(lengths_B.sum()), prefill_seconds=time.perf_counter() - started)
        self._stopped_B = lengths_B == 0
        self._draw_from = (np.uint32(seed), np.resize(np.asarray(samples, np.int32), batch_size))
        self._stop_ids = np.asarray(stop_ids, np.int32)
        self._extend = functools.partial(extend, model, params)
        self._decode = functools.partial(decode, model, sampling=sampling, vocab_size=vocab_size)
        with phase("compiling for new tokens"):
            self._run(0)  # no steps: compiles before the clock starts

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return self._remaining == 0 or bool(self._stopped_B.all())

    def cached_row(self, tokens: Sequence[int]) -> CachedRow:
        """The cache of the only row, for another Generation; `tokens` are the row's prompt and its new tokens.

        This Generation must not be used afterwards.
        """
        # The last token has not been processed, so it is not in the cache.
        return CachedRow(tuple(tokens[:-1]), self._state.cache)

    def stop(self, row: int) -> None:
        """End a row, which gets no more tokens."""
        self._stopped_B[row] = True

    def advance(self, limit: int = CHUNK_TOKENS) -> list[list[int]]:
        """At most `limit` new tokens for each row, including the stop id if one ended it."""
        started = time.perf_counter()
        if self._drop_beginnings():
            self._read_again()
        room = [self._context_length - len(kept) + 1 for row, kept in enumerate(self._kept) if not self._stopped_B[row]]
        limit = min(limit, CHUNK_TOKENS, self._remaining, *room)
        tokens_BC = self._run(limit)
        seconds = time.perf_counter() - started
        rows = [[int(token) for token in row if token >= 0] for row in tokens_BC[: self.num_rows]]
        self._remaining -= limit
        self.num_new += limit
        for kept, new in zip(self._kept, rows, strict=False):  # there are none without `slide`
            kept += new
        speeds = self.speeds
        self.speeds = dataclasses.replace(
            speeds,
            decode_tokens=speeds.decode_tokens + sum(map(len, rows)),
            decode_seconds=speeds.decode_seconds + seconds,
        )
        return rows

    def _drop_beginnings(self) -> bool:
        """Keep only the last tokens of the rows that exceed the context; whether there are such rows."""
        keep = max(self._context_length // 2, 1)
        long = [row for row, kept in enumerate(self._kept) if len(kept) > self._context_length]
        long = [row for row in long if not self._stopped_B[row]]
        for row in long:
            self._dropped_B[row] += len(self._kept[row]) - keep
            self._kept[row] = self._kept[row][-keep:]
        return bool(long)

    def _read_again(self) -> None:
        """Write what is kept of the rows to the cache, from position 0 on."""
        tokens_BT, lengths_B = self._padded(
            [[] if self._stopped_B[row] else kept for row, kept in enumerate(self._kept)]
        )
        with on_mesh(self._mesh):
            state = self._extend(self._state.cache, tokens_BT, lengths_B, np.int32(0))
        self._state = dataclasses.replace(state, seen_BV=self._state.seen_BV)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The rows, padded on the right to a bucket, int32 [B, T], and their lengths, int32 [B]."""
        T = min(bucket(max(map(len, rows)), 16), self._context_length)
        tokens_BT = np.zeros((len(self._dropped_B), T), np.int32)
        lengths_B = np.zeros(len(tokens_BT), np.int32)
        for row, tokens in enumerate(rows):
            tokens_BT[row, : len(tokens)] = tokens
            lengths_B[row] = len(tokens)
        return tokens_BT, lengths_B

    def _run(self, limit: int) -> np.ndarray:
        with on_mesh(self._mesh):
            self._state, tokens_BC = self._decode(
                self._params, self._state, np.int32(limit), self._stopped_B, *self._draw_from,
                self._dropped_B, self._stop_ids,
            )  # fmt: skip
        self._stopped_B = self._stopped_B | to_host(self._state.done_B)
        return to_host(tokens_BC)


def _longest(prompts: Sequence[Sequence[int]], max_new_tokens: int, context_length: int | None) -> int:
    require_integer("max_new_tokens", max_new_tokens)
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths, default=0) == 0:
        raise ValueError("prompts must not be empty, and each must have at least one token")
    if context_length is not None:
        require_context("the prompt", max(lengths), max_new_tokens, context_length)
    return max(lengths)


def require_context(name: str, num_tokens: int, max_new_tokens: int, context_length: int) -> None:
    """Raise InputError, which names the prompt, if its tokens and the new ones exceed the context."""
    if num_tokens + max_new_tokens > context_length:
        raise InputError(
            f"{name} has {num_tokens} tokens, and with max_new_tokens {max_new_tokens} exceeds the model's "
            f"context_length {context_length}; shorten it, lower max_new_tokens, or slide (--slide, slide=True)"
        )


def _num_shared(tokens: Sequence[int], prompts: Sequence[Sequence[int]]) -> int:
    """The length of the common prefix of the cached tokens and the only prompt, without the prompt's last token."""
    (prompt,) = prompts
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, prompt[:-1], strict=False))
    return sum(1 for _ in shared)
