"""Token shards: writing them to disk, and random access to them on disk or in a bucket.

A prepared directory holds

    index.json              counts, the size and checksums of every file below, and a checksum of itself
    settings.json           the settings of the preparation
    tokenizer/              the tokenizer
    train-00000.bin ...     the tokens of all documents, concatenated, little-endian uint16 or uint32
    train-documents.npy     int64: the start of each document, then the number of tokens
    train-mask-00000.bits   the loss mask, for conversations only; a byte per token, 1 for the assistant's tokens
    validation-...          the same for the held-out documents

A document may span several shard files.
"""

import bisect
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath

from nextllm_jax.config import DataConfig
from nextllm_jax.data.blocks import file_entry, num_blocks, restore_hint
from nextllm_jax.data.shard_files import MappedFiles, ShardArray, ShardFiles
from nextllm_jax.errors import InputError
from nextllm_jax.progress import progress_bar
from nextllm_jax.storage.open_storage import as_path, is_address
from nextllm_jax.tokenizer.tokenizer import Tokenizer

FORMAT = "nextllm_jax tokens 3"
SPLITS = ("train", "validation")
SplitName = Literal["train", "validation"]

DataPath = Path | epath.Path
"""The directory of prepared data: a Path on disk, or an epath.Path in a bucket."""

SAMPLED_BLOCKS = 1024
"""Random blocks that a sampled check reads, in addition to one of each file.

That is 256 MiB. A file of other data is always found. In data of S bytes, one flipped bit is found with probability
256 MiB / S, and damage to a fraction f of the blocks with probability 1 - (1 - f)^1024, which is 0.99 for f = 0.0045.
"""


class TokenizedDocuments(NamedTuple):
    """Some documents: their concatenated tokens, the number of tokens of each, and the UTF-8 bytes of all texts."""

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of token ids on disk: little-endian uint16, or uint32 for a larger vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def data_path(path: str | os.PathLike[str]) -> DataPath:
    """A path or an address as a path object. Raises InputError for an address that is not supported."""
    address = re.sub(r"^([a-z0-9]+):/(?!/)", r"\1://", os.fspath(path))  # Path("gs://bucket") is "gs:/bucket"
    return as_path(address) if is_address(address) else Path(path)


