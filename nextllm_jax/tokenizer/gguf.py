"""Reads and writes the vocabulary in a GGUF file's metadata; llama.cpp's GGUF specification defines the keys."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.backends import ByteBPE, HuggingFaceBPE, bytes_to_letters, merge_pairs
from nextllm_jax.tokenizer.huggingface import byte_level_description, from_description, merge_to_themselves, merges
from nextllm_jax.tokenizer.huggingface_files import added_token
from nextllm_jax.tokenizer.patterns import (
    DIGITS_PATTERN,
    LLAMA3_PATTERN,
    O200K_PATTERN,
    PLAIN,
    PLAIN_GPT2_PATTERN,
    PLAIN_GPT4_PATTERN,
    QWEN2_PATTERN,
    TEKKEN_PATTERN,
)
from nextllm_jax.tokenizer.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    describe,
    placeholder,
)
from nextllm_jax.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

PATTERNS = {
    "gpt-2": PLAIN_GPT2_PATTERN,
    "olmo": PLAIN_GPT2_PATTERN,
    "smollm": DIGITS_PATTERN,
    "starcoder": DIGITS_PATTERN,
    "refact": DIGITS_PATTERN,
    "command-r": DIGITS_PATTERN,
    "llama-bpe": LLAMA3_PATTERN,
    "llama3": LLAMA3_PATTERN,
    "llama-v3": LLAMA3_PATTERN,
    "smaug-bpe": LLAMA3_PATTERN,
    "dbrx": LLAMA3_PATTERN,
    "qwen2": QWEN2_PATTERN,
    "deepseek-r1-qwen": QWEN2_PATTERN,
    "tekken": TEKKEN_PATTERN,
    "gpt-4o": O200K_PATTERN,
    "llama4": O200K_PATTERN,
}
"""The pattern that splits text, by tokenizer.ggml.pre. Of several names for one pattern, the first is written."""

_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")
_COMPOSED = ("qwen2", "deepseek-r1-qwen")
_BEGINS_WITH_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")
_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_STOPS = ("eos", "eot", "eom")


def from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata (key -> value, arrays as lists), with its roles and chat template.

    Raises InputError, which names the key, for a missing key or an unsupported kind of vocabulary.
    """
    try:
        tokens = [str(token) for token in metadata["tokenizer.ggml.tokens"]]
        kind = metadata["tokenizer.ggml.model"]
        types = list(metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
        if len(types) != len(tokens):
            raise InputError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
        if len(set(tokens)) != len(tokens):
            raise InputError("tokenizer.ggml.tokens has the same token twice; use an intact file")
        if kind == "gpt2":
            description, begins = _byte_level(metadata, tokens, types)
        elif kind == "llama":
            scores = metadata["tokenizer.ggml.scores"]
            pieces = [Piece(*entry) for entry in zip(tokens, scores, types, strict=True)]
            description = describe(pieces, add_space_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True))
            begins = True
        else:
            raise InputError(f"tokenizer.ggml.model is {kind}; only gpt2 and llama are supported")
        named = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in (*_NAMES, *_STOPS)}
        inside = {name: int(id) for name, id in named.items() if id is not None and 0 <= id < len(tokens)}
        return from_description(
            str(metadata.get("general.name", "gguf")),
            description,
            names={_NAMES[name]: tokens[id] for name, id in inside.items() if name in _NAMES},
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", begins)),
            stop_ids=[inside[name] for name in _STOPS if name in inside],
            chat_template=metadata.get("tokenizer.chat_template"),
        )
    except KeyError as error:
        raise InputError(f"the GGUF metadata lacks {error.args[0]}; use a file with a vocabulary") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"tokenizer.ggml has values of a wrong type or length ({error}); use an intact file"
        ) from error


