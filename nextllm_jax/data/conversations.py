"""Conversations: rows with messages, encoded by a chat template, with a mask of the assistant's tokens.

Between reading and tokenizing, a conversation is a document whose text is the JSON of its messages.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.chat import ChatTemplate, Message
from nextllm_jax.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


class Encoded(NamedTuple):
    """A conversation as token ids."""

    ids: list[int]
    mask: list[bool]
    """True for the assistant's tokens, including its end token."""
    num_bytes: int
    """UTF-8 bytes of the text of the assistant's tokens; control tokens count as none."""


def conversation_text(messages: Any, where: str) -> str:
    """The document text for a row's messages: their JSON.

    Raises InputError, which names the location `where`, unless all messages have a known role and text and at least
    one is the assistant's.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{where}: the messages are not a list of {{role, content}}; fix or remove the row")
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"{where}: message {number} has the role {role!r}; use one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"{where}: the content of message {number} is {type(content).__name__}, not text; fix it")
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no message is the assistant's, so the loss mask is empty; remove the row")
    return json.dumps(messages, ensure_ascii=True)


def messages_of(text: str) -> list[Message]:
    """The messages in a document's text."""
    return json.loads(text)


def contents_of(text: str) -> str:
    """The contents of all messages in a document's text, joined; used to train a tokenizer."""
    return "\n".join(message["content"] for message in messages_of(text))


def encode_conversation(tokenizer: Tokenizer, template: ChatTemplate, text: str, where: str) -> list[Encoded]:
    """The ids that the template gives for a conversation; nothing is added before or after them.

    These are several sequences if the template rewrites earlier turns; see `ChatTemplate.encode_with_mask`.

    Raises InputError, which names the location `where`, if the template rejects the conversation or if the assistant's
    tokens cannot be determined.
    """
    try:
        sequences = template.encode_with_mask(messages_of(text))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if not any(True in mask for _, mask in sequences):
        raise InputError(f"{where}: the chat template writes no assistant text; fix or remove the row")
    return [Encoded(ids, mask, _num_bytes(tokenizer, ids, mask)) for ids, mask in sequences]


def _num_bytes(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[bool]) -> int:
    control = set(tokenizer.special_tokens.values())
    said = [token for token, is_said in zip(ids, mask, strict=True) if is_said and token not in control]
    return len(tokenizer.decode_bytes(said))
