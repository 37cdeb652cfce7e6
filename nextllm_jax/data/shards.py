"""Token shards on disk: writing them, and random access to them.

A prepared directory holds

    index.json              counts, the size and checksums of every file below, and a checksum of itself
    settings.json           the settings of the preparation
    tokenizer/              the tokenizer
    train-00000.bin ...     the tokens of all documents, concatenated, little-endian uint16 or uint32
    train-documents.npy     int64: the start of each document, then the number of tokens
    train-mask-00000.bits   the loss mask, for conversations only; a byte per token, 1 for the assistant's tokens
    validation-...          the same for the held-out documents

A document may span several shard files. Each file has a checksum per block, so a sample of the blocks can be checked
without reading the rest.
"""

import bisect
import hashlib
import io
import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nextllm_jax.errors import InputError
from nextllm_jax.progress import progress_bar
from nextllm_jax.tokenizer.tokenizer import Tokenizer

FORMAT = "nextllm_jax tokens 3"
SPLITS = ("train", "validation")
SplitName = Literal["train", "validation"]

BLOCK_BYTES = 256 * 2**10
SAMPLED_BLOCKS = 1024
"""Random blocks that a sampled check reads, in addition to one of each file.

That is 256 MiB. A file of other data is always found. In data of S bytes, one flipped bit is found with probability
256 MiB / S, and damage to a fraction f of the blocks with probability 1 - (1 - f)^1024, which is 0.99 for f = 0.0045.
"""

_DIGEST_CHARACTERS = 16


class TokenizedDocuments(NamedTuple):
    """Some documents: their concatenated tokens, the number of tokens of each, and the UTF-8 bytes of all texts."""

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of token ids on disk: little-endian uint16, or uint32 for a larger vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def mounted_path(path: str | os.PathLike[str]) -> Path:
    """The path of prepared data. Raises InputError for an address such as gs://bucket/data."""
    # Path("gs://bucket") is "gs:/bucket".
    if re.match(r"[a-z][a-z0-9]+:/", str(path)):
        raise InputError(f"data.path {path} is not a local path; mount or copy the data (shards are memory-mapped)")
    return Path(path)


def partial_path(output: Path) -> Path:
    """The directory in which `output` is prepared; it is renamed to `output` once it is complete."""
    return output.parent / f"{output.name}.partial"


def write_split(
    directory: Path, name: SplitName, parts: Iterable[TokenizedDocuments], *, vocab_size: int, tokens_per_shard: int
) -> dict[str, Any]:
    """Write a split's shards and document index; returns the split's entry for index.json.

    Its `tokens_sha256` is the hash of all tokens, so it does not depend on the size of the shards.

    Raises InputError for an id outside the vocabulary, and for a split without documents.
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

    shards = _write_shards(directory, f"{name}-{{:05d}}.bin", checked_tokens(), tokens_per_shard)
    starts = np.concatenate([[0], *lengths]).cumsum(dtype="<i8")
    if len(starts) == 1:
        raise InputError(f"the {name} split has no documents; add documents, or change data.validation_fraction")
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


def write_masks(
    directory: Path, name: SplitName, masks: Iterable[np.ndarray], *, tokens_per_shard: int
) -> list[dict[str, Any]]:
    """Write the loss mask of a split, uint8, in shards like those of the tokens; returns the files' entries."""
    return _write_shards(directory, f"{name}-mask-{{:05d}}.bits", masks, tokens_per_shard)