def read_metadata(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file, arrays as lists. Raises InputError if it is unreadable or `gguf` is missing."""
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"{file} needs the gguf package; pip install 'nextllm_jax[interop]'") from error
    try:
        return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    except Exception as error:  # the package checks little, so a damaged file can cause any exception
        raise InputError(f"{file} cannot be read as GGUF ({error}); restore an intact copy") from error


def to_gguf(tokenizer: Tokenizer, rows: int | None = None) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a GGUF file for a tokenizer, with a token for each of the embedding's `rows`.

    `rows` defaults to vocab_size. The metadata is verified by reading it. Raises InputError, which names the parts of
    the tokenizer that GGUF cannot represent, if reading gives other ids.
    """
    roles, backend = tokenizer.roles, tokenizer.backend
    metadata, vocabulary = _write_byte_level(backend) if isinstance(backend, ByteBPE) else _write_sentencepiece(backend)
    for token, id in backend.tokens.items():
        if vocabulary.get(id) != (token, UNKNOWN):
            vocabulary[id] = (token, CONTROL if token in backend.special_tokens else USER_DEFINED)
    ids = range(rows or tokenizer.vocab_size)  # llama.cpp refuses a file with more rows than tokens
    entries = [vocabulary.get(id, (placeholder(id), UNUSED)) for id in ids]
    metadata |= {
        "tokenizer.ggml.tokens": [text for text, _ in entries],
        "tokenizer.ggml.token_type": [kind for _, kind in entries],
        "tokenizer.ggml.add_bos_token": roles.add_bos,
    }
    if scores := metadata.get("tokenizer.ggml.scores"):
        metadata["tokenizer.ggml.scores"] = [scores.get(id, 0.0) for id in ids]
    for name, key in _NAMES.items():
        if roles.names.get(key) in backend.tokens:
            metadata[f"tokenizer.ggml.{name}_token_id"] = backend.tokens[roles.names[key]]
    if roles.add_bos:
        metadata["tokenizer.ggml.bos_token_id"] = roles.bos_id
    if roles.chat_template is not None:
        metadata["tokenizer.chat_template"] = roles.chat_template
    again = from_gguf(metadata)
    if differing := _differences(tokenizer, again):
        raise InputError(f"GGUF cannot represent this tokenizer: {', '.join(differing)}; export to Hugging Face")
    more_stops = sorted({*roles.stop_ids} - {*again.stop_ids})
    metadata |= {f"tokenizer.ggml.{name}_token_id": id for name, id in zip(("eot", "eom"), more_stops, strict=False)}
    if len(more_stops) > 2:
        _log.warning(f"GGUF has no keys for the stop ids {more_stops[2:]}; other programs do not stop at them")
    return metadata


def _differences(tokenizer: Tokenizer, again: Tokenizer) -> list[str]:
    """What differs between a tokenizer and what its metadata reads as."""
    mine, other = tokenizer.backend, again.backend
    same = {
        "ids have other bytes": mine.bytes_of == other.bytes_of,
        "special or added tokens differ": (mine.special_tokens, mine.added_tokens)
        == (other.special_tokens, other.added_tokens),
        "documents begin or end differently": (tokenizer.add_bos, tokenizer.bos_id, tokenizer.eos_id)
        == (again.add_bos, again.bos_id, again.eos_id),
    }
    if isinstance(mine, ByteBPE):
        same["text is merged differently"] = isinstance(other, ByteBPE)
        same["NFC normalization differs"] = isinstance(other, HuggingFaceBPE) or mine.nfc == other.nfc
    elif isinstance(other, HuggingFaceBPE):
        same |= _same_sentencepiece(json.loads(mine.description), json.loads(other.description))
        texts = [text for token in mine.tokens for text in (token, f"a{token}b", f" {token.replace('▁', ' ')} a")]
        same["text next to added tokens differs"] = all(
            mine.encode(text, "all") == other.encode(text, "all")
            and mine.encode(text, "added") == other.encode(text, "added")
            for text in texts
        )
    return [difference for difference, is_same in same.items() if not is_same]


def _same_sentencepiece(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, bool]:
    """Whether parts of a tokenizer.json are equivalent to those of another, which `sentencepiece.describe` made."""
    model, normalizer, pre_tokenizer = mine["model"], mine["normalizer"] or {}, mine["pre_tokenizer"]
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    theirs = other["normalizer"]["normalizers"]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    is_plain = steps in (theirs, theirs[::-1]) and pre_tokenizer is None
    flags = [token[name] for token in mine["added_tokens"] for name in ("lstrip", "rstrip", "single_word")]
    settings = ["byte_fallback", "ignore_merges"]
    if not all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        settings += ["unk_token", "fuse_unk"]
    parts = ", ".join(
        part["type"] for part in [*steps, *(pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])] if part
    )
    return {
        f"text is prepared by {parts or 'nothing'}": is_plain or (not steps and pre_tokenizer == metaspace),
        "added tokens strip whitespace or match whole words": not any(flags),
        f"the model has {', '.join(f'{name} {model[name]}' for name in settings)}": all(
            model[name] == other["model"][name] for name in settings
        ),
        "text is merged differently": _same_merges(mine, other["model"]),
    }


