"""Random access to the files of prepared data: `ShardFiles`, and its implementation for a file system."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nextllm_jax.data import blocks


class ShardArray(Protocol):
    """A file of numbers. Several threads may read it at once."""

    name: str
    """The path of the file."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """The numbers from `start` up to `stop`. Raises InputError if they cannot be read or are damaged."""
        ...

    def fetch(self, start: int, stop: int) -> Any:
        """Start to read a range, for a call of `read` while the result is referenced. Does not wait."""
        ...


class ShardFiles(Protocol):
    """The files of a prepared directory, by their entries in index.json."""

    concurrent_windows: int
    """The number of windows that should be read at once."""
    verifies_reads: bool
    """Whether whatever is read is compared with its checksum."""

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None if it is missing."""
        ...

    def verify(self, entry: dict[str, Any], block: int) -> None:
        """Raise InputError if the checksum of a block differs from the entry's."""
        ...

    def array(self, entry: dict[str, Any], dtype: np.dtype[Any]) -> ShardArray:
        """The numbers in a file."""
        ...

    def load(self, entry: dict[str, Any]) -> np.ndarray:
        """The array in a .npy file."""
        ...


class MappedFiles:
    """Files that are memory-mapped. See `ShardFiles`."""

    concurrent_windows = 1
    verifies_reads = False

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None if it is missing."""
        path = self._directory / name
        return path.stat().st_size if path.is_file() else None

    def verify(self, entry: dict[str, Any], block: int) -> None:
        """Raise InputError if the checksum of a block differs from the entry's."""
        with open(self._directory / entry["file"], "rb") as file:
            file.seek(block * blocks.BLOCK_BYTES)
            content = file.read(blocks.BLOCK_BYTES)
        if not blocks.is_intact(entry, block, content):
            raise blocks.damaged_block(self._directory, entry, block)

    def array(self, entry: dict[str, Any], dtype: np.dtype[Any]) -> ShardArray:
        """The numbers in a file, which are not read yet."""
        return _MappedArray(self._directory / entry["file"], dtype)

    def load(self, entry: dict[str, Any]) -> np.ndarray:
        """The array in a .npy file, memory-mapped."""
        return np.load(self._directory / entry["file"], mmap_mode="r")


class _MappedArray:
    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.name = str(path)
        self._array = np.memmap(path, dtype, mode="r")

    def __len__(self) -> int:
        return len(self._array)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._array[start:stop]

    def fetch(self, start: int, stop: int) -> None:
        pass
