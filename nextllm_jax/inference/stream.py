"""Turns generated tokens into text on the host: incremental decoding, stop strings, finished samples."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from nextllm_jax.inference.decode import CHUNK_TOKENS
from nextllm_jax.inference.request import FinishReason, Output, Request, TokenLogprob
from nextllm_jax.inference.scheduler import Scheduler
from nextllm_jax.inference.speeds import Speeds
from nextllm_jax.tokenizer.tokenizer import IncrementalDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Sample:
    """One finished continuation of a prompt."""

    prompt: str
    text: str
    """The generated text, without the prompt and without the stop string or stop token."""
    tokens: list[int]
    """All generated ids, including the one that ended the sample."""
    finish_reason: FinishReason
    """stop: a stop token or stop string; length: max_new_tokens are reached, or no token may follow."""
    logprobs: list[TokenLogprob] | None = None
    """The log probabilities of the tokens, if they were asked for."""
    accepted_drafts: int | None = None
    """Number of tokens that were guessed correctly, with speculative decoding."""

    def as_dict(self) -> dict[str, Any]:
        """The sample for JSON, without the fields that are None."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Piece:
    """New text of one row. The last piece of a row has its finished sample."""

    row: int
    text: str
    sample: Sample | None = None


class StopFinder:
    """Passes text on up to the first stop string, and holds back an end that may be the start of one.

    The first stop string is the one that ends first. If several end at the same character, it is the one that starts
    first. So the result does not depend on how the text is split into pushes. Stop strings must not be empty.

    A stop string may contain the spelling of a control token, but neither starts nor ends inside of one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._inside: set[int] = set()  # positions in the held text that are inside of a control token
        self.found = False

    def push(self, text: str, *, is_control: bool = False) -> str:
        """The additional text that is certain to precede any stop string; `text` may be a control token's spelling."""
        if self.found:
            return ""
        if is_control:
            self._inside.update(range(len(self._held) + 1, len(self._held) + len(text)))
        self._held += text
        if matches := [match for stop in self._stops for match in self._matches(stop)]:
            self.found = True
            return self._release(min(matches)[1])
        return self._release(len(self._held) - self._undecided())

    def finish(self) -> str:
        """The text that is still held back, at the end of the text."""
        return "" if self.found else self._release(len(self._held))

    def _matches(self, stop: str) -> Iterator[tuple[int, int]]:
        """(end, start) of each place where the held text has the stop string."""
        start = self._held.find(stop)
        while start >= 0:
            if self._inside.isdisjoint((start, start + len(stop))):
                yield start + len(stop), start
            start = self._held.find(stop, start + 1)

    def _undecided(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = min(len(self._held), max(map(len, self._stops), default=0))
        ends = (length for length in range(longest, 0, -1) if self._begins_stop(len(self._held) - length))
        return next(ends, 0)

    def _begins_stop(self, start: int) -> bool:
        return start not in self._inside and any(stop.startswith(self._held[start:]) for stop in self._stops)

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        self._inside = {position - length for position in self._inside if position > length}
        return released


class TextRow:
    """The text of one row, from its new tokens to a finished Sample."""

    def __init__(self, prompt: str, tokenizer: Tokenizer, stops: Sequence[str], *, with_logprobs: bool) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.text = ""
        self.logprobs: list[TokenLogprob] | None = [] if with_logprobs else None
        self.accepted_drafts: int | None = None
        self.finish_reason: FinishReason | None = None
        self._decoder = IncrementalDecoder(tokenizer)
        self._control = frozenset(tokenizer.special_tokens.values())
        self._finder = StopFinder(stops)

    def push(self, output: Output) -> str:
        """The new text; sets `finish_reason` if the row ends in these tokens."""
        text = ""
        if output.accepted is not None:
            self.accepted_drafts = (self.accepted_drafts or 0) + output.accepted
        ends_at = len(output.tokens) - 1 if output.finish_reason == "stop" else None
        for i, token in enumerate(output.tokens):
            self.tokens.append(token)
            if self.logprobs is not None:
                self.logprobs.append(output.logprobs[i])
            if i == ends_at:
                break
            is_control = token in self._control
            if is_control:  # the text before it is complete
                text += self._finder.push(self._decoder.finish())
            text += self._finder.push(self._decoder.push([token]), is_control=is_control)
            if self._finder.found:
                break
        self.finish_reason = "stop" if self._finder.found else output.finish_reason
        if self.finish_reason is not None and not self._finder.found:
            text += self._finder.push(self._decoder.finish()) + self._finder.finish()
        self.text += text
        return text

    def sample(self) -> Sample | None:
        """The finished sample; None while more tokens follow."""
        if self.finish_reason is None:
            return None
        return Sample(self.prompt, self.text, self.tokens, self.finish_reason, self.logprobs, self.accepted_drafts)


class TextStream:
    """The texts of requests, as an iterator over pieces that can be read once. Row i is that of requests[i].

    All rows advance together by at most `chunk_tokens` tokens, the first time by one, and then yield their pieces, so
    the rows alternate. If the iterator is closed early, the requests end.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        prompts: Sequence[str],
        *,
        stop: Sequence[str],
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self._scheduler = scheduler
        self._rows = [
            TextRow(prompt, tokenizer, stop, with_logprobs=request.top_logprobs is not None)
            for prompt, request in zip(prompts, requests, strict=True)
        ]
        self._numbers = {scheduler.submit(request): row for row, request in enumerate(requests)}
        self._chunk_tokens = chunk_tokens
        self.max_new = sum(request.max_new_tokens for request in requests)
        """The `num_new` of rows that all get their maximum number of tokens."""

    def __iter__(self) -> Iterator[Piece]:
        limit = 1  # so the first text comes at once
        try:
            while not self._scheduler.done:
                outputs, limit = self._scheduler.advance(limit), self._chunk_tokens
                for number, output in outputs.items():
                    index = self._numbers[number]
                    row = self._rows[index]
                    text = row.push(output)
                    sample = row.sample()
                    if sample is not None:
                        self._scheduler.cancel(number)
                    if text or sample is not None:
                        yield Piece(index, text, sample)
        finally:
            self._scheduler.close()

    def in_order(self) -> Iterator[Piece]:
        """The same pieces, ordered by row. Those of the first unfinished row come at once; later rows are held back."""
        waiting: list[list[Piece]] = [[] for _ in self._rows]
        current = 0
        for piece in self:
            waiting[piece.row].append(piece)
            while current < len(waiting) and waiting[current]:
                first = waiting[current].pop(0)
                yield first
                current += first.sample is not None

    @property
    def num_new(self) -> int:
        """Number of new tokens so far, summed over rows."""
        return sum(len(row.tokens) for row in self._rows)

    @property
    def speeds(self) -> Speeds:
        """Tokens and seconds of prefill and decode of the engine so far."""
        return self._scheduler.engine.speeds
