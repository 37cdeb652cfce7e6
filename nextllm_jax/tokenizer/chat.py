"""Chat templates: format messages as text, encode them, and mask the assistant's tokens.

Neither templates nor messages are trusted. A template runs in a sandbox without access to Python objects, and a control
token in the text of a message is encoded as ordinary text.
"""

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.backends import match_any
from nextllm_jax.tokenizer.tokenizer import Tokenizer

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | ..., "content": text}, and other keys that the template supports."""


class _Marks(NamedTuple):
    """Private-use characters that occur neither in the messages nor in the template."""

    ordinary: str
    """Inserted into a control token in a message, so that it is encoded as ordinary text."""
    begin: str
    """Marks the start of a generation block."""
    end: str
    """Marks the end of a generation block."""


class ChatTemplate:
    """A tokenizer's chat template, or the Jinja template `source` instead of it.

    Raises InputError if there is no template, if it is not valid Jinja, or if the jinja2 package is missing.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        source = tokenizer.chat_template if source is None else source
        if source is None:
            raise InputError(
                f"{tokenizer.name} has no chat template; pass --chat-template FILE with the Jinja template of its model"
            )
        self._tokenizer = tokenizer
        self._source = source
        self._environment = _environment()
        self._template = self._guard(lambda: self._environment.from_string(source))
        # Added tokens that the template uses are control tokens too, even if they are not special.
        added = [token for token in tokenizer.backend.added_tokens if token.strip() and token in source]
        self._special = _spelled(tokenizer.special_tokens)
        self._control = _spelled([*tokenizer.special_tokens, *added])

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of the messages, optionally with the start of the assistant's turn. Raises InputError."""
        marks = self._unused(messages)
        return _without(self._render(messages, marks, add_generation_prompt), marks)

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The ids of the text, in which only the template's control tokens count as such. Raises InputError."""
        marks = self._unused(messages)
        rendered = self._render(messages, marks, add_generation_prompt)
        return self._ids(rendered.replace(marks.begin, "").replace(marks.end, ""), marks)

    def encode_with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation, and a mask of the assistant's tokens, including its end token.

        The mask covers the template's generation blocks or, if it has none, what follows the start of each turn of the
        assistant. Raises InputError if the turns cannot be located.
        """
        marks = self._unused(messages)
        rendered = self._render(messages, marks, False)
        if marks.begin in rendered:
            text, spans = _spans(rendered, marks)
            ends = None
        else:
            text, spans = rendered, self._turns(messages, rendered, marks)
            ends = self._tokenizer.stop_ids
        ids = self._ids(text, marks)
        mask = [False] * len(ids)
        for start, stop in spans:
            first, last = (_common(self._ids(text[:offset], marks), ids) for offset in (start, stop))
            while ends and last > first and ids[last - 1] not in ends and set(ids[first:last]) & set(ends):
                last -= 1  # the model does not generate what the template writes after the end token
            mask[first:last] = [True] * (last - first)
        return ids, mask

    def _turns(self, messages: Sequence[Message], text: str, marks: _Marks) -> list[tuple[int, int]]:
        """(start, stop) of each assistant message in the text, found by rendering the messages up to it."""
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._render(messages[:i], marks, True)
            after = self._render(messages[: i + 1], marks, False)
            if not (after.startswith(before) and text.startswith(after)):
                raise InputError(
                    "the chat template formats earlier messages differently when others follow, so the assistant's "
                    "tokens cannot be located; add {% generation %} blocks to it"
                )
            spans.append((len(before), len(after)))
        return spans

    def _render(self, messages: Sequence[Message], marks: _Marks, add_generation_prompt: bool) -> str:
        """The rendered text, with `marks.ordinary` inserted into control tokens of the messages."""
        self._environment.globals["_generation_marks"] = (marks.begin, marks.end)
        marked = [self._mark(message, marks.ordinary) for message in messages]
        names = self._tokenizer.roles.names
        return self._guard(
            lambda: self._template.render(
                messages=marked, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **names
            )
        )

    def _mark(self, message: Message, mark: str) -> Message:
        # The assistant may write added tokens such as those of tool calls, but no special tokens.
        pattern = self._special if message.get("role") == "assistant" else self._control

        def marked(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda found: found[0][0] + mark + found[0][1:], value) if pattern else value
            if isinstance(value, dict):
                return {key: marked(item) for key, item in value.items()}
            return [marked(item) for item in value] if isinstance(value, list | tuple) else value

        return marked(message)

    def _ids(self, text: str, marks: _Marks) -> list[int]:
        if marks.ordinary not in text:
            return self._tokenizer.encode(text, recognize="all")
        ids: list[int] = []
        control = set(self._tokenizer.special_tokens.values())
        for part in self._tokenizer.backend.split(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            new = self._tokenizer.encode(part.replace(marks.ordinary, ""), recognize="none")
            if control & set(new):
                raise InputError("a message contains a control token that cannot be encoded as text; remove it")
            ids += new
        return ids

    def _unused(self, messages: Sequence[Message]) -> _Marks:
        used = self._source + json.dumps(messages, ensure_ascii=False, default=str)
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        return _Marks(next(free), next(free), next(free))

    def _guard(self, call: Any) -> Any:
        """The result of a call into Jinja. Any exception becomes an InputError."""
        import jinja2

        try:
            return call()
        except jinja2.exceptions.SecurityError as error:
            raise InputError(f"the chat template accesses a forbidden attribute ({error}); use another one") from error
        except _Refused as error:
            raise InputError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # a template can raise anything
            raise InputError(f"the chat template fails on these messages ({error}); pass another") from error


class _Refused(Exception):
    """Raised by a template's call of `raise_exception`."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _environment() -> Any:
    """A sandboxed Jinja environment with the features that templates on the Hugging Face Hub expect.

    These are trimmed blocks, loop controls, generation blocks, `tojson` without HTML escapes, `raise_exception` and
    `strftime_now`. Raises InputError if the jinja2 package is missing.
    """
    try:
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError as error:
        raise InputError("chat templates need the jinja2 package; pip install 'nextllm_jax[interop]'") from error

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            # Jinja's default returns an empty value, so the failure would go unnoticed.
            raise jinja2.exceptions.SecurityError(f"{type(obj).__name__}.{attribute}")

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            begin, end = self.environment.globals["_generation_marks"]
            return begin + caller() + end

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _spelled(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for the tokens of more than one character, into which a mark can be inserted."""
    return match_any([token for token in tokens if len(token) > 1])


def _without(text: str, marks: _Marks) -> str:
    return text.translate({ord(mark): None for mark in marks})


def _spans(text: str, marks: _Marks) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks around generation blocks, and (start, stop) of each block in it."""
    spans: list[tuple[int, int]] = []
    pieces = re.split(f"[{marks.begin}{marks.end}]", text)
    offset = 0
    for i, piece in enumerate(pieces):
        if i % 2:
            spans.append((offset, offset + len(piece)))
        offset += len(piece)
    return "".join(pieces), spans


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """The length of the common prefix of two sequences of ids."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
