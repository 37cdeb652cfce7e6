"""Parts of a corpus: consecutive documents, which one process tokenizes into one file named after their content."""

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
from nextllm_jax.tokenizer.chat import ChatTemplate
from nextllm_jax.tokenizer.tokenizer import Tokenizer

PART_CHARACTERS = 1_000_000


class Part(NamedTuple):
    """Consecutive documents, which of them are held out, and the file that their tokens go to."""

    texts: list[str]
    held_out: list[bool]
    path: Path
    places: list[str]
    """Where conversations come from, for errors; empty for others."""


class PartReport(NamedTuple):
    """What tokenizing a part took."""

    process: int
    num_tokens: int
    seconds: float


def cut_into_parts(documents: Iterable[Document], limit: int, directory: Path, conversations: bool) -> Iterator[Part]:
    """The documents in parts of about PART_CHARACTERS, whose files are to be in `directory`.

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
    for text in texts:
        encoded = text.encode()
        content.update(b"%d:" % len(encoded))
        content.update(encoded)
    places = [document.place for document in documents] if conversations else []
    return Part(texts, held_out, directory / f"{content.hexdigest()[:32]}.npz", places)


def tokenize_part(part: Part, *, tokenizer_directory: Path, tokenizer_hash: str) -> PartReport:
    """Tokenize a part into its file, an array for each split. Runs in a worker process."""
    tokenizer = _load_tokenizer_once(tokenizer_directory, tokenizer_hash)
    dtype = token_dtype(tokenizer.vocab_size)
    started = time.perf_counter()
    arrays: dict[str, np.ndarray] = {}
    template = ChatTemplate(tokenizer) if part.places else None
    for name in SPLITS:
        chosen = [i for i, held_out in enumerate(part.held_out) if held_out == (name == "validation")]
        if template:
            encoded = [encode_conversation(tokenizer, template, part.texts[i], part.places[i]) for i in chosen]
            masks = [np.array(each.mask, np.uint8) for each in encoded]
            arrays[f"{name}_mask"] = np.concatenate([np.empty(0, np.uint8), *masks])
        else:
            texts = [part.texts[i] for i in chosen]
            encoded = [Encoded(tokenizer.encode_document(text), [], len(text.encode())) for text in texts]
        documents = [np.array(each.ids, dtype) for each in encoded]
        arrays[f"{name}_tokens"] = np.concatenate([np.empty(0, dtype), *documents])
        arrays[f"{name}_lengths"] = np.array([len(tokens) for tokens in documents], np.int64)
        arrays[f"{name}_bytes"] = np.array(sum(each.num_bytes for each in encoded))
    temporary = part.path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    temporary.replace(part.path)
    num_tokens = sum(len(arrays[f"{name}_tokens"]) for name in SPLITS)
    return PartReport(os.getpid(), num_tokens, time.perf_counter() - started)


@functools.lru_cache(1)
def _load_tokenizer_once(directory: Path, expected_hash: str) -> Tokenizer:
    """The tokenizer in `directory`; the hash is part of the key, since a directory may come to hold another."""
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.hash == expected_hash
    return tokenizer


def is_whole(part: Path) -> bool:
    """Whether a part is there and is what was written, by the checksums in it."""
    try:
        with zipfile.ZipFile(part) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def load_part(path: Path, name: SplitName) -> TokenizedDocuments:
    """The documents of a split in the file of a part."""
    with np.load(path) as arrays:
        return TokenizedDocuments(arrays[f"{name}_tokens"], arrays[f"{name}_lengths"], int(arrays[f"{name}_bytes"]))


def load_mask(path: Path, name: SplitName) -> np.ndarray:
    """Which of their tokens are in the loss mask, uint8; of conversations alone."""
    with np.load(path) as arrays:
        return arrays[f"{name}_mask"]
