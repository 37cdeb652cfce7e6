"""The files of prepared data in a bucket, which are read in blocks: several ahead, each verified, and cached.

Windows are visited in a shuffled order, so a cache that holds a fraction of the blocks answers that fraction of reads,
whichever blocks it holds. Each block therefore has one slot in the cache, its number modulo the number of slots.
"""

import contextlib
import io
import itertools
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from nextllm_jax.data import blocks
from nextllm_jax.data.shard_files import ShardArray
from nextllm_jax.errors import InputError
from nextllm_jax.storage.interface import CONNECTIONS
from nextllm_jax.storage.open_storage import open_bucket

_log = logging.getLogger(__name__)

_CACHE_FILE = "blocks"
_AHEAD = 2
"""Windows that are asked for at once, for each connection: while one is answered, the next one waits."""


class BucketShards:
    """The files of a prepared directory in a bucket. See `ShardFiles`.

    Blocks of up to `cache_bytes` are kept in memory, or in a file in `cache_dir`.
    """

    concurrent_windows = _AHEAD * CONNECTIONS
    verifies_reads = True

    def __init__(
        self, directory: epath.Path, entries: list[dict[str, Any]], *, cache_dir: str | None, cache_bytes: int
    ) -> None:
        self._directory, self._bucket = directory, open_bucket(directory)
        numbers = itertools.accumulate(map(blocks.num_blocks, entries), initial=0)
        self._first = {entry["file"]: first for entry, first in zip(entries, numbers, strict=False)}
        self._slots = cache_bytes // blocks.BLOCK_BYTES
        self._file = _CacheFile(cache_dir, self._slots) if cache_dir and self._slots else None
        self._kept: dict[int, Future[bytes]] = {}
        self._read: weakref.WeakValueDictionary[int, Future[bytes]] = weakref.WeakValueDictionary()
        """By number, all blocks that are kept, or that a caller of `fetch` still needs."""
        self._lock = threading.Lock()
        self._workers = _Workers()
        self._sizes: dict[str, int] | None = None

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None if it is missing."""
        if self._sizes is None:
            self._sizes = {file: found.size for file, found in self._bucket.files().items()}
        return self._sizes.get(name)

    def verify(self, entry: dict[str, Any], block: int) -> None:
        """Raise InputError if the checksum of a block differs from the entry's."""
        self.block(entry, block).result()

    def array(self, entry: dict[str, Any], dtype: np.dtype[Any]) -> ShardArray:
        """The numbers in a file, which are not read yet."""
        return _BlockArray(self, f"{self._directory}/{entry['file']}", entry, dtype)

    def load(self, entry: dict[str, Any]) -> np.ndarray:
        """The array in a .npy file."""
        content = self.array(entry, np.dtype(np.uint8)).read(0, entry["size"])
        return np.load(io.BytesIO(content.tobytes()))

    def block(self, entry: dict[str, Any], block: int) -> Future[bytes]:
        """A block of a file, which is being read if it is not in memory."""
        number = self._first[entry["file"]] + block
        with self._lock:
            future = self._read.get(number)
            if future is None or (future.done() and future.exception()):
                future = self._read[number] = self._workers.submit(lambda: self._load(entry, block, number))
            if self._slots and not self._file:
                self._kept[number % self._slots] = future
        return future

    def _load(self, entry: dict[str, Any], block: int, number: int) -> bytes:
        """A verified block, from the cache file or else from the bucket."""
        size = blocks.block_size(entry, block)
        if self._file and blocks.is_intact(entry, block, content := self._file.read(number, size)):
            return content
        for _ in range(2):  # what was damaged on its way is intact when it is sent again
            try:
                content = self._bucket.read_range(entry["file"], block * blocks.BLOCK_BYTES, size)
            except FileNotFoundError as error:
                raise InputError(
                    f"{self._directory}/{entry['file']} is missing; {blocks.restore_hint(self._directory)}"
                ) from error
            if blocks.is_intact(entry, block, content):
                if self._file:
                    self._file.write(number, content)
                return content
        raise blocks.damaged_block(self._directory, entry, block)


class _BlockArray:
    def __init__(self, shards: BucketShards, name: str, entry: dict[str, Any], dtype: np.dtype[Any]) -> None:
        self._shards, self.name, self._entry, self._dtype = shards, name, entry, dtype

    def __len__(self) -> int:
        return self._entry["size"] // self._dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        first, last = start * self._dtype.itemsize, stop * self._dtype.itemsize
        begin, pieces = first // blocks.BLOCK_BYTES * blocks.BLOCK_BYTES, []
        for future in self.fetch(start, stop):
            pieces.append(memoryview(future.result())[max(first - begin, 0) : last - begin])
            begin += blocks.BLOCK_BYTES
        return np.frombuffer(b"".join(pieces), self._dtype)

    def fetch(self, start: int, stop: int) -> list[Future[bytes]]:
        size = self._dtype.itemsize
        first, last = start * size // blocks.BLOCK_BYTES, -(-stop * size // blocks.BLOCK_BYTES)
        return [self._shards.block(self._entry, block) for block in range(first, last)]


class _CacheFile:
    """A file with a slot for each of a number of blocks, which several processes may share.

    What is read must be verified: a slot may hold another block, or one that is being or was not completely written.
    """

    def __init__(self, directory: str, slots: int) -> None:
        self._path, self._slots = Path(directory, _CACHE_FILE), slots
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            weakref.finalize(self, os.close, self._descriptor)
            if os.fstat(self._descriptor).st_size > slots * blocks.BLOCK_BYTES:
                os.truncate(self._descriptor, slots * blocks.BLOCK_BYTES)
        except OSError as error:
            raise InputError(
                f"data.cache_dir {directory} cannot be written ({error.strerror}); give a directory on a local disk"
            ) from error
        self._is_full, self._lock = False, threading.Lock()

    def read(self, number: int, size: int) -> bytes:
        """What is in the slot of a block; empty if it cannot be read."""
        with contextlib.suppress(OSError):
            return os.pread(self._descriptor, size, number % self._slots * blocks.BLOCK_BYTES)
        return b""

    def write(self, number: int, content: bytes) -> None:
        """Write a block to its slot. A failure is reported once."""
        try:
            os.pwrite(self._descriptor, content, number % self._slots * blocks.BLOCK_BYTES)
        except OSError as error:
            with self._lock:
                is_known, self._is_full = self._is_full, True
            if not is_known:
                _log.warning(f"data is not cached: {self._path} cannot be written ({error.strerror})")


class _Workers:
    """Threads that call functions. They do not keep the process from ending while a request is repeated."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[bytes], Callable[[], bytes]] | None] = queue.SimpleQueue()
        self._count = 0

    def submit(self, function: Callable[[], bytes]) -> Future[bytes]:
        """The future result of a function. Not safe for several threads at once."""
        future: Future[bytes] = Future()
        self._queue.put((future, function))
        if self._count < CONNECTIONS:
            self._count += 1
            threading.Thread(target=_work, args=(self._queue,), name="data", daemon=True).start()
            weakref.finalize(self, self._queue.put, None)
        return future


def _work(waiting: queue.SimpleQueue[tuple[Future[bytes], Callable[[], bytes]] | None]) -> None:
    while (each := waiting.get()) is not None:
        future, function = each
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        del each, future, function  # what is not kept is freed while the thread waits
