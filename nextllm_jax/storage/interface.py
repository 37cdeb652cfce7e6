"""`Storage`: the operations that a run needs from the place where it is stored. `open_storage` returns one.

`BucketFiles` has those that data, imports and exports need from a bucket.
"""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from nextllm_jax.errors import EXIT_FAILED, InputError

CONNECTIONS = 64
"""Maximum number of simultaneous requests of a process to a bucket."""


class StorageError(InputError, OSError):
    """A bucket that cannot be used, or cannot be used now. The message says why and how to fix it, in one line."""


class StorageUnavailable(StorageError):
    """A service that fails or cannot be reached. The same command may succeed later."""

    exit_code = EXIT_FAILED


class Identity(NamedTuple):
    """What distinguishes a file from earlier and later files of the same name."""

    size: int
    generation: int
    """Changes whenever the file is written."""
    crc32c: str | None = None
    """Base64 of the checksum that the storage service computed; None on disk."""


class _Files(Protocol):
    """What `Storage` and `BucketFiles` share: files in a directory on disk or in a bucket.

    A name is a path relative to the directory, with "/" as separator. Failures raise OSError. Writes are atomic, and
    what is written can be read at once, also by other processes.
    """

    def names(self, directory: str = "") -> list[str]:
        """The names in a directory, without unfinished writes; empty if it is missing."""
        ...

    def files(self, directory: str = "") -> dict[str, Identity]:
        """Every file in a directory and in those below it, sorted by its path relative to the directory."""
        ...

    def identity(self, name: str) -> Identity | None:
        """The identity of a file; None if it is missing."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file; empty if it is missing."""
        ...

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """At most `length` bytes of a file from `start` on. Raises FileNotFoundError if it is missing."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file."""
        ...

    def create(self, name: str, content: bytes) -> Identity | None:
        """Write a file that does not exist yet; None, and nothing is written, if it does."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file, or a directory with all files below it. Nothing happens if it is missing."""
        ...


class Storage(_Files, Protocol):
    """The files in a directory of a run. Only `lock` and `make_directory` create the directory itself."""

    is_local: bool
    """Whether the files are in the file system of this machine."""

    renames: bool
    """Whether `move` is atomic and cheap. If not, moved files are copied, and an interrupted `move` leaves both."""

    def exists(self, name: str) -> bool:
        """Whether there is a file or a directory."""
        ...

    def append(self, name: str, content: bytes) -> None:
        """Append to a file. If that fails, nothing is appended.

        In a bucket, which cannot append, the file is rewritten as a whole: in the background at most every 30 seconds,
        and by `sync`, which raises the error of a rewrite that fails. `read` includes what is not written yet.
        """
        ...

    def replace(self, name: str, content: bytes, found: Identity) -> Identity | None:
        """Replace a file that still has the identity `found`; None, and nothing is written, if it has not."""
        ...

    def move(self, name: str, new: str) -> None:
        """Rename a file or a directory."""
        ...

    def make_directory(self, name: str) -> None:
        """Create an empty directory. Nothing happens if it exists."""
        ...

    def local_directory(self, name: str) -> AbstractContextManager[os.PathLike[str]]:
        """A context with a local directory for new files, which are in directory `name` once it has ended."""
        ...

    def require_writable(self, name: str, *, is_directory: bool) -> None:
        """Raise InputError if a file (or directory) of this name is known not to be writable."""
        ...

    def lock(self, name: str) -> AbstractContextManager[None]:
        """A context that holds a lock until it ends or the process dies.

        Raises InputError, which names the other process, if another process holds it.
        """
        ...

    def require_unlocked(self, name: str) -> None:
        """Raise InputError, which names the process, if a process currently holds a lock."""
        ...

    def sync(self) -> None:
        """Complete all appends, and raise OSError if another process took over the lock that this object holds."""
        ...

    def modified(self, name: str) -> float | None:
        """When a file was written, in seconds since the epoch; None if it is missing."""
        ...

    def clock(self) -> float:
        """The time by the clock of the storage, in seconds since the epoch. Writes and deletes a file."""
        ...

    def free_bytes(self) -> int | None:
        """The space for new files; None if it is not limited."""
        ...


class BucketFiles(_Files, Protocol):
    """The files in a directory of a bucket."""

    def upload(self, name: str, path: Path) -> Identity | None:
        """Write or replace a file with the content of a local file.

        Returns its identity; None if it was deleted meanwhile.
        """
        ...

    def download(self, name: str, path: Path) -> None:
        """Write the content of a file to a local file. Raises FileNotFoundError if it is missing."""
        ...

    def matches(self, found: Identity, path: Path) -> bool:
        """Whether a file of this identity has the content of a local file, by the service's checksum."""
        ...
