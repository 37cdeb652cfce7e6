"""Parts of a corpus. A part is a group of consecutive documents that one process tokenizes into one file.

The file is named after a hash of the documents.
"""

import functools
import hashlib
import os
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nextllm_jax.data.conversations import Encoded, encode_conversation
from nextllm_jax.data.corpora import Document, document_hash
from nextllm_jax.data.shards import SPLITS, SplitName, TokenizedDocuments, token_dtype
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.chat import ChatTemplate
from nextllm_jax.tokenizer.tokenizer import Tokenizer

PART_CHARACTERS = 1_000_000


class Part(NamedTuple):
    """Consecutive documents, which of them are held out, and the file for their tokens."""

    texts: list[str]
    held_out: list[bool]
    path: Path
    locations: list[str]
    """Location of each conversation, for errors; empty for text."""


class PartReport(NamedTuple):
    """Which process tokenized a part, how many tokens and bytes of text it has, and how long that took."""

    process: int
    num_tokens: int
    num_bytes: int
    seconds: float
    bad_rows: list[str]
    """The error of each conversation that was skipped."""


def split_into_parts(documents: Iterable[Document], limit: int, directory: Path, conversations: bool) -> Iterator[Part]:
    """The documents in parts of about PART_CHARACTERS; their files will be in `directory`.

    Documents with a hash up to `limit` are held out.
    """
    held: list[Document] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document.text)
        if size >= PART_CHARACTERS:
            yield _make_part(held, limit, directory, conversations)
            held, size = [], 0
    if held:
        yield _make_part(held, limit, directory, conversations)


def _make_part(documents: list[Document], limit: int, directory: Path, conversations: bool) -> Part:
    texts = [document.text for document in documents]
    held_out = [document_hash(document) <= limit for document in documents]
    content = hashlib.sha256(bytes(held_out))
    for document in documents:
        content.update(document.digest)
    locations = [document.location for document in documents] if conversations else []
    return Part(texts, held_out, directory / f"{content.hexdigest()[:32]}.npz", locations)


def tokenize_part(
    part: Part, *, tokenizer_directory: Path, tokenizer_hash: str, chat_template: str | None, skip_bad_rows: bool
) -> PartReport:
    """Tokenize a part and write its file, with arrays for each split. Runs in a worker process.

    Raises InputError for a conversation that cannot be formatted, unless `skip_bad_rows`.
    """
    tokenizer = _load_tokenizer_once(tokenizer_directory, tokenizer_hash, chat_template)
    dtype = token_dtype(tokenizer.vocab_size)
    started = time.perf_counter()
    arrays: dict[str, np.ndarray] = {}
    bad_rows: list[str] = []
    template = ChatTemplate(tokenizer) if part.locations else None
    for name in SPLITS:
        chosen = [i for i, held_out in enumerate(part.held_out) if held_out == (name == "validation")]
        encoded: list[Encoded] = []
        for i in chosen:
            if template is None:
                text = part.texts[i]
                encoded.append(Encoded(tokenizer.encode_document(text), [], len(text.encode())))
                continue
            try:
                encoded += encode_conversation(tokenizer, template, part.texts[i], part.locations[i])
            except InputError as error:
                if not skip_bad_rows:
                    raise
                bad_rows.append(str(error))
        documents = [np.array(each.ids, dtype) for each in encoded]
        arrays[f"{name}_tokens"] = np.concatenate([np.empty(0, dtype), *documents])
        arrays[f"{name}_lengths"] = np.array([len(tokens) for tokens in documents], np.int64)
        arrays[f"{name}_bytes"] = np.array(sum(each.num_bytes for each in encoded))
        if template:
            masks = [np.array(each.mask, np.uint8) for each in encoded]
            arrays[f"{name}_mask"] = np.concatenate([np.empty(0, np.uint8), *masks])
    if bad_rows:
        arrays["bad_rows"] = np.array(bad_rows)
    temporary = part.path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    temporary.replace(part.path)
    num_tokens = sum(len(arrays[f"{name}_tokens"]) for name in SPLITS)
    return PartReport(os.getpid(), num_tokens, text_size(part), time.perf_counter() - started, bad_rows)


def text_size(part: Part) -> int:
    """The UTF-8 bytes of a part's text."""
    return sum(len(text.encode()) for text in part.texts)


@functools.lru_cache(1)
def _load_tokenizer_once(directory: Path, expected_hash: str, expected_template: str | None) -> Tokenizer:
    """The tokenizer in `directory`. What is expected is part of the cache key, since the content may change."""
    tokenizer = Tokenizer.load(directory)
    assert (tokenizer.hash, tokenizer.chat_template) == (expected_hash, expected_template)
    return tokenizer


def is_intact(part: Path) -> bool:
    """Whether the file of a part exists and its checksums are correct."""
    try:
        with zipfile.ZipFile(part) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def load_part(path: Path, name: SplitName) -> TokenizedDocuments:
    """The documents of one split from the file of a part."""
    with np.load(path) as arrays:
        return TokenizedDocuments(arrays[f"{name}_tokens"], arrays[f"{name}_lengths"], int(arrays[f"{name}_bytes"]))


def load_mask(path: Path, name: SplitName) -> np.ndarray:
    """The loss mask of those documents, uint8, one value per token. Only conversations have one."""
    with np.load(path) as arrays:
        return arrays[f"{name}_mask"]


def load_bad_rows(path: Path) -> list[str]:
    """The error of each conversation of a part that was skipped."""
    with np.load(path) as arrays:
        return arrays["bad_rows"].tolist() if "bad_rows" in arrays else []