def partial_path(output: Path) -> Path:
    """The directory in which `output` on disk is prepared; it is renamed to `output` once it is complete."""
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
        "document_index": file_entry(directory / documents_file),
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
        entries.append(file_entry(path))
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

    `num_bytes` counts the UTF-8 bytes of the texts. `directory`, `data_id` and `tokenizer_hash` are the dataset's.
    `concurrent_windows` is the number of windows that should be read at once.
    """

    def __init__(self, directory: DataPath, name: SplitName, index: dict[str, Any], files: ShardFiles):
        entry = index["splits"][name]
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self.directory = directory
        self.name = name
        self.data_id = _data_id(index)
        self.tokenizer_hash: str = index["tokenizer"]["hash"]
        self.num_tokens: int = entry["tokens"]
        self.num_documents: int = entry["documents"]
        self.num_bytes: int = entry["bytes"]
        self.concurrent_windows = files.concurrent_windows
        self._load_starts = functools.partial(files.load, entry["document_index"])
        self._vocab_size: int = index["tokenizer"]["vocab_size"]
        self._dtype = dtype
        self._shards = [files.array(shard, dtype) for shard in entry["shards"]]
        self._masks = [files.array(mask, np.dtype(np.uint8)) for mask in entry.get("masks", [])]
        self._bounds = np.cumsum([0, *[len(shard) for shard in self._shards]])

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        """The start of each document, then `num_tokens`: int64 [num_documents + 1]."""
        return self._load_starts()

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """A copy of the tokens from `start` up to `stop`, which may span shard files, in the type on disk.

        Raises InputError, which names the file, for an id outside the vocabulary, and for damage to data in a bucket.
        No other damage is detected here.
        """
        pieces = [np.empty(0, self._dtype)]
        for shard, *part in self._parts(self._shards, start, stop):
            piece = shard.read(*part)
            if (greatest := int(piece.max(initial=0))) >= self._vocab_size:
                raise InputError(
                    f"{shard.name} holds the token id {greatest}, which is outside the vocabulary of "
                    f"{self._vocab_size}; {restore_hint(self.directory)}"
                )
            pieces.append(piece)
        return np.concatenate(pieces)

    @property
    def holds_conversations(self) -> bool:
        """Whether the documents are conversations. Only the assistant's tokens are then in the loss mask."""
        return bool(self._masks)

    def loss_mask(self, start: int, stop: int) -> np.ndarray:
        """The loss mask of the tokens from `start` up to `stop`, bool; all True if documents are text."""
        if not self._masks:
            return np.ones(stop - start, np.bool_)
        pieces = [mask.read(*part) for mask, *part in self._parts(self._masks, start, stop)]
        return np.concatenate([np.empty(0, np.uint8), *pieces]) > 0

    @contextlib.contextmanager
    def fetching(self, ranges: Sequence[tuple[int, int]]) -> Iterator[None]:
        """A context in which (start, stop) ranges of the stream are read. They are fetched from a bucket at once."""
        held = [
            file.fetch(*part)
            for files in (self._shards, self._masks)
            for start, stop in ranges
            for file, *part in self._parts(files, start, stop)
        ]
        yield
        held.clear()

    def _parts(self, files: list[ShardArray], start: int, stop: int) -> Iterator[tuple[ShardArray, int, int]]:
        """(file, start in it, stop in it) for each file that holds part of a range of the stream."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} are not in a split of {self.num_tokens} tokens")
        first = max(int(np.searchsorted(self._bounds, start, side="right")) - 1, 0)
        for file, bound, end in zip(files[first:], self._bounds[first:], self._bounds[first + 1 :], strict=False):
            if bound >= stop:
                break
            yield file, int(max(start - bound, 0)), int(min(stop, end) - bound)


class Dataset:
    """A prepared directory.

    `data_id` is a hash of the tokenizer, the tokens, the document starts and the loss mask. `verifies_reads` says
    whether whatever is read is compared with its checksum.
    """

    def __init__(self, path: DataPath, index: dict[str, Any], files: ShardFiles):
        self.path = path
        self.data_id = _data_id(index)
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.tokenizer_hash: str = index["tokenizer"]["hash"]
        self.verifies_reads = files.verifies_reads
        self._splits = {name: Split(path, name, index, files) for name in SPLITS}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        verify: Literal["sizes", "sampled", "full"] = "sampled",
        cache_dir: str | None = None,
        cache_bytes: int = DataConfig.cache_bytes,
    ) -> "Dataset":
        """The dataset at `path`, after a check of its file sizes and, unless `verify` is "sizes", of checksums.

        See data.verify. In a bucket, where each block is verified when it is read, "sampled" reads none at the start;
        the others are in DataConfig. Raises InputError, which names the file, if the dataset is missing, unfinished or
        damaged.
        """
        directory = data_path(path)
        index = _read_index(directory)
        try:
            entries = _file_entries(index)
            files = _open_files(directory, entries, cache_dir, cache_bytes)
            for entry in entries:
                _check_size(directory, entry, files.size(entry["file"]))
            if verify == "full" or (verify == "sampled" and not files.verifies_reads):
                _check_blocks(directory, files, list(_blocks_to_check(entries, verify)))
            return cls(directory, index, files)
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
                f"{restore_hint(self.path)}"
            )
        return tokenizer


def _open_files(
    directory: DataPath, entries: list[dict[str, Any]], cache_dir: str | None, cache_bytes: int
) -> ShardFiles:
    if isinstance(directory, Path):
        return MappedFiles(directory)
    from nextllm_jax.data.bucket_shards import BucketShards

    return BucketShards(directory, entries, cache_dir=cache_dir, cache_bytes=cache_bytes)


def _read_index(directory: DataPath) -> dict[str, Any]:
    file = directory / "index.json"
    if not file.is_file():
        started = isinstance(directory, Path) and partial_path(directory).is_dir()
        state = "is not fully prepared" if started else "holds no prepared data"
        raise InputError(f"{directory} {state}: index.json is missing; run nextllm prepare --output {directory}")
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
    return index


def _damaged_index(directory: DataPath, cause: str) -> InputError:
    return InputError(
        f"{directory / 'index.json'} is damaged ({cause}); restore an intact copy, or remove {directory} and "
        "prepare the data again"
    )


def _data_id(index: dict[str, Any]) -> str:
    splits = [index["splits"][name] for name in SPLITS]
    hashes = [[split["tokens_sha256"], split["document_index"]["sha256"]] for split in splits]
    hashes += [[mask["sha256"] for mask in split["masks"]] for split in splits if "masks" in split]
    return hashlib.sha256(json.dumps([index["tokenizer"]["hash"], hashes]).encode()).hexdigest()[:16]


def _index_sha256(index: dict[str, Any]) -> str:
    """The checksum of index.json without its own sha256 entry."""
    content = {name: value for name, value in index.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_entries(index: dict[str, Any]) -> list[dict[str, Any]]:
    splits = [index["splits"][name] for name in SPLITS]
    return [entry for split in splits for entry in files_of(split)]


def files_of(split: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a split's files in index.json."""
    return [*split["shards"], split["document_index"], *split.get("masks", [])]


def _check_blocks(directory: DataPath, files: ShardFiles, checked: list[tuple[dict[str, Any], int]]) -> None:
    """Raise InputError if the checksum of one of some blocks, (entry, block number), differs from index.json."""
    with concurrent.futures.ThreadPoolExecutor(files.concurrent_windows) as pool:
        done = pool.map(files.verify, *zip(*checked, strict=True)) if checked else ()
        for _ in progress_bar(done, desc=f"checking {directory}", total=len(checked), unit=" blocks"):
            pass


def _blocks_to_check(entries: list[dict[str, Any]], verify: str) -> Iterator[tuple[dict[str, Any], int]]:
    """(entry, block number) of the blocks to check: all, or a new random sample with at least one of each file."""
    bounds = [0, *itertools.accumulate(num_blocks(entry) for entry in entries)]
    chosen: Iterable[int] = range(bounds[-1])
    if verify == "sampled" and bounds[-1] > SAMPLED_BLOCKS:
        draw = random.SystemRandom()  # not the global generator, which a program may have seeded
        chosen = {*draw.sample(chosen, SAMPLED_BLOCKS), *(draw.randrange(*ends) for ends in itertools.pairwise(bounds))}
    for number in sorted(chosen):
        file = bisect.bisect_right(bounds, number) - 1
        yield entries[file], number - bounds[file]


def _check_size(directory: DataPath, entry: dict[str, Any], size: int | None) -> None:
    path, expected = directory / entry["file"], entry["size"]
    if size is None:
        raise InputError(f"{path} is missing; {restore_hint(directory)}")
    if size != expected:
        raise InputError(f"{path} is damaged: {size} bytes instead of {expected}; {restore_hint(directory)}")
