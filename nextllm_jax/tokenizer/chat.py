"""Chat templates: format messages as text, encode them, and mask the assistant's tokens.

Neither templates nor messages are trusted. A template runs in a sandbox without access to Python objects, and a control
token in the text of a message is encoded as ordinary text.
"""

import datetime
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.backends import match_any
from nextllm_jax.tokenizer.control_tokens import control_tokens
from nextllm_jax.tokenizer.tokenizer import Tokenizer, without_surrogates

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | ..., "content": text}, and other keys that the template supports.

An assistant's message with `weight` 0 or `train` false is not in the loss mask.
"""
Tools = Sequence[dict[str, Any]] | None
"""JSON schemas of functions that the assistant may call, which a template writes before the messages."""

_TRAINING_DATE = datetime.datetime(2024, 7, 26)  # the date in Llama 3's template if it has no clock
_PLACEHOLDER = re.compile(r"%\w|\{\w*\}")


class _Marks(NamedTuple):
    """Private-use characters that occur neither in the messages nor in the template."""

    ordinary: str
    """Inserted into a control token in a message, which is then encoded as ordinary text."""
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
        source = without_surrogates(source)
        self._tokenizer = tokenizer
        self._source = source
        self._environment = _environment()
        self._template = self._guard(lambda: self._environment.from_string(source))
        # Added tokens that the template writes are control tokens too, even if they are not special. The assistant may
        # write those that the template has as a whole, such as those of tool calls, but none that belong to turns.
        added = [token for token in tokenizer.backend.added_tokens if token.strip()]
        literals = self._guard(lambda: list(_literals(self._environment, source)))
        ends = (token for token in added if tokenizer.backend.added_tokens[token] in tokenizer.stop_ids)
        turns = [*tokenizer.special_tokens, *_composed(added, literals), *ends]
        control = {*turns, *(token for token in added if token in source)}
        self._assistant_spellings, self._spellings = _Spellings(turns), _Spellings(control)
        self._control = frozenset(control)

    def text(self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = False) -> str:
        """The text of the messages, optionally with the start of the assistant's turn. Raises InputError."""
        return self._render(messages, tools, None, add_generation_prompt=add_generation_prompt)

    def encode(
        self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of the text, in which only the template's control tokens count as such. Raises InputError."""
        marks = self._unused(messages, tools)
        text, _ = _spans(self._render(messages, tools, marks, add_generation_prompt=add_generation_prompt), marks)
        return control_tokens(self._tokenizer.backend, self._control).encode(text, marks.ordinary)[0]

    def ignores(self, name: str) -> bool:
        """Whether the template never reads the variable or the member `name`, such as tools or tool_calls."""
        return not re.search(rf"\b{name}\b", self._source)

    def encode_with_mask(
        self, messages: Sequence[Message], *, tools: Tools = None
    ) -> list[tuple[list[int], list[bool]]]:
        """The ids of a whole conversation, and a mask of the assistant's tokens, including the end of its turns.

        The mask covers the template's generation blocks or, if it has none, what follows the start of each turn of the
        assistant, but no message with `weight` 0 or `train` false. Usually there is one sequence. If the template
        formats a turn differently when others follow, as those do that drop earlier thoughts, there are several: each
        then ends with the turns in its mask, as they were when the model wrote them.

        The ids depend only on the messages: the template's clock stands still. Raises InputError if the turns cannot be
        located.
        """
        marks = self._unused(messages, tools)
        trained = _trained(messages)
        text, spans = _spans(self._render(messages, tools, marks, now=_TRAINING_DATE), marks)
        if not spans:
            turns = self._turns(messages, tools, text, marks)
            return [self._masked(*sequence, marks, self._up_to_end) for sequence in turns]
        if not all(trained.values()):
            if len(trained) != len(spans):
                raise InputError(
                    f"the chat template has {len(spans)} generation blocks for {len(trained)} messages of the "
                    "assistant, so weight and train cannot be applied; remove them from the messages"
                )
            spans = [span for span, is_trained in zip(spans, trained.values(), strict=True) if is_trained]
        return [self._masked(text, spans, marks, self._with_end)]

    def writes_end(self) -> bool:
        """Whether the mask of a short conversation has a token that ends generated text; True if there is no mask."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ((ids, mask),) = self.encode_with_mask(messages)
        except (InputError, ValueError):
            return True
        return any(is_said and id in self._tokenizer.stop_ids for id, is_said in zip(ids, mask, strict=True))

    def _masked(
        self, text: str, spans: Sequence[tuple[int, int]], marks: _Marks, fitted: Callable[[list[int], int, int], int]
    ) -> tuple[list[int], list[bool]]:
        """The ids of a marked text, and a mask of the tokens in the spans, whose ends `fitted` corrects."""
        encoder = control_tokens(self._tokenizer.backend, self._control)
        ids, counts = encoder.encode(text, marks.ordinary, [cut for span in spans for cut in span])
        mask = [False] * len(ids)
        for (first, _), (_, last) in zip(counts[::2], counts[1::2], strict=True):
            last = fitted(ids, first, last)
            mask[first:last] = [True] * (last - first)
        return ids, mask

    def _up_to_end(self, ids: list[int], first: int, last: int) -> int:
        """The end of a turn without what the template writes after its last end token; the model does not write it."""
        return next((i for i in range(last, first, -1) if ids[i - 1] in self._tokenizer.stop_ids), last)

    def _with_end(self, ids: list[int], first: int, last: int) -> int:
        """The end of a generation block, with an end token that follows it, perhaps after whitespace."""
        stop_ids = self._tokenizer.stop_ids
        if last > first and ids[last - 1] in stop_ids:
            return last
        after = range(last, len(ids))
        following = next((i for i in after if not self._tokenizer.decode([ids[i]]).isspace()), len(ids))
        return following + 1 if following < len(ids) and ids[following] in stop_ids else last

    def _turns(
        self, messages: Sequence[Message], tools: Tools, text: str, marks: _Marks
    ) -> list[tuple[str, list[tuple[int, int]]]]:
        """The texts that hold each trained turn as it was written, with (start, stop) of these turns.

        A turn is what is added to a text when its message is added.
        """
        sequences: list[tuple[str, list[tuple[int, int]]]] = []
        for i, is_trained in _trained(messages).items():
            if not is_trained:
                continue
            before = self._render(messages[:i], tools, marks, add_generation_prompt=True, now=_TRAINING_DATE)
            after = self._render(messages[: i + 1], tools, marks, now=_TRAINING_DATE)
            if not after.startswith(before):
                raise InputError(
                    "the chat template does not start a turn of the assistant as it starts an answer, so the "
                    "assistant's tokens cannot be located; add {% generation %} blocks to it"
                )
            span = (len(before), len(after))
            if sequences and before.startswith(sequences[-1][0]):
                sequences[-1] = (after, [*sequences[-1][1], span])
            else:
                sequences.append((after, [span]))
        if not sequences:
            return [(text, [])]
        last, spans = sequences[-1]
        return [*sequences[:-1], (text if text.startswith(last) else last, spans)]

    def _render(
        self,
        messages: Sequence[Message],
        tools: Tools,
        marks: _Marks | None,
        *,
        add_generation_prompt: bool = False,
        now: datetime.datetime | None = None,
    ) -> str:
        """The rendered text. With `marks`, they are inserted into the messages and around generation blocks."""
        _require_messages(messages)
        self._environment.globals["_generation_marks"] = (marks.begin, marks.end) if marks else ("", "")
        if marks:
            messages = [self._mark(message, marks.ordinary) for message in messages]
            tools = tools and [self._mark(tool, marks.ordinary) for tool in tools]
        names = self._tokenizer.roles.names
        return self._guard(
            lambda: self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None if tools is None else list(tools),
                documents=None,
                strftime_now=(now or datetime.datetime.now()).strftime,
                **names,
            )
        )

    def _mark(self, message: dict[str, Any], mark: str) -> dict[str, Any]:
        spellings = self._assistant_spellings if message.get("role") == "assistant" else self._spellings

        def marked(value: Any) -> Any:
            if isinstance(value, str):
                return spellings.mark(without_surrogates(value), mark)
            if isinstance(value, dict):
                return {marked(key): marked(item) for key, item in value.items()}
            return [marked(item) for item in value] if isinstance(value, list | tuple) else value

        return marked(message)

    def _unused(self, messages: Sequence[Message], tools: Tools) -> _Marks:
        used = self._source + json.dumps([messages, tools], ensure_ascii=False, default=str)
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

    These are trimmed blocks, loop controls, generation blocks, `tojson` without HTML escapes and `raise_exception`.
    Jinja's random choices are missing. Raises InputError if the jinja2 package is missing.
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
    del environment.filters["random"], environment.globals["lipsum"]
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Spellings:
    """Spellings of control tokens, in which a mark can be inserted."""

    def __init__(self, tokens: Collection[str]) -> None:
        tokens = [token for token in tokens if len(token) > 1]
        self._whole = match_any(tokens)
        self._heads = {token[:n] for token in tokens for n in range(1, len(token))}
        self._tails = {token[n:] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def mark(self, text: str, mark: str) -> str:
        """The text with a mark after the first character of each spelling.

        Parts of spellings at the ends of the text get one too, since a template may join texts. Plain words do not:
        they may be roles, which a template may join with the rest of a token.
        """
        if self._whole is None or text.isalnum():
            return text
        text = self._whole.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        head, tail = text.rstrip(), text.lstrip()
        sizes = range(self._longest, 0, -1)
        if size := next((n for n in sizes if head[-n:] in self._heads), 0):
            start = len(head) - min(size, len(head))
            text = text[: start + 1] + mark + text[start + 1 :]
        if next((n for n in sizes if tail[:n] in self._tails), 0):
            start = len(text) - len(text.lstrip())
            text = text[:start] + mark + text[start:]
        return text


def _literals(environment: Any, source: str) -> Iterator[str]:
    """The texts that a template writes between values, such as those of roles."""
    import jinja2.nodes

    for node in environment.parse(source).find_all((jinja2.nodes.Const, jinja2.nodes.TemplateData)):
        value = node.value if isinstance(node, jinja2.nodes.Const) else node.data
        if isinstance(value, str):
            yield from _PLACEHOLDER.split(value)


def _composed(tokens: Collection[str], literals: Collection[str]) -> list[str]:
    """The tokens that a template may write in parts: one literal ends with its start, and one starts with its end."""
    longest = max(map(len, tokens), default=0)
    heads = {literal[:n] for literal in literals for n in range(1, longest)}
    tails = {literal[-n:] for literal in literals for n in range(1, longest)}

    def is_composed(token: str) -> bool:
        sizes = range(1, len(token))
        return any(token[:n] in tails for n in sizes) and any(token[n:] in heads for n in sizes)

    return [token for token in tokens if is_composed(token)]


def _require_messages(messages: Any) -> None:
    if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
        raise InputError("the messages are not a list of {role, content}; give one dict per message")


def _trained(messages: Sequence[Message]) -> dict[int, bool]:
    """Whether each message of the assistant, by its index, is in the loss mask. Raises InputError if none is."""
    _require_messages(messages)
    trained = {}
    for i, message in enumerate(messages):
        weight, train = message.get("weight"), message.get("train")
        if weight not in (None, 0, 1):
            raise InputError(f"message {i + 1} has the weight {weight!r}; use 0 or 1")
        if train not in (None, False, True):
            raise InputError(f"message {i + 1} has train {train!r}; use true or false")
        if message.get("role") == "assistant":
            trained[i] = weight != 0 and train in (None, True)
    if trained and not any(trained.values()):
        raise InputError("weight or train keeps all messages of the assistant out of the loss mask; remove the row")
    return trained


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
