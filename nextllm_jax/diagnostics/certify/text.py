"""Checks of a tokenizer and of a chat template: token ids, the rendered conversation, and the loss mask."""

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nextllm_jax.diagnostics.certify.certificate import Row, failed, ok, skipped
from nextllm_jax.diagnostics.certify.forward import Weights
from nextllm_jax.diagnostics.stress_texts import stress_texts, token_texts
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.backends import Recognize
from nextllm_jax.tokenizer.chat import ChatTemplate
from nextllm_jax.tokenizer.huggingface_files import read_json
from nextllm_jax.tokenizer.tokenizer import Tokenizer

MESSAGES = [
    {"role": "user", "content": "What is 7 times 6?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": "Naïve or naive?"},
    {"role": "assistant", "content": "Both are fine.\n- naïve\n- naive"},
]
"""The conversation that is rendered. It has no system message, which some templates refuse."""
_SPELLED, _OTHERS = 100, 20
"""Number of control tokens that are spelled in messages, and of other added tokens in each message."""
PLAIN_TEXTS = ("Hello world", " 12345 kg", "naïve café\n\n\tx", "def f(x):\n        return x", "你好世界", "😀!")
"""Texts on which the tokenizers of other programs are compared too."""


def check_ids(check: str, tokenizer: Tokenizer, file: Path) -> Row:
    """Compare the ids of the stress texts with those of the package `tokenizers` for a tokenizer.json."""
    from tokenizers import Tokenizer as Theirs

    theirs = Theirs.from_file(str(file))
    added = [token.content for token in theirs.get_added_tokens_decoder().values()]
    known = [token for token in added if token in tokenizer.backend.tokens]  # others are beyond the embedding
    count = 0
    plain = [text for text in stress_texts() if not any(token in text for token in added)]
    cases: list[tuple[list[str], Recognize]] = [(plain, "added"), (token_texts(known), "all")]
    for texts, recognize in cases:
        expected = [found.ids for found in theirs.encode_batch(texts, add_special_tokens=False)]
        for text, ids in zip(texts, expected, strict=True):
            mine = tokenizer.encode(text, recognize=recognize)
            if mine != ids:
                return different_ids(check, text, mine, ids, "tokenizers")
            count += len(ids)
        for ids, text in zip(expected, theirs.decode_batch(expected, skip_special_tokens=False), strict=True):
            mine = tokenizer.decode(ids)
            # This package keeps the space before a text, and the two differ in bytes that are no character.
            if recognize == "added" and "\ufffd" not in mine + text and mine.lstrip(" ") != text.lstrip(" "):
                return failed(check, f"{_cut(ids)} is {_cut(mine)}, but {_cut(text)} in tokenizers")
    return ok(check, f"{count:,} ids of the stress texts, and their texts, are those of tokenizers")


def compare_ids(check: str, tokenizer: Tokenizer, texts: Sequence[str], theirs: list[list[int]], program: str) -> Row:
    """Compare the ids of plain texts, without tokens before or after them, with those of another program."""
    for text, ids in zip(texts, theirs, strict=True):
        mine = tokenizer.encode(text)
        if mine != ids:
            return different_ids(check, text, mine, ids, program)
    return ok(check, f"{sum(map(len, theirs)):,} ids of {len(texts)} texts are those of {program}")


def different_ids(check: str, text: str, mine: list[int], theirs: list[int], program: str) -> Row:
    """A row about a text with other ids in another program."""
    detail = f"{_cut(text)} gives {_cut(mine)}, but {program} gives {_cut(theirs)}"
    return failed(check, detail, _shift(mine, theirs))


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shift(mine: list[int], theirs: list[int]) -> str | None:
    """The fault, if only the numbers of the ids differ."""
    return "shifted token id" if len(mine) == len(theirs) else None


def check_special(tokenizer: Tokenizer, rows: int, directory: Path | None) -> Row:
    """Check that all ids have rows in the embedding, and that the configs of a Hugging Face directory name them."""
    check = "special tokens"
    if tokenizer.vocab_size > rows:
        return failed(check, f"ids up to {tokenizer.vocab_size - 1:,}, but the embedding has {rows:,} rows")
    for token, id in _known(tokenizer, tokenizer.special_tokens).items():
        if len(token) > 1 and id in tokenizer.encode(f"a {token} b"):
            return failed(check, f"a text that spells {token!r} contains this token")
    backend, wrong = tokenizer.backend, []
    for file in ("config.json", "generation_config.json") if directory else ():
        values = read_json(Path(directory or "", file))
        for role in ("bos_token", "eos_token", "pad_token"):
            stated, token = values.get(f"{role}_id"), tokenizer.roles.names.get(role)
            listed = [id for id in (stated if isinstance(stated, list) else [stated]) if id is not None]
            named = backend.tokens.get(token or "")
            strange = [id for id in listed if id not in backend.tokens.values()]
            if role == "bos_token" and named is not None and stated not in (None, named):
                strange = listed
            if strange:
                names = ", ".join(repr(tokenizer.decode([id])) for id in strange)
                wrong.append(f"{file}: {role}_id {stated} is {names}, not {token!r} ({named})")
    if wrong:
        return failed(check, "; ".join(wrong), "shifted token id")
    said = ", ".join(f"{id} {tokenizer.decode([id])!r}" for id in tokenizer.stop_ids)
    return ok(check, f"{tokenizer.vocab_size:,} ids for {rows:,} rows; text ends with {said}")


def _known(tokenizer: Tokenizer, tokens: dict[str, int]) -> dict[str, int]:
    """The tokens without the one that stands for any unknown character."""
    return {token: id for token, id in tokens.items() if token != tokenizer.roles.names.get("unk_token")}


