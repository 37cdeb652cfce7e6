"""Answers in OpenAI's JSON: completions and chats, whole and in chunks, with log probabilities and usage."""

import abc
import dataclasses
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from nextllm_jax.inference.request import FinishReason, TokenLogprob
from nextllm_jax.serving.model import Row
from nextllm_jax.serving.worker import Update
from nextllm_jax.tokenizer.tokenizer import IncrementalDecoder, Tokenizer

DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event with a JSON object."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


@dataclasses.dataclass
class Choice:
    """What a row has so far."""

    row: Row
    text: str = ""
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    finish_reason: FinishReason | None = None


class Answer(abc.ABC):
    """The answer to one request. `add` the updates of its rows, whose `chunk`s are sent, or take the `whole`."""

    object: str
    chunk_object: str

    def __init__(self, prefix: str, model: str, tokenizer: Tokenizer, rows: Sequence[Row]) -> None:
        self.tokenizer = tokenizer
        self.choices = [Choice(row) for row in rows]
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def add(self, index: int, update: Update) -> None:
        """Add what is new in a row."""
        choice = self.choices[index]
        choice.text += update.text
        choice.prompt_logprobs = update.prompt_logprobs or choice.prompt_logprobs
        choice.logprobs += update.logprobs
        choice.num_tokens, choice.finish_reason = update.num_tokens, update.finish_reason

    def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        choices = [self._whole_choice(choice) for choice in self.choices]
        return {"object": self.object, **self._head, "choices": choices, "usage": self.usage()}

    def chunk(self, index: int, update: Update) -> dict[str, Any] | None:
        """The chunk with what is new in a row; None if there is nothing to show yet."""
        shown = self._chunk_choice(self.choices[index].row, update)
        return shown and {"object": self.chunk_object, **self._head, "choices": [shown]}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before all others."""
        return []

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, with the usage."""
        return {"object": self.chunk_object, **self._head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """The tokens of the request. A prompt counts once, whatever the number of its samples."""
        prompts = [choice.row.request for choice in self.choices if choice.row.request.sample == 0]
        read, new = sum(len(request.tokens) for request in prompts), sum(each.num_tokens for each in self.choices)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}

    @abc.abstractmethod
    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        """A finished row."""

    @abc.abstractmethod
    def _chunk_choice(self, row: Row, update: Update) -> dict[str, Any] | None:
        """What is new in a row."""


class CompletionAnswer(Answer):
    """The answer of /v1/completions. With `echo`, texts begin with the prompt."""

    object = chunk_object = "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, rows: Sequence[Row], *, echo: bool) -> None:
        super().__init__("cmpl", model, tokenizer, rows)
        self._echo = echo
        self._streamed = [self._lists(row) for row in rows]
        self._opened: set[int] = set()

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        row, lists = choice.row, self._lists(choice.row)
        logprobs = lists.of(choice.prompt_logprobs, choice.logprobs)
        text = (row.prompt if self._echo else "") + choice.text
        return {
            "index": row.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason
        }  # fmt: skip

    def _chunk_choice(self, row: Row, update: Update) -> dict[str, Any] | None:
        logprobs = self._streamed[row.index].of(update.prompt_logprobs, update.logprobs)
        text = (row.prompt if self._echo and row.index not in self._opened else "") + update.text
        if not text and not update.logprobs and update.finish_reason is None:
            return None
        self._opened.add(row.index)
        return {"index": row.index, "text": text, "logprobs": logprobs, "finish_reason": update.finish_reason}

    def _lists(self, row: Row) -> "_LogprobLists":
        return _LogprobLists(self.tokenizer, row, offset=0 if self._echo else len(row.prompt))


class _LogprobLists:
    """The log probabilities of a row in the form of /v1/completions. `offset` is where its first token begins."""

    def __init__(self, tokenizer: Tokenizer, row: Row, *, offset: int) -> None:
        self._tokenizer, self._row, self._offset = tokenizer, row, offset
        self._decoder = IncrementalDecoder(tokenizer)

    def of(
        self, prompt_logprobs: Sequence[TokenLogprob] | None, logprobs: Sequence[TokenLogprob]
    ) -> dict[str, list[Any]] | None:
        """The lists for the next tokens; None if the row has no log probabilities. The first of a prompt has none."""
        if self._row.request.top_logprobs is None:
            return None
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if prompt_logprobs is not None:
            self._add(found, self._row.request.tokens[0], None, None)
        for each in (*(prompt_logprobs or ()), *logprobs):
            self._add(found, each.id, each.logprob, self._top(each))
        return found

    def _add(self, found: dict[str, list[Any]], id: int, logprob: float | None, top: dict[str, float] | None) -> None:
        found["tokens"].append(self._tokenizer.decode([id]))
        found["token_logprobs"].append(logprob)
        found["top_logprobs"].append(top)
        found["text_offset"].append(self._offset)
        self._offset += len(self._decoder.push([id]))

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and the token itself. Of several with the same text, the most likely one counts."""
        top: dict[str, float] = {}
        for id, value in (*logprob.top, (logprob.id, logprob.logprob)):
            top.setdefault(self._tokenizer.decode([id]), value)
        return top


class ChatAnswer(Answer):
    """The answer of /v1/chat/completions."""

    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Tokenizer, rows: Sequence[Row]) -> None:
        super().__init__("chatcmpl", model, tokenizer, rows)

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        shown = [
            {"index": each.row.index, "delta": delta, "logprobs": None, "finish_reason": None} for each in self.choices
        ]
        return [{"object": self.chunk_object, **self._head, "choices": [choice]} for choice in shown]

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.row.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.row, choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _chunk_choice(self, row: Row, update: Update) -> dict[str, Any] | None:
        if not update.text and not update.logprobs and update.finish_reason is None:
            return None
        return {
            "index": row.index,
            "delta": {"content": update.text} if update.text else {},
            "logprobs": self._logprobs(row, update.logprobs),
            "finish_reason": update.finish_reason,
        }

    def _logprobs(self, row: Row, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if row.request.top_logprobs is None:
            return None
        return {
            "content": [
                {
                    **self._token(each.id, each.logprob),
                    "top_logprobs": [self._token(id, value) for id, value in each.top],
                }
                for each in logprobs
            ],
            "refusal": None,
        }

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.decode_bytes([id])
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}