def _write_shards(
    directory: Path, file_name: str, parts: Iterable[np.ndarray], tokens_per_shard: int
) -> list[dict[str, Any]]:
    """Write the concatenated arrays as files of `tokens_per_shard` values each; returns the files' entries."""
    entries: list[dict[str, Any]] = []
    buffered: list[np.ndarray] = []
    num_buffered = 0

    def flush(count: int) -> None:
        nonlocal buffered, num_buffered
        joined = np.concatenate(buffered)
        path = directory / file_name.format(len(entries))
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
    """Write index.json, whose presence marks the directory as complete."""
    index = {
        "format": FORMAT,
        "tokenizer": {"name": tokenizer.name, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "splits": splits,
    }
    index["sha256"] = _index_sha256(index)
    temporary = directory / "index.json.tmp"
    temporary.write_text(json.dumps(index, indent=2) + "\n")
    temporary.replace(directory / "index.json")


class Split:
    """One split as a stream of tokens with random access. Several threads may read it at once.

    `document_starts` is int64 [num_documents + 1]: the start of each document, then `num_tokens`.
    `num_bytes` counts the UTF-8 bytes of the texts. `directory`, `data_id` and `tokenizer_hash` are the dataset's.
    """

    def __init__(self, directory: Path, name: SplitName, index: dict[str, Any]):
        entry = index["splits"][name]
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self.directory = directory
        self.name = name
        self.data_id = _data_id(index)
        self.tokenizer_hash: str = index["tokenizer"]["hash"]
        self.num_tokens: int = entry["tokens"]
        self.num_documents: int = entry["documents"]
        self.num_bytes: int = entry["bytes"]
        self.document_starts: np.ndarray = np.load(directory / entry["document_index"]["file"], mmap_mode="r")
        self._vocab_size: int = index["tokenizer"]["vocab_size"]
        self._shards = [np.memmap(directory / shard["file"], dtype, mode="r") for shard in entry["shards"]]
        self._masks = [np.memmap(directory / mask["file"], np.uint8, mode="r") for mask in entry.get("masks", [])]
        self._bounds = np.cumsum([0, *[len(shard) for shard in self._shards]])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """A copy of the tokens from `start` up to `stop`, which may span shard files, in the type on disk.

        Raises InputError, which names the file, for an id outside the vocabulary. No other damage is detected here.
        """
        pieces = [np.empty(0, self._shards[0].dtype)]
        for shard, piece in self._pieces(self._shards, start, stop):
            if (greatest := int(piece.max(initial=0))) >= self._vocab_size:
                raise InputError(
                    f"{shard.filename} holds the token id {greatest}, which is outside the vocabulary of "
                    f"{self._vocab_size}; {_restore_hint(self.directory)}"
                )
            pieces.append(piece)
        return np.concatenate(pieces)

    @property
    def holds_conversations(self) -> bool:
        """Whether the documents are conversations, so that only the assistant's tokens are in the loss mask."""
        return bool(self._masks)

    def loss_mask(self, start: int, stop: int) -> np.ndarray:
        """The loss mask of the tokens from `start` up to `stop`, bool; all True if documents are text."""
        if not self._masks:
            return np.ones(stop - start, np.bool_)
        pieces = [piece for _, piece in self._pieces(self._masks, start, stop)]
        return np.concatenate([np.empty(0, np.uint8), *pieces]) > 0

    def _pieces(self, files: list[np.memmap], start: int, stop: int) -> Iterator[tuple[np.memmap, np.ndarray]]:
        """(file, slice of it) for each file that holds part of a range of the stream."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} are not in a split of {self.num_tokens} tokens")
        first = max(int(np.searchsorted(self._bounds, start, side="right")) - 1, 0)
        for number, bound in enumerate(self._bounds[first:-1], first):
            if bound >= stop:
                break
            yield files[number], files[number][max(start - bound, 0) : stop - bound]


class Dataset:
    """A prepared directory.

    `data_id` is a hash of the tokenizer, the tokens, the document starts and the loss mask.
    """

    def __init__(self, path: Path, index: dict[str, Any]):
        self.path = path
        self.data_id = _data_id(index)
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.tokenizer_hash: str = index["tokenizer"]["hash"]
        self._splits = {name: Split(path, name, index) for name in SPLITS}

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, verify: Literal["sizes", "sampled", "full"] = "sampled"
    ) -> "Dataset":
        """The dataset at `path`, after a check of its file sizes and, unless `verify` is "sizes", of checksums.

        See data.verify. Raises InputError, which names the file, if the dataset is missing, unfinished or damaged, or
        if `path` is not a local path.
        """
        directory, index = _read_index(path)
        try:
            entries = _file_entries(index)
            for entry in entries:
                _check_size(directory / entry["file"], entry["size"])
            blocks = list(_blocks_to_check(entries, verify))
            for entry, block in progress_bar(blocks, desc=f"checking {directory}", unit=" blocks"):
                _check_block(directory / entry["file"], entry, block)
            return cls(directory, index)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged_index(directory, repr(error)) from error

    def split(self, name: SplitName) -> Split:
        """The split "train" or "validation"."""
        return self._splits[name]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data. Raises InputError if it is missing, damaged or not the one in index.json."""
        tokenizer = Tokenizer.load(self.path / "tokenizer")
        if (tokenizer.hash, tokenizer.vocab_size) != (self.tokenizer_hash, self.vocab_size):
            raise InputError(
                f"{self.path / 'tokenizer'} is not the tokenizer of this data, as {self.path / 'index.json'} names it; "
                f"{_restore_hint(self.path)}"
            )
        return tokenizer


def _read_index(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    directory = mounted_path(path)
    file = directory / "index.json"
    if not file.is_file():
        started = partial_path(directory).is_dir()
        state = "is not fully prepared" if started else "holds no prepared data"
        raise InputError(f"{directory} {state}: index.json is missing; run nextllm prepare")
    try:
        index = json.loads(file.read_bytes())
        version = index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged_index(directory, repr(error)) from error
    if version != FORMAT:
        raise InputError(
            f"{file} has format '{version}' of another version of this program, not '{FORMAT}'; prepare the data "
            f"again: nextllm prepare --overwrite --output {directory}"
        )
    if index.get("sha256") != _index_sha256(index):
        raise _damaged_index(directory, "its sha256 does not match its content")
    return directory, index


def _damaged_index(directory: Path, cause: str) -> InputError:
    return InputError(
        f"{directory / 'index.json'} is damaged ({cause}); restore an intact copy, or remove {directory} and "
        "prepare the data again"
    )


def _restore_hint(directory: Path) -> str:
    return f"restore an intact copy, or prepare the data again: nextllm prepare --overwrite --output {directory}"


def _data_id(index: dict[str, Any]) -> str:
    splits = [index["splits"][name] for name in SPLITS]
    hashes = [[split["tokens_sha256"], split["document_index"]["sha256"]] for split in splits]
    hashes += [[mask["sha256"] for mask in split["masks"]] for split in splits if "masks" in split]
    return hashlib.sha256(json.dumps([index["tokenizer"]["hash"], hashes]).encode()).hexdigest()[:16]


def _index_sha256(index: dict[str, Any]) -> str:
    """The checksum of index.json without its own sha256 entry."""
    content = {name: value for name, value in index.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_entry(path: Path) -> dict[str, Any]:
    """A file's name, size, sha256, and the first 64 bits of the sha256 of each block of BLOCK_BYTES, concatenated."""
    whole, blocks, size = hashlib.sha256(), [], 0
    with open(path, "rb") as file:
        while content := file.read(BLOCK_BYTES):
            whole.update(content)
            blocks.append(_block_digest(content))
            size += len(content)
    return {"file": path.name, "size": size, "sha256": whole.hexdigest(), "blocks": "".join(blocks)}


def _block_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGEST_CHARACTERS]


def _file_entries(index: dict[str, Any]) -> list[dict[str, Any]]:
    splits = [index["splits"][name] for name in SPLITS]
    return [entry for split in splits for entry in files_of(split)]


def files_of(split: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a split's files in index.json."""
    return [*split["shards"], split["document_index"], *split.get("masks", [])]


def _blocks_to_check(entries: list[dict[str, Any]], verify: str) -> Iterator[tuple[dict[str, Any], int]]:
    """(entry, block number) of the blocks to check: all, or a new random sample with at least one of each file."""
    bounds = [0, *itertools.accumulate(len(entry["blocks"]) // _DIGEST_CHARACTERS for entry in entries)]
    chosen: Iterable[int] = range(bounds[-1])
    if verify == "sizes":
        chosen = []
    elif verify == "sampled" and bounds[-1] > SAMPLED_BLOCKS:
        draw = random.SystemRandom()  # not the global generator, which a program may have seeded
        chosen = {*draw.sample(chosen, SAMPLED_BLOCKS), *(draw.randrange(*ends) for ends in itertools.pairwise(bounds))}
    for number in sorted(chosen):
        file = bisect.bisect_right(bounds, number) - 1
        yield entries[file], number - bounds[file]


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise InputError(f"{path} is missing; {_restore_hint(path.parent)}")
    if size != expected:
        raise InputError(f"{path} is damaged: {size} bytes instead of {expected}; {_restore_hint(path.parent)}")


def _check_block(path: Path, entry: dict[str, Any], block: int) -> None:
    """Raise InputError if the checksum of a block of a file differs from index.json."""
    with open(path, "rb") as file:
        file.seek(block * BLOCK_BYTES)
        content = file.read(BLOCK_BYTES)
    if _block_digest(content) != entry["blocks"][block * _DIGEST_CHARACTERS : (block + 1) * _DIGEST_CHARACTERS]:
        start = block * BLOCK_BYTES
        raise InputError(
            f"{path} is damaged or belongs to other data: the sha256 of bytes {start:,} to {start + len(content):,} "
            f"differs from index.json; {_restore_hint(path.parent)}"
        )
