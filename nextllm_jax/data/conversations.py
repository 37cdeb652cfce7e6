"""Conversations: rows with messages, as ids by a chat template, and which of them the assistant is to say.

On its way from a row to tokens a conversation is a document whose text is the JSON of its messages.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.chat import ChatTemplate, Message
from nextllm_jax.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


class Encoded(NamedTuple):
    """A conversation in ids."""

    ids: list[int]
    mask: list[bool]
    """True for what the assistant is to say, its end token included."""
    num_bytes: int
    """UTF-8 bytes of the text of these; control tokens have none."""


def conversation_text(messages: Any, where: str) -> str:
    """The text of the document that a row's messages become.

    Raises InputError, naming `where` they are, if they are not messages with known roles and text, the assistant's
    among them.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{where}: the messages are no list of {{role, content}}; fix or remove the row")
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"{where}: message {number} has the role {role!r}; there are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"{where}: the content of message {number} is {type(content).__name__}, not text; fix it")
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no message is the assistant's, so that there is nothing to learn; remove the row")
    return json.dumps(messages, ensure_ascii=True)


def messages_of(text: str) -> list[Message]:
    """The messages in a document's text."""
    return json.loads(text)


def words_of(text: str) -> str:
    """What is said in a conversation, for a tokenizer to be trained on."""
    return "\n".join(message["content"] for message in messages_of(text))


def encode_conversation(tokenizer: Tokenizer, template: ChatTemplate, text: str, where: str) -> Encoded:
    """A conversation as the template writes it, without anything around.

    Raises InputError, naming `where` it is, if the template refuses it or does not tell what the assistant says.
    """
    try:
        ids, mask = template.encode_with_mask(messages_of(text))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if not any(mask):
        raise InputError(f"{where}: the chat template writes nothing that the assistant says; fix or remove the row")
    return Encoded(ids, mask, _num_bytes(tokenizer, ids, mask))


def _num_bytes(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[bool]) -> int:
    control = set(tokenizer.special_tokens.values())
    said = [token for token, is_said in zip(ids, mask, strict=True) if is_said and token not in control]
    return len(tokenizer.decode_bytes(said))
