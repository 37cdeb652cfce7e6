"""`Engine`: slots in which requests are processed together. Requests join and leave between any two tokens.

The host keeps the tokens of each slot and what of them is cached; the devices keep the cache. A free slot keeps its
cache, so a request that begins with the same tokens reads only the others, or copies them from another slot.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nextllm_jax.errors import InputError
from nextllm_jax.inference import programs
from nextllm_jax.inference.buckets import bucket, bucket_of, cache_lengths, powers_of_two
from nextllm_jax.inference.decode import CHUNK_TOKENS, Decoded, Rows, decode
from nextllm_jax.inference.programs import Network
from nextllm_jax.inference.request import Output, Request, token_logprobs
from nextllm_jax.inference.slot import IDLE, Slot, stacked
from nextllm_jax.inference.speeds import Speeds
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.progress import phase, progress_bar
from nextllm_jax.sharding import on_mesh, padded_size, to_host

PREFILL_ROW_TOKENS = 512
"""Maximum number of tokens of a row in one call of prefill; longer prompts take several."""

PREFILL_TOKENS = 4096
"""Maximum number of tokens of prompts that are read between two calls of `decode`; of at least 16 per row if rows stay
together and that is more."""

RING_SLACK = 2 * PREFILL_ROW_TOKENS
"""Positions that layers with a window keep in addition to the window. A call of prefill writes fewer than that before
its first query runs. A request can reuse a prefix that ends at most that many positions before the last one written."""

_LEAST_SHARED = 16
"""A common beginning of fewer tokens is not worth a copy, which takes about as long as reading it."""

_log = logging.getLogger(__name__)


class Engine:
    """Runs requests in slots of at most `max_length` tokens, prompt and new tokens together; at most the context.

    `insert` a request into a free slot, then call `step` until it returns its `finish_reason`, or `free` the slot.
    Tokens do not depend on the slot, on the other requests or on how a prompt is split; see docs/sampling.md for the
    limits of rounding. After an exception in `step`, the engine cannot be used again.

    Ids from `vocab_size` on are never sampled. A call of `step` decodes all slots, or a number of rows in the ascending
    `row_buckets`; None: powers of two. Runs on `mesh`; None: on the mesh that the caller has set, or on the parameters'
    device. If the mesh shards the rows, the number of slots is rounded up and all are decoded.

    With `quantize_cache`, keys and values are int8 with a scale for each position and head.

    With `draft_tokens`, each step verifies that many guesses of the next tokens, from the model `draft` or, without
    one, from the tokens of the row. This changes the speed, and not the tokens. The two models must share their ids.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        *,
        num_slots: int,
        max_length: int,
        vocab_size: int,
        row_buckets: tuple[int, ...] | None = None,
        quantize_cache: bool = False,
        draft_tokens: int = 0,
        draft: Network | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self._network, self._mesh, self._vocab_size = Network(model, params), mesh, vocab_size
        self._draft_tokens, self._draft = draft_tokens, draft
        self._context_length = model.config.context_length
        self._words = -(-model.config.vocab_size // 32)
        with on_mesh(mesh):
            self.num_slots = padded_size(num_slots, "batch")
            is_sharded = padded_size(1, "batch") > 1
        buckets = (self.num_slots,) if is_sharded else row_buckets or powers_of_two(num_slots)
        self._row_buckets = (*(size for size in buckets if size < self.num_slots), self.num_slots)
        self.max_length = min(max_length, self._context_length)
        self._lengths = cache_lengths(self.max_length)
        self._row_tokens = max(16, min(PREFILL_ROW_TOKENS, PREFILL_TOKENS // self._row_buckets[0]))
        self._slots = [Slot() for _ in range(self.num_slots)]
        self._calls = 0
        self.programs: list[str] = []
        """The compiled programs that were used."""
        self.speeds = Speeds()
        self._state, _ = self._run(
            f"{self.num_slots} slots of {self.max_length}",
            programs.create,
            model,
            None if draft is None else draft.model,
            num_slots=self.num_slots,
            length=self.max_length,
            ring_slack=RING_SLACK,
            quantize_cache=quantize_cache,
        )

    @property
    def positions_used(self) -> int:
        """Number of tokens that running requests have in their slots, of at most num_slots * max_length."""
        return sum(len(slot.tokens) for slot in self._slots if slot.request is not None)

    def find_slot(self, tokens: Sequence[int]) -> int | None:
        """The free slot that has most of the beginning of `tokens` cached, of these the one used least recently.

        A common beginning of fewer than 16 tokens does not count, so a common BOS costs no slot its cache.
        """

        def order(index: int) -> tuple[int, int]:
            shared = self._reusable(self._slots[index], tokens)
            return (shared if shared >= _LEAST_SHARED else 0), -self._slots[index].used

        return max((index for index, slot in enumerate(self._slots) if slot.request is None), key=order, default=None)

    def check(self, request: Request) -> None:
        """Raise InputError if a request does not fit the slots, or if it has an id that does not exist."""
        if request.sampling.is_constrained and request.constraint is None:
            raise ValueError("a request with a grammar needs the constraint that LLM.requests sets")
        for token in request.sampling.biases:
            if token >= self._vocab_size:
                raise InputError(f"logit_bias names token {token}; the ids are 0 to {self._vocab_size - 1}")
        last = self._network.model.config.vocab_size - 1
        if wrong := [token for token in request.tokens if not 0 <= token <= last]:
            raise InputError(f"the prompt has token {wrong[0]}; the ids are 0 to {last}")
        if not request.slide:
            require_length("the prompt", len(request.tokens), request.max_new_tokens, self._context_length)
        needed = min(len(request.tokens) + request.max_new_tokens, self._context_length)
        if needed > self.max_length:
            raise InputError(f"a request needs {needed} positions, and the slots have {self.max_length}; let them grow")

    def insert(self, slot: int, request: Request) -> None:
        """Put a request into a free slot; the next calls of `step` read its prompt.

        Raises ValueError if the slot is in use, and InputError as `check` does.
        """
        self.check(request)
        place = self._slots[slot]
        if place.request is not None:
            raise ValueError(f"slot {slot} is in use")
        place.request, place.tokens, place.new_tokens = request, list(request.tokens), []
        place.constraint = None if request.constraint is None else request.constraint()
        place.dropped, place.placed, place.used = 0, False, self._calls
        place.slide(self._context_length)
        place.prompt = list(place.tokens)

    def warm_up(self) -> None:
        """Compile all programs that requests can need. No slot may be in use."""
        B = self._row_buckets[0]
        sizes = dict.fromkeys(min(bucket(size, 16), self._row_tokens) for size in range(1, self._row_tokens + 1))
        works = [(T, length) for length in self._lengths for T in sizes if length >= T]
        batches = [(rows, length) for length in self._lengths for rows in self._row_buckets]
        self._change(0, 0, Slot())
        with progress_bar(desc="compiling", total=len(works) + len(batches), unit=" programs") as bar:
            for T, length in works:  # the positions are past the end, where nothing is written
                self._prefill([], np.zeros((B, T), np.int32), np.full(B, self.max_length, np.int32), length)
                bar.update()
            for rows, length in batches:
                self._run_decode(self._rows([], rows, length, {}), length, 1, stop_early=False)
                bar.update()

    def free(self, slot: int) -> None:
        """End the request in a slot, if there is one."""
        self._slots[slot].request = None

    def grow(self, max_length: int) -> None:
        """Enlarge all slots to `max_length`, or to the context if that is less. What is cached stays."""
        max_length = min(max_length, self._context_length)
        if max_length > self.max_length:
            self._state = self._state.grown(max_length)
            self._lengths, self.max_length = cache_lengths(max_length), max_length

    def step(self, limit: int = CHUNK_TOKENS, *, stop_early: bool = False) -> dict[int, Output]:
        """Read prompts, then generate at most `limit` tokens of each row; the new tokens by slot.

        While rows are decoded, at most PREFILL_TOKENS of new prompts are read in a call, so they do not wait for long.
        With `stop_early`, it returns as soon as a row ends, so another request can take its slot.
        """
        left = PREFILL_TOKENS
        while any(slot.reads for slot in self._slots):
            if left <= 0 and any(slot.decodes for slot in self._slots):
                break
            left -= self._read_prompts()
        rows = [index for index, slot in enumerate(self._slots) if slot.decodes]
        slots = {index: self._slots[index] for index in rows}
        allowed = {index: slot.allowed(self._words) for index, slot in slots.items() if slot.constraint is not None}
        ended = {index: Output([], "length", []) for index, allowed_W in allowed.items() if not allowed_W.any()}
        for index in ended:
            self.free(index)
        rows = [index for index in rows if index not in ended]
        return ended | (self._decode(rows, allowed, limit, stop_early) if rows else {})

    def _read_prompts(self) -> int:
        """Read the next tokens of one prompt, or of all if rows stay together; how many, with padding."""
        waiting = [index for index, slot in enumerate(self._slots) if slot.reads]
        for index in waiting:
            if not self._slots[index].placed:
                self._place(index, waiting)
        parts = {
            index: self._slots[index].missing[: self._row_tokens] for index in waiting if self._slots[index].placed
        }
        B = self._row_buckets[0]
        rows = sorted((index for index, part in parts.items() if part), key=lambda index: self._slots[index].used)[:B]
        if not rows:
            return 0
        T = min(bucket(max(len(parts[index]) for index in rows), 16), self._row_tokens)
        tokens_BT, start_B = np.zeros((B, T), np.int32), np.full(B, self.max_length, np.int32)
        for row, index in zip(self._places(rows, B), rows, strict=True):
            tokens_BT[row, : len(parts[index])] = parts[index]
            start_B[row] = len(self._slots[index].cached)
        length = self._length(len(self._slots[index].cached) + len(parts[index]) for index in rows)
        seconds = self._prefill(rows, tokens_BT, start_B, length)
        self.speeds += Speeds(sum(len(parts[index]) for index in rows), seconds)
        for row, index in zip(self._places(rows, B), rows, strict=True):
            self._slots[index].cached += parts[index]
            self._slots[index].written = max(self._slots[index].written, int(start_B[row]) + T)
        return B * T

    def _prefill(self, rows: Sequence[int], tokens_BT: np.ndarray, start_B: np.ndarray, length: int) -> float:
        """Read tokens of the slots `rows`; the seconds that it takes."""
        B, T = tokens_BT.shape
        self._state, seconds = self._run(
            f"prefill of {B} x {T} tokens for {length} of {self.max_length}", programs.prefill,
            self._network, self._draft, self._state, self._slot_numbers(rows, B), tokens_BT, start_B, length=length,
        )  # fmt: skip
        return seconds

    def _place(self, index: int, waiting: Sequence[int]) -> None:
        """Let a slot begin with what is cached of its tokens, here or in another slot.

        Does nothing if another waiting prompt, which is read first, has more of them: then they are read only once.
        """
        slot = self._slots[index]
        tokens = slot.tokens[:-1]
        shared = [self._reusable(other, tokens) for other in self._slots]
        own, best = shared[index], max(range(self.num_slots), key=shared.__getitem__)
        source, reuse = (index, own) if shared[best] < own + _LEAST_SHARED else (best, shared[best])
        for other in waiting:
            if other >= index:
                break
            if self._slots[other].reads and _shared(self._slots[other].tokens[:-1], tokens) >= reuse + _LEAST_SHARED:
                return
        assert slot.request is not None
        if source != index or slot.request.sampling.adjusts_logits:
            self._change(index, source, slot)
        slot.cached, slot.placed = tokens[:reuse], True
        slot.written = self._slots[source].written if reuse else 0

    def _change(self, index: int, source: int, slot: Slot) -> None:
        """Copy the cache of slot `source` to slot `index`, with the counts and biases of `slot`."""
        counts_V, bias_V = slot.adjustments(self._network.model.config.vocab_size)
        self._state, _ = self._run(
            f"a request in slots of {self.max_length}", programs.place,
            self._state, np.int32(index), np.int32(source), counts_V, bias_V,
        )  # fmt: skip

    def _reusable(self, slot: Slot, tokens: Sequence[int]) -> int:
        """How many of the first `tokens` a slot has cached, 0 if a layer with a window has dropped what they need."""
        shared = _shared(slot.cached, tokens)
        kept = slot.written <= min(self._state.ring_lengths, default=slot.written)
        return shared if kept or slot.written <= shared + RING_SLACK else 0

    def _decode(
        self, rows: Sequence[int], allowed: Mapping[int, np.ndarray], limit: int, stop_early: bool
    ) -> dict[int, Output]:
        """Decode the slots `rows`; one token of each if some of them are constrained to `allowed` tokens."""
        slots = [self._slots[index] for index in rows]
        limit = 1 if allowed else min(limit, CHUNK_TOKENS)
        length = self._length(len(slot.tokens) - 1 + min(limit, slot.remaining(self._context_length)) for slot in slots)
        batch = self._rows(rows, bucket_of(len(rows), self._row_buckets), length, allowed)
        decoded, seconds = self._run_decode(batch, length, limit, stop_early=stop_early)
        with_logprobs = any(slot.request is not None and slot.request.top_logprobs is not None for slot in slots)
        token_BC, *others = (to_host(x) for x in (decoded if with_logprobs else decoded[:2]))
        outputs = {
            index: self._take(self._slots[index], token_BC[row], *(each[row] for each in others))
            for index, row in zip(rows, self._places(rows, len(token_BC)), strict=True)
        }
        self.speeds += Speeds(0, 0.0, sum(len(output.tokens) for output in outputs.values()), seconds)
        return outputs

    def _run_decode(
        self, batch: tuple[Rows, Any, Any], length: int, limit: int, *, stop_early: bool
    ) -> tuple[Decoded, float]:
        """The new tokens of a batch, and the seconds that they took."""
        (self._state, decoded), seconds = self._run(
            f"decoding of {len(batch[0].token_B)} rows for {length} of {self.max_length}", decode,
            self._network, self._draft, self._state, *batch, np.int32(limit), np.bool_(stop_early),
            vocab_size=self._vocab_size, length=length, draft_tokens=self._draft_tokens,
        )  # fmt: skip
        return decoded, seconds

    def _take(self, slot: Slot, token_C: np.ndarray, accepted: np.ndarray, *logprobs: np.ndarray) -> Output:
        """Add the new tokens of a row to its slot; what they are, and whether the request ends."""
        request = slot.request
        assert request is not None
        tokens = [int(token) for token in token_C if token >= 0]
        K = request.top_logprobs
        slot.tokens += tokens
        slot.new_tokens += tokens
        slot.cached = slot.tokens[:-1]
        slot.written = max(slot.written, len(slot.tokens) + self._draft_tokens)
        if slot.constraint is not None:
            slot.constraint.accept(tokens[0])
        reason = request.finish_reason(slot.new_tokens)
        if reason is not None:
            slot.request = None
        elif request.slide:
            slot.slide(self._context_length)
        return Output(
            tokens,
            reason,
            [] if K is None else token_logprobs(tokens, K, *logprobs),
            int(accepted) if self._draft_tokens else None,
        )

    def _length(self, lengths: Iterable[int]) -> int:
        """Positions of the cache that rows of these lengths need."""
        return bucket_of(min(max(lengths), self.max_length), self._lengths)

    def _slot_numbers(self, rows: Sequence[int], B: int) -> np.ndarray:
        """The slots of `rows`, int32 [B], as `Rows.slot_B` has them."""
        if self.num_slots == B:
            return np.arange(B, dtype=np.int32)
        return np.asarray([*rows, *[self.num_slots] * (B - len(rows))], np.int32)

    def _places(self, rows: Sequence[int], B: int) -> Sequence[int]:
        """Where the slots `rows` are in a batch of B rows."""
        return rows if self.num_slots == B else range(len(rows))

    def _rows(
        self, rows: Sequence[int], B: int, length: int, allowed: Mapping[int, np.ndarray]
    ) -> tuple[Rows, np.ndarray, np.ndarray | None]:
        """The arguments of `decode` for the slots `rows` in a batch of B: settings, allowed tokens and history."""
        batch = [IDLE] * B
        allowed_BW = np.zeros((B, self._words), np.uint32)
        history_BS = np.full((B, length), -1, np.int32) if self._draft_tokens and self._draft is None else None
        for row, index in zip(self._places(rows, B), rows, strict=True):
            slot = self._slots[index]
            batch[row] = slot.row(self._context_length)
            if index in allowed:
                allowed_BW[row] = allowed[index]
            if history_BS is not None:
                history_BS[row, : len(slot.tokens)] = slot.tokens
        return stacked(batch)._replace(slot_B=self._slot_numbers(rows, B)), allowed_BW, history_BS

    def _run(self, name: str, program: Any, *arguments: Any, **static: Any) -> tuple[Any, float]:
        """The result of a program, and its seconds without compilation. `name` tells it from all others."""
        with on_mesh(self._mesh):
            if name not in self.programs:
                self.programs.append(name)
                _log.debug("compiling %s", name)
                with phase(f"compiling {name}"):
                    program.lower(*arguments, **static).compile()
            started = time.perf_counter()
            result = jax.block_until_ready(program(*arguments, **static))
        self._calls += 1
        return result, time.perf_counter() - started


def require_length(name: str, num_tokens: int, max_new_tokens: int, context_length: int) -> None:
    """Raise InputError, which names the prompt, if its tokens and the new ones exceed the context."""
    if num_tokens + max_new_tokens > context_length:
        raise InputError(
            f"{name} has {num_tokens} tokens, and with max_new_tokens {max_new_tokens} exceeds the model's "
            f"context_length {context_length}; shorten it, lower max_new_tokens, or slide (--slide, slide=True)"
        )


def _shared(tokens: Sequence[int], others: Sequence[int]) -> int:
    """The length of the common beginning."""
    length = min(len(tokens), len(others))
    if not length or tokens[0] != others[0]:
        return 0
    differ = np.asarray(tokens[:length]) != np.asarray(others[:length])
    return int(differ.argmax()) if differ.any() else length
