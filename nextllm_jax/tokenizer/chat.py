"""Chat templates: messages to text in a sandbox, to ids, and which ids are the assistant's.

A template is a program of the model's makers, and a message may come from anyone. So the template runs where it can
reach nothing of Python's, and a control token that a message spells out stays ordinary text.
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
"""{"role": "system" | "user" | "assistant" | ..., "content": text}, and what else a template knows."""


class _Marks(NamedTuple):
    """Characters of a private area that neither messages nor template use."""

    ordinary: str
    """Stands inside a control token that a message spells out."""
    begin: str
    """Begins what the template says the assistant generates."""
    end: str
    """Ends it."""


class ChatTemplate:
    """A tokenizer's chat template, or the Jinja `source` instead of it.

    Raises InputError if there is none, if it is no Jinja, or without the jinja2 package.
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
        # Tokens that are not special may be control tokens all the same: the template writes them.
        added = [token for token in tokenizer.backend.added_tokens if token.strip() and token in source]
        self._special = _spelled(tokenizer.special_tokens)
        self._control = _spelled([*tokenizer.special_tokens, *added])

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """What the model reads; with the opening of the assistant's turn if asked. Raises InputError."""
        marks = self._unused(messages)
        return _without(self._render(messages, marks, add_generation_prompt), marks)

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of the text, where only the template's own control tokens are control tokens. Raises InputError."""
        marks = self._unused(messages)
        rendered = self._render(messages, marks, add_generation_prompt)
        return self._ids(rendered.replace(marks.begin, "").replace(marks.end, ""), marks)

    def encode_with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and which of them the assistant is to generate, its end token included.

        They are what stands in the template's generation blocks or, if it has none, what follows the opening of each
        turn of the assistant. Raises InputError if neither tells.
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
            first, last = (_common(self._ids(text[:place], marks), ids) for place in (start, stop))
            while ends and last > first and ids[last - 1] not in ends and set(ids[first:last]) & set(ends):
                last -= 1  # what the template writes behind the end token is not generated
            mask[first:last] = [True] * (last - first)
        return ids, mask

    def _turns(self, messages: Sequence[Message], text: str, marks: _Marks) -> list[tuple[int, int]]:
        """Where each message of the assistant stands in the text, by rendering what comes before it and with it."""
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._render(messages[:i], marks, True)
            after = self._render(messages[: i + 1], marks, False)
            if not (after.startswith(before) and text.startswith(after)):
                raise InputError(
                    "the chat template writes earlier messages in another way once others follow, so the assistant's "
                    "tokens cannot be told; put {% generation %} blocks into it"
                )
            spans.append((len(before), len(after)))
        return spans

    def _render(self, messages: Sequence[Message], marks: _Marks, add_generation_prompt: bool) -> str:
        """The template's text, with `marks.ordinary` in the control tokens that messages spell out."""
        self._environment.globals["_generation_marks"] = (marks.begin, marks.end)
        marked = [self._mark(message, marks.ordinary) for message in messages]
        names = self._tokenizer.roles.names
        return self._guard(
            lambda: self._template.render(
                messages=marked, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **names
            )
        )

    def _mark(self, message: Message, mark: str) -> Message:
        # What the assistant says is the model's own, but for the tokens that nothing should say.
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
                raise InputError("a message spells out a control token that cannot be told from text; take it out")
            ids += new
        return ids

    def _unused(self, messages: Sequence[Message]) -> _Marks:
        used = self._source + json.dumps(messages, ensure_ascii=False, default=str)
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        return _Marks(next(free), next(free), next(free))

    def _guard(self, call: Any) -> Any:
        """The result of a call into Jinja, whose failures become one sentence."""
        import jinja2

        try:
            return call()
        except jinja2.exceptions.SecurityError as error:
            raise InputError(f"the chat template reaches for what it may not ({error}); use another one") from error
        except _Refused as error:
            raise InputError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # a template can raise anything
            raise InputError(f"the chat template fails on these messages ({error}); pass another") from error


class _Refused(Exception):
    """A template's own complaint."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _environment() -> Any:
    """A sandboxed Jinja environment with what templates on the Hugging Face Hub expect.

    That is blocks without their line breaks, loop controls, generation blocks, `tojson` without HTML escapes,
    `raise_exception` and `strftime_now`. Raises InputError without the jinja2 package.
    """
    try:
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError as error:
        raise InputError("chat templates need the jinja2 package; pip install 'nextllm_jax[interop]'") from error

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            # Jinja's own hands out an empty value, which a template may print without anybody noticing.
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
    """A pattern for the tokens that a mark can be put into."""
    return match_any([token for token in tokens if len(token) > 1])


def _without(text: str, marks: _Marks) -> str:
    return text.translate({ord(mark): None for mark in marks})


def _spans(text: str, marks: _Marks) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks around generation blocks, and where the blocks stand in it."""
    spans: list[tuple[int, int]] = []
    pieces = re.split(f"[{marks.begin}{marks.end}]", text)
    place = 0
    for i, piece in enumerate(pieces):
        if i % 2:
            spans.append((place, place + len(piece)))
        place += len(piece)
    return "".join(pieces), spans


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
