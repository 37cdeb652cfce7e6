"""Token shards on disk: how they are written, and random access to them.

A prepared directory holds

    index.json              counts, and size and sha256 of every file below
    settings.json           the settings it was made with
    tokenizer/              the tokenizer it was made with
    train-00000.bin ...     tokens of all documents one after the other, little-endian uint16 or uint32
    train-documents.npy     int64: where each document starts, then the number of tokens
    validation-...          the same for the held-out documents

Documents and shard files end independently of each other.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.tokenizer import Tokenizer

FORMAT = "nextllm_jax tokens 2"
SPLITS = ("train", "validation")
SplitName = Literal["train", "validation"]

_CHECKED_AT_OPEN_BYTES = 256 * 2**20


class TokenizedDocuments(NamedTuple):
    """Some documents: their tokens joined, the number of tokens of each, and the UTF-8 bytes of all the texts."""

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type on disk that holds every id of a vocabulary: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def mounted_path(path: str | os.PathLike[str]) -> Path:
    """The path of prepared data. Raises InputError for an address such as gs://bucket/data."""
    # Path("gs://bucket") is "gs:/bucket".
    if re.match(r"[a-z][a-z0-9]+:/", str(path)):
        raise InputError(f"data.path {path} is not on a mounted disk; mount or copy it, since shards are memory mapped")
    return Path(path)


def write_split(
    directory: Path, name: SplitName, parts: Iterable[TokenizedDocuments], *, vocab_size: int, tokens_per_shard: int
) -> dict[str, Any]:
    """Write a split's shards and document index; returns its entry in index.json.

    `tokens_sha256` in it is that of all the tokens, however they are cut into shards.

    Raises InputError for an id that the vocabulary does not hold, and for a split without documents.
    """
    dtype = token_dtype(vocab_size)
    lengths: list[np.ndarray] = []
    num_bytes = 0
    digest = hashlib.sha256()

    def checked_tokens() -> Iterator[np.ndarray]:
        nonlocal num_bytes
        for part in parts:
            if part.tokens.size and int(part.tokens.max()) >= vocab_size:
                raise InputError(f"token id {int(part.tokens.max())} is outside the vocabulary of {vocab_size}")
            lengths.append(part.lengths)
            num_bytes += part.num_bytes
            tokens = part.tokens.astype(dtype)
            digest.update(tokens.data)
            yield tokens

    shards = _write_shards(directory, name, checked_tokens(), tokens_per_shard)
    starts = np.concatenate([[0], *lengths]).cumsum(dtype="<i8")
    if len(starts) == 1:
        raise InputError(
            f"no document fell into the {name} split; bring more documents or change data.validation_fraction"
        )
    documents_file = f"{name}-documents.npy"
    buffer = io.BytesIO()
    np.save(buffer, starts)
    (directory / documents_file).write_bytes(buffer.getvalue())
    return {
        "tokens": int(starts[-1]),
        "documents": len(starts) - 1,
        "bytes": num_bytes,
        "tokens_sha256": digest.hexdigest(),
        "shards": shards,
        "document_index": _file_entry(directory / documents_file),
    }


def _write_shards(
    directory: Path, name: str, parts: Iterable[np.ndarray], tokens_per_shard: int
) -> list[dict[str, Any]]:
    """Write the tokens as files of `tokens_per_shard`, the last shorter; returns their entries."""
    entries: list[dict[str, Any]] = []
    buffered: list[np.ndarray] = []
    num_buffered = 0

    def flush(count: int) -> None:
        nonlocal buffered, num_buffered
        joined = np.concatenate(buffered)
        path = directory / f"{name}-{len(entries):05d}.bin"
        path.write_bytes(joined[:count].data)  # tofile would raise without an errno on a full disk
        entries.append(_file_entry(path))
        buffered, num_buffered = [joined[count:]], len(joined) - count

    for tokens in parts:
        buffered.append(tokens)
        num_buffered += len(tokens)
        while num_buffered >= tokens_per_shard:
            flush(tokens_per_shard)
    if num_buffered:
        flush(num_buffered)
    return entries


