"""File operations in a directory on a local or mounted disk."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nextllm_jax.errors import InputError
from nextllm_jax.storage.interface import Identity

_NEW = ".new"


class Disk:
    """The files in a directory; see `Storage`."""

    is_local = renames = True

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)

    def names(self, directory: str = "") -> list[str]:
        """The names in a directory, without unfinished writes; empty if it is missing."""
        try:
            names = os.listdir(self._directory / directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [name for name in names if not (name.startswith(".") and name.endswith(_NEW))]

    def files(self, directory: str = "") -> dict[str, Identity]:
        """Every file in a directory and in those below it, sorted by its path relative to the directory."""
        top = self._directory / directory
        names = [
            os.path.relpath(os.path.join(folder, name), top) for folder, _, names in os.walk(top) for name in names
        ]
        found = {name: self.identity(os.path.join(directory, name)) for name in sorted(names)}
        return {name: identity for name, identity in found.items() if identity}

    def exists(self, name: str) -> bool:
        """Whether there is a file or a directory."""
        return os.path.exists(self._directory / name)

    def identity(self, name: str | os.PathLike[str]) -> Identity | None:
        """The identity of a file; None if it is missing."""
        try:
            found = os.stat(self._directory / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Identity(found.st_size, hash((found.st_mtime_ns, found.st_ino)))

    def read(self, name: str) -> bytes:
        """The content of a file; empty if it is missing."""
        try:
            return (self._directory / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """At most `length` bytes of a file from `start` on. Raises FileNotFoundError if it is missing."""
        with open(self._directory / name, "rb") as file:
            file.seek(start)
            return file.read(length)

    def write(self, name: str, content: bytes) -> None:
        """Replace a file atomically."""
        path = self._target(name)
        new = path.with_name(f".{path.name}{_NEW}")
        try:
            new.write_bytes(content)
            new.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise

    def append(self, name: str, content: bytes) -> None:
        """Append to a file. If that fails, nothing is appended."""
        path = self._target(name)
        size = os.path.getsize(path) if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(content)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise

    def create(self, name: str, content: bytes) -> Identity | None:
        """Write a file that does not exist yet; None, and nothing is written, if it does."""
        path = self._target(name)
        new = path.with_name(f".{path.name}.{os.getpid()}{_NEW}")
        try:
            new.write_bytes(content)
            os.link(new, path)
        except FileExistsError:
            return None
        finally:
            new.unlink(missing_ok=True)
        return self.identity(name)

    def replace(self, name: str, content: bytes, found: Identity) -> Identity | None:
        """Replace a file that still has the identity `found`; None, and nothing is written, if it has not.

        Not safe against a process that replaces the file at the same moment, which the lock of a run excludes.
        """
        if self.identity(name) != found:
            return None
        self.write(name, content)
        return self.identity(name)

    def delete(self, name: str) -> None:
        """Delete a file, or a directory with all files below it. Nothing happens if it is missing."""
        path = self._directory / name
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def move(self, name: str, new: str) -> None:
        """Rename a file or a directory."""
        (self._directory / name).rename(self._target(new))

    def make_directory(self, name: str) -> None:
        """Create a directory. Nothing happens if it exists."""
        (self._directory / name).mkdir(exist_ok=True)

    @contextlib.contextmanager
    def local_directory(self, name: str) -> Iterator[Path]:
        """A context with the directory `name` itself."""
        yield self._directory / name

    def _target(self, name: str) -> Path:
        path = self._directory / name
        if "/" in name:  # the run directory itself is not created: if it vanished, the write must fail
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def require_writable(self, name: str, *, is_directory: bool) -> None:
        """Raise InputError if a file (or directory) of this name cannot be written."""
        path = (self._directory / name).absolute()
        while not os.path.exists(path):
            path, is_directory = path.parent, True
        if not (os.path.isdir(path) if is_directory else os.path.isfile(path)):
            kind = "directory" if is_directory else "regular file"
            raise InputError(f"{path} is not a {kind}; move it, or choose another --workdir")
        if not os.access(path, os.W_OK | os.X_OK if is_directory else os.W_OK):
            raise InputError(f"{path} is not writable; make it writable, or choose another --workdir")

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a lock until the context ends or the process dies.

        Raises InputError, which names the other process, if another process holds it.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._directory / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not lock_file(descriptor):
                raise self._in_use(descriptor)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            yield
        finally:
            with contextlib.suppress(OSError):  # closing is not enough, since a forked child may hold the descriptor
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def require_unlocked(self, name: str) -> None:
        """Raise InputError, which names the process, if a process currently holds a lock."""
        with contextlib.suppress(OSError), open(self._directory / name, "rb") as file:
            if not lock_file(file.fileno(), shared=True):
                raise self._in_use(file.fileno())

    def sync(self) -> None:
        """Nothing: `append` writes at once, and a lock on disk cannot be taken over."""

    def modified(self, name: str) -> float | None:
        """When a file was written, in seconds since the epoch; None if it is missing."""
        path = self._directory / name
        return path.stat().st_mtime if path.exists() else None

    def clock(self) -> float:
        """The time by the clock of the file system, in seconds since the epoch."""
        with tempfile.NamedTemporaryFile(
            dir=_existing(self._directory.absolute().parent), prefix=".nextllm-clock-"
        ) as file:
            return Path(file.name).stat().st_mtime

    def free_bytes(self) -> int | None:
        """The free space on the disk."""
        return shutil.disk_usage(_existing(self._directory.absolute())).free

    def _in_use(self, descriptor: int) -> InputError:
        try:
            holder = json.loads(os.pread(descriptor, 1000, 0))
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (ValueError, KeyError):
            who = "another process"
        return InputError(f"{self._directory} is in use by {who}; stop that process, or choose another --workdir")


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def lock_file(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file or directory until it is closed. Returns False if another process holds the lock.

    With `wait`, waits for the lock instead. On a file system without locks, nothing is locked and this returns True.
    """
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
    return True
