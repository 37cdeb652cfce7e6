"""`nextllm chat --server`: a conversation with a model of `nextllm serve`."""

import dataclasses
import http.client
import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from nextllm_jax.cli.serve import KEY_VARIABLE
from nextllm_jax.config import SamplingConfig
from nextllm_jax.errors import InputError, RunFailed

_LEAST_BIAS = -100
"""OpenAI's bias for a token that must not be generated. JSON has no -inf."""


def server_settings(sampling: SamplingConfig) -> dict[str, Any]:
    """The fields of a request for these settings. Raises InputError for those that a server does not have."""
    fields = dataclasses.asdict(sampling)
    for name in ("regex", "grammar"):
        if fields.pop(name) is not None:
            raise InputError(f"--{name} does not go with --server; use --json-schema, or leave it out")
    fields["min_tokens"] = fields.pop("min_new_tokens")
    fields["logit_bias"] = {
        token: _LEAST_BIAS if bias == -math.inf else bias for token, bias in sampling.biases.items()
    }
    if (text := fields.pop("json_schema")) is not None:
        try:
            schema = {"schema": json.loads(text)}
        except ValueError as error:
            raise InputError(f"--json-schema is not JSON: {error}") from error
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


class ServerConversation:
    """A conversation like `inference.chat.Conversation`, with the model on a server.

    `settings` are fields of /v1/chat/completions. Raises InputError if the server refuses a request, and RunFailed if
    it cannot be reached or does not finish its answer.
    """

    def __init__(self, server: str, *, model: str | None, system: str | None, settings: dict[str, Any]) -> None:
        address = server.rstrip("/").removesuffix("/v1")
        if not address.startswith(("http://", "https://")):
            raise InputError(f"--server is {server!r}; it must be a URL, such as http://127.0.0.1:8000")
        self._url = f"{address}/v1/chat/completions"
        self._settings = settings if model is None else {"model": model, **settings}
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.sample = None
        self.is_full = False
        """Whether the last answer ended because the model's context was full."""
        self.reset()

    def reset(self) -> None:
        """Remove all messages except the system message."""
        self.messages = list(self._opening)

    def say(self, text: str) -> Iterator[str]:
        """The model's answer in pieces. When all have been read, the message and it are part of the conversation."""
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        for choice in self._choices({**self._settings, "messages": messages, "stream": True}):
            self.is_full = choice["finish_reason"] == "length" and self._settings["max_tokens"] is None
            piece = choice["delta"].get("content") or ""
            answer += piece
            if piece:
                yield piece
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _choices(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        try:
            request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request) as response:
                for line in response:
                    if line.startswith(b"data: [DONE]"):
                        return
                    if line.startswith(b"data: {"):
                        event = json.loads(line.removeprefix(b"data: "))
                        if "error" in event:
                            raise RunFailed(f"the server says: {event['error']['message']}")
                        yield from event["choices"]
                raise RunFailed("the connection to the server ended before the answer did")
        except urllib.error.HTTPError as error:
            raise InputError(f"the server says: {_message(error)}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no URL, or no JSON
            reason = " ".join(str(getattr(error, "reason", error)).split())
            raise RunFailed(f"{self._url} cannot be reached ({reason}); is nextllm serve running there?") from error


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong."""
    try:
        return json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError):
        return f"{error.code} {error.reason}"