def write_index(directory: Path, tokenizer: Tokenizer, splits: dict[str, dict[str, Any]]) -> None:
    """Write index.json, the file that makes a directory a dataset."""
    index = {
        "format": FORMAT,
        "tokenizer": {"name": tokenizer.name, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "splits": splits,
    }
    temporary = directory / "index.json.tmp"
    temporary.write_text(json.dumps(index, indent=2) + "\n")
    temporary.replace(directory / "index.json")


class Split:
    """One split as a stream of tokens with random access; safe to read from several threads.

    `document_starts` is int64 [num_documents + 1]: where each document starts, then `num_tokens`.
    `num_bytes` counts the UTF-8 bytes of the texts. `directory` and `data_id` are those of the dataset.
    """

    def __init__(self, directory: Path, name: SplitName, entry: dict[str, Any], dtype: np.dtype[Any], data_id: str):
        self.directory = directory
        self.name = name
        self.data_id = data_id
        self.num_tokens: int = entry["tokens"]
        self.num_documents: int = entry["documents"]
        self.num_bytes: int = entry["bytes"]
        self.document_starts: np.ndarray = np.load(directory / entry["document_index"]["file"], mmap_mode="r")
        self._shards = [np.memmap(directory / shard["file"], dtype=dtype, mode="r") for shard in entry["shards"]]
        self._bounds = np.cumsum([0, *[len(shard) for shard in self._shards]])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Copy of the tokens from `start` up to `stop`, in the type on disk, across shard files."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a split of {self.num_tokens}")
        first = max(int(np.searchsorted(self._bounds, start, side="right")) - 1, 0)
        pieces = []
        for shard, bound in zip(self._shards[first:], self._bounds[first:-1], strict=True):
            if bound >= stop:
                break
            pieces.append(shard[max(start - bound, 0) : stop - bound])
        return np.concatenate(pieces) if pieces else np.empty(0, self._shards[0].dtype)


class Dataset:
    """A prepared directory.

    `data_id` is a hash of the tokenizer, of every token and of where documents start, not of how shards are cut.
    """

    def __init__(self, path: Path, index: dict[str, Any]):
        self.path = path
        self.data_id = _data_id(index)
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.tokenizer_hash: str = index["tokenizer"]["hash"]
        self._splits = {
            name: Split(path, name, index["splits"][name], np.dtype(index["dtype"]).newbyteorder("<"), self.data_id)
            for name in SPLITS
        }

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, checksums: bool | None = None) -> "Dataset":
        """The dataset at `path`, every file checked by size, and by sha256 if `checksums`.

        None: by sha256 if the files are under 256 MiB together. Raises InputError if the dataset is missing,
        unfinished or damaged, naming the file. It must lie on a mounted disk.
        """
        directory, index = _read_index(path)
        try:
            splits = [index["splits"][name] for name in SPLITS]
            entries = [entry for split in splits for entry in [*split["shards"], split["document_index"]]]
            if checksums is None:
                checksums = sum(entry["size"] for entry in entries) <= _CHECKED_AT_OPEN_BYTES
            _check_files(directory, entries, checksums=checksums)
            return cls(directory, index)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged_index(directory, repr(error)) from error

    def split(self, name: SplitName) -> Split:
        """The split "train" or "validation"."""
        return self._splits[name]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the data was made with. Raises InputError if it is missing, damaged or another."""
        tokenizer = Tokenizer.load(self.path / "tokenizer")
        if tokenizer.hash != self.tokenizer_hash:
            raise InputError(
                f"{self.path / 'tokenizer'} is not the one that made this data; prepare it again with --overwrite"
            )
        return tokenizer


def _read_index(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    directory = mounted_path(path)
    file = directory / "index.json"
    if not file.is_file():
        started = directory.with_name(f"{directory.name}.partial").is_dir()
        state = "was not prepared to the end" if started else "holds no prepared data"
        raise InputError(f"{directory} {state}: there is no index.json; run nextllm prepare")
    try:
        index = json.loads(file.read_bytes())
        version = index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged_index(directory, repr(error)) from error
    if version != FORMAT:
        raise InputError(f"{file} has format '{version}', not '{FORMAT}'; prepare the data again with --overwrite")
    return directory, index


def _damaged_index(directory: Path, cause: str) -> InputError:
    return InputError(f"{directory / 'index.json'} is damaged ({cause}); remove {directory} and prepare the data again")


def _data_id(index: dict[str, Any]) -> str:
    splits = [index["splits"][name] for name in SPLITS]
    hashes = [[split["tokens_sha256"], split["document_index"]["sha256"]] for split in splits]
    return hashlib.sha256(json.dumps([index["tokenizer"]["hash"], hashes]).encode()).hexdigest()[:16]


def _file_entry(path: Path) -> dict[str, Any]:
    return {"file": path.name, "size": path.stat().st_size, "sha256": _sha256(path)}


def _check_files(directory: Path, entries: list[dict[str, Any]], *, checksums: bool) -> None:
    for entry in entries:
        path = directory / entry["file"]
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise InputError(f"{path} is missing; prepare the data again with --overwrite")
        if size != entry["size"]:
            raise InputError(
                f"{path} is damaged: {size} bytes instead of {entry['size']}; prepare it again with --overwrite"
            )
        if checksums and _sha256(path) != entry["sha256"]:
            raise InputError(
                f"{path} is damaged: its sha256 is not the one in index.json; prepare it again with --overwrite"
            )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