def check_end_rows(tokenizer: Tokenizer, weights: Weights) -> Row:
    """Check that the rows of the tokens that end text are neither zero nor copies of each other."""
    check = "rows of end tokens"
    rows = np.asarray(weights.read("embed")["embedding"])
    named = {id: tokenizer.decode([id]) for id in sorted({tokenizer.eos_id, *tokenizer.stop_ids})}
    for id, token in named.items():
        if np.abs(rows[id]).max() < 1e-8:
            return failed(check, f"the embedding of {id} {token!r} is zero", "untrained end token")
    return ok(check, f"{len(named)} rows of the embedding are not zero")


def check_conversation(tokenizer: Tokenizer) -> tuple[list[Row], str | None]:
    """Check the loss mask of a short conversation, and return it as a text with the trained tokens in brackets."""
    check = "loss mask"
    if tokenizer.chat_template is None:
        return [skipped(check, "the model has no chat template")], None
    try:
        template = ChatTemplate(tokenizer)
        sequences = template.encode_with_mask(MESSAGES)
    except InputError as error:
        return [failed(check, str(error))], None
    shown = "\n".join(_marked(tokenizer, ids, mask) for ids, mask in sequences)
    said = [span for ids, mask in sequences for span in _spans(ids, mask)]
    answers = [message["content"] for message in MESSAGES if message["role"] == "assistant"]
    for answer in answers:
        if not any(answer in tokenizer.decode(span) for span in said):
            return [failed(check, f"the answer {answer!r} is not in it", None)], shown
    texts = [tokenizer.decode(span) for span in said]
    if other := [text for text in texts if any(m["content"] in text for m in MESSAGES if m["role"] == "user")]:
        return [failed(check, f"it holds what the user says: {other[0]!r}")], shown
    if ends := [text for span, text in zip(said, texts, strict=True) if span[-1] not in tokenizer.stop_ids]:
        stops = ", ".join(repr(tokenizer.decode([id])) for id in tokenizer.stop_ids)
        detail = f"the turn {ends[0]!r} does not end with {stops}, so the model does not learn to end its answers"
        return [failed(check, detail, "untrained end token")], shown
    count = sum(map(len, said))
    return [ok(check, f"{count} tokens in {len(said)} turns, with the end token of each")], shown


def check_spelled_tokens(tokenizer: Tokenizer) -> Row:
    """Check that a message cannot write control tokens: those that it spells are ordinary text."""
    check = "control tokens in messages"
    if tokenizer.chat_template is None:
        return skipped(check, "the model has no chat template")
    template = ChatTemplate(tokenizer)
    control = {*_known(tokenizer, tokenizer.special_tokens).values(), *_written(tokenizer, template)}
    tokens = [token for token, id in tokenizer.backend.tokens.items() if id in control and len(token) > 1]

    others = [token for token, id in tokenizer.backend.added_tokens.items() if id not in control]

    def parts(content: str) -> tuple[list[int], str]:
        ids = template.encode([{"role": "user", "content": "".join([content, *others[:_OTHERS]])}])
        return [id for id in ids if id in control], tokenizer.decode(ids)

    expected, plain = parts("ab")
    for token in tokens[:_SPELLED]:
        found, text = parts(f"a{token}b")
        if found != expected:
            return failed(check, f"a message that spells {token!r} contains this token")
        if text.count(token) > plain.count(token) and text.replace(token, "") != plain.replace(token, ""):
            return failed(check, f"a message that spells {token!r} changes the text around it: {_cut(text)}")
    return ok(check, f"{len(tokens[:_SPELLED])} spelled tokens are ordinary text")


def _written(tokenizer: Tokenizer, template: ChatTemplate) -> set[int]:
    """The added tokens that a template writes for messages of each role."""
    ids = set(template.encode(MESSAGES))
    with contextlib.suppress(InputError):  # some templates refuse a system message
        ids |= set(template.encode([{"role": "system", "content": "a"}, *MESSAGES]))
    return ids & {*_known(tokenizer, tokenizer.backend.tokens).values()}


def compare_chat(tokenizer: Tokenizer, theirs: dict[str, Any], program: str) -> Row:
    """Compare the rendered conversation with that of another program."""
    check = f"chat: {program}"
    template = ChatTemplate(tokenizer)
    text, ids = template.text(MESSAGES), template.encode(MESSAGES, add_generation_prompt=False)
    if text != theirs["chat"]:
        at = next((i for i, pair in enumerate(itertools.zip_longest(text, theirs["chat"])) if len({*pair}) > 1), 0)
        return failed(
            check, f"the text differs from character {at}: {_cut(text[at:])}, not {_cut(theirs['chat'][at:])}"
        )
    if ids != theirs["chat_ids"]:
        return failed(
            check, f"the ids are {_cut(ids)}, not {_cut(theirs['chat_ids'])}", _shift(ids, theirs["chat_ids"])
        )
    return ok(check, f"{len(text)} characters and {len(ids)} ids are equal")


def _spans(ids: list[int], mask: list[bool]) -> list[list[int]]:
    """The runs of ids in the mask."""
    pairs = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [[id for id, _ in group] for is_said, group in pairs if is_said]


def _marked(tokenizer: Tokenizer, ids: Iterable[int], mask: Iterable[bool]) -> str:
    """The text of the ids, with each run in the mask in ⟦ ⟧."""
    pairs = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    parts = [(is_said, tokenizer.decode([id for id, _ in group])) for is_said, group in pairs]
    return "".join(f"⟦{text}⟧" if is_said else text for is_said, text in parts)