def _same_merges(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the merges of a tokenizer.json are equivalent to those of a model, which lists every split of each piece.

    They are if they list the same merges in the same order of the pieces that they produce. They also are if they list
    one merge for each piece and reduce it to that piece, as merges do that have been trained: then two pieces that form
    a piece only ever occur next to each other in the way that its own merge lists.
    """
    pairs, others = merge_pairs(mine["model"]), merge_pairs(other)
    made, others_made = (list(dict.fromkeys(map("".join, found))) for found in (pairs, others))
    if made == others_made and set(pairs) == set(others):
        return True
    return len(made) == len(pairs) and made == others_made and merge_to_themselves(mine, made)


def _byte_level(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> tuple[dict[str, Any], bool]:
    """The tokenizer.json of a gpt2 vocabulary, and the default for whether prompts begin with BOS."""
    pre = metadata["tokenizer.ggml.pre"]
    if pre not in PATTERNS:
        raise InputError(f"tokenizer.ggml.pre is {pre}; only {', '.join(PATTERNS)} are supported")
    kinds = list(zip(tokens, types, strict=True))
    description = byte_level_description(
        PATTERNS[pre],
        added_tokens=[
            added_token(id, token, special=kind == CONTROL)
            for id, (token, kind) in enumerate(kinds)
            if kind in (CONTROL, USER_DEFINED)
        ],
        vocab={token: id for id, (token, kind) in enumerate(kinds) if kind != UNUSED},
        merges=[merge.split(" ") for merge in metadata["tokenizer.ggml.merges"] if merge],
        nfc=pre in _COMPOSED,
        ignore_merges=pre in _WHOLE_WORDS_FIRST,
    )
    return description, pre in _BEGINS_WITH_BOS


def _write_byte_level(backend: ByteBPE) -> tuple[dict[str, Any], dict[int, tuple[str, int]]]:
    """The metadata for splitting and merging text, and id -> (spelling, kind)."""
    pattern = PLAIN.get(backend.pattern, backend.pattern)
    # The two differ only for whitespace with a line break at the end of a text.
    pattern = LLAMA3_PATTERN if pattern == PLAIN_GPT4_PATTERN else pattern
    pre = next((name for name, known in PATTERNS.items() if known == pattern), None)
    if pre is None:
        raise InputError("GGUF has no name for the pattern that this tokenizer splits text by; export to Hugging Face")
    pairs = [f"{bytes_to_letters(left)} {bytes_to_letters(right)}" for left, right in merges(backend.ranks)]
    # llama.cpp needs the key, and the gguf package writes no empty list.
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": pairs or [""]}
    return metadata, {id: (bytes_to_letters(token), NORMAL) for token, id in backend.ranks.items()}


def _write_sentencepiece(backend: HuggingFaceBPE) -> tuple[dict[str, Any], dict[int, tuple[str, int]]]:
    """The metadata for merging text, and id -> (spelling, kind). The scores, by id, encode the order of the merges."""
    description = json.loads(backend.description)
    model = description["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise InputError("this tokenizer is neither byte-level BPE nor SentencePiece; export to Hugging Face, not GGUF")
    scores = dict.fromkeys(model["vocab"].values(), -1e9)
    for number, pair in reversed(list(enumerate(merge_pairs(model)))):
        scores[model["vocab"]["".join(pair)]] = -float(number)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": '"Prepend"' in json.dumps(description["normalizer"]),
    }

    def kind(piece: str) -> int:
        return UNKNOWN if piece == model["unk_token"] else BYTE if re.fullmatch("<0x[0-9A-F]{2}>", piece) else NORMAL

    return metadata, {id: (piece, kind(piece)) for piece, id in model["vocab"].items()}
