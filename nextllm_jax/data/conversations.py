"""Conversations: rows with messages, encoded by a chat template, with a mask of the assistant's tokens.

Between reading and tokenizing, a conversation is a document. Its text is the JSON of its messages or, if the row has
tools, of {messages, tools}.
"""

import contextlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.chat import ChatTemplate, Message, Tools
from nextllm_jax.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_OTHER_NAMES |= {"observation": "tool", "function": "tool"}


class Encoded(NamedTuple):
    """A conversation as token ids."""

    ids: list[int]
    mask: list[bool]
    """True for the assistant's tokens, including its end token."""
    num_bytes: int
    """UTF-8 bytes of the text of the assistant's tokens; control tokens count as none."""


def conversation_text(messages: Any, tools: Any, where: str) -> str:
    """The document text for a row's messages, a list of {role, content, ...} without null members, and its tools.

    A message may have `from` and `value` instead, as in ShareGPT. The text of content in parts is joined by newlines,
    and content that is null next to tool calls becomes empty. The messages may also be an object of lists. The tools
    are null, or a list of JSON schemas or its JSON.

    Raises InputError, which names the location `where`, unless all messages have a known role and text and at least
    one is the assistant's, and for other tools.
    """
    if isinstance(messages, dict) and all(isinstance(column, list) for column in messages.values()):
        if len({len(column) for column in messages.values()}) > 1:
            raise InputError(f"{where}: the lists of the messages' members differ in length; fix or remove the row")
        columns = zip(*messages.values(), strict=True)
        messages = [dict(zip(messages, values, strict=True)) for values in columns]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{where}: the messages are not a list of {{role, content}}; fix or remove the row")
    messages = [_message(message, f"{where}: message {number}") for number, message in enumerate(messages, 1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no message is the assistant's, so the loss mask is empty; remove the row")
    tools = _tools(tools, where)
    return json.dumps({"messages": messages, "tools": tools} if tools else messages, ensure_ascii=True)


def _tools(tools: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(tools, str):
        with contextlib.suppress(ValueError, RecursionError):
            tools = json.loads(tools or "null")
    if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in tools or []):
        raise InputError(f"{where}: tools is not a list of JSON schemas, or its JSON; fix, rename or remove it")
    return tools or []


def _message(message: Message, where: str) -> Message:
    """A message with a known role and with text as its content."""
    message = {name: value for name, value in message.items() if value is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    if "function_call" in message and "tool_calls" not in message:  # the older form of a single call
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    role, content = message.get("role"), message.get("content")
    role = _OTHER_NAMES.get(str(role), role)
    if role not in ROLES:
        raise InputError(f"{where} has the role {role!r}; use one of {', '.join(ROLES)}")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part_text(part, f"{where}: part {i}") for i, part in enumerate(content, 1))
    if not isinstance(content, str):
        raise InputError(f"{where}: the content is {type(content).__name__}, not text; fix or remove the row")
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    return {"role": role, "content": content, **others}


def _part_text(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise InputError(f"{where} of the content has no text; fix or remove the row")
    return text


def messages_of(text: str) -> list[Message]:
    """The messages in a document's text."""
    content = json.loads(text)
    return content if isinstance(content, list) else content["messages"]


def tools_of(text: str) -> Tools:
    """The tools in a document's text; None if it has none."""
    content = json.loads(text)
    return None if isinstance(content, list) else content["tools"]


def ignored_by(template: ChatTemplate, text: str) -> list[str]:
    """What a document's text has and the template does not write: tools, tool_calls."""
    found = {"tools": text.startswith("{"), "tool_calls": '"tool_calls": ' in text}
    return [name for name, is_there in found.items() if is_there and template.ignores(name)]


def conversation_group(text: str) -> str:
    """What conversations with the same text share, whatever else their messages say, such as an id or a date."""
    names = ("role", "content", "tool_calls")
    return json.dumps([{name: message[name] for name in names if name in message} for message in messages_of(text)])


def contents_of(text: str) -> str:
    """The contents of all messages in a document's text, joined; used to train a tokenizer."""
    return "\n".join(message["content"] for message in messages_of(text))


def encode_conversation(tokenizer: Tokenizer, template: ChatTemplate, text: str, where: str) -> list[Encoded]:
    """The ids that the template gives for a conversation; nothing is added before or after them.

    These are several sequences if the template rewrites earlier turns; see `ChatTemplate.encode_with_mask`.

    Raises InputError, which names the location `where`, if the template rejects the conversation or if the assistant's
    tokens cannot be determined.
    """
    messages = messages_of(text)
    if "developer" not in (tokenizer.chat_template or ""):
        # The role is a newer name for system, which many templates do not know and would drop.
        messages = [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]
    try:
        sequences = template.encode_with_mask(messages, tools=tools_of(text))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if not any(True in mask for _, mask in sequences):
        raise InputError(f"{where}: the chat template writes no assistant text; fix or remove the row")
    return [Encoded(ids, mask, _num_bytes(tokenizer, ids, mask)) for ids, mask in sequences]


def _num_bytes(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[bool]) -> int:
    control = set(tokenizer.special_tokens.values())
    said = [token for token, is_said in zip(ids, mask, strict=True) if is_said and token not in control]
    return len(tokenizer.decode_bytes(said))
