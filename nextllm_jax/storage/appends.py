"""Appending to files in a bucket, which cannot append: they are rewritten as a whole, now and then."""

import contextlib
import threading
from typing import Protocol

from nextllm_jax.storage.interface import Identity, StorageError

EVERY_SECONDS = 30.0


class _Files(Protocol):
    """The operations that `Appends` needs from a bucket."""

    def read(self, name: str) -> bytes: ...
    def identity(self, name: str) -> Identity | None: ...
    def create(self, name: str, content: bytes) -> Identity | None: ...
    def replace(self, name: str, content: bytes, found: Identity) -> Identity | None: ...


class _File:
    """A file to which something was appended."""

    def __init__(self, content: bytes, identity: Identity | None) -> None:
        self.content = bytearray(content)
        self.written = len(content)
        """The number of bytes that are in the bucket."""
        self.identity = identity


class Appends:
    """The files of a bucket to which this process appends. A thread rewrites those that changed every 30 seconds.

    A file is replaced only if it is still what this process wrote, so a process that lost its lease cannot overwrite
    the files of the process that took over.
    """

    def __init__(self, bucket: _Files) -> None:
        self._bucket = bucket
        self._files: dict[str, _File] = {}
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def content(self, name: str) -> bytes | None:
        """The content of a file with all that was appended; None if nothing was appended to it."""
        with self._lock:
            return bytes(self._files[name].content) if name in self._files else None

    def append(self, name: str, content: bytes) -> None:
        """Append to a file. It is written by the thread, or by `flush`."""
        if name not in self._files:
            identity = self._bucket.identity(name)  # before its content: if it changes in between, `flush` fails
            found = _File(self._bucket.read(name), identity)
            with self._lock:
                self._files[name] = found
        with self._lock:
            self._files[name].content += content
        if self._thread is None:
            self._stopped.clear()
            self._thread = threading.Thread(target=self._flush_regularly, name="appends", daemon=True)
            self._thread.start()

    def forget(self, name: str) -> None:
        """Drop what was appended to a file, since it is written or deleted as a whole."""
        with self._flushing, self._lock:
            self._files.pop(name, None)

    def flush(self) -> None:
        """Write every file that changed. Raises StorageError if a file was written by another process."""
        with self._flushing:
            with self._lock:
                changed = {
                    name: bytes(file.content) for name, file in self._files.items() if len(file.content) > file.written
                }
            for name, content in changed.items():
                file = self._files[name]
                if file.identity is None:
                    identity = self._bucket.create(name, content)
                else:
                    identity = self._bucket.replace(name, content, file.identity)
                if identity is None:
                    raise StorageError(f"{name} was written by another process; two processes train in this directory")
                file.identity, file.written = identity, len(content)

    def stop(self) -> None:
        """Stop the thread and drop all files. Does not write them."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None
        with self._lock:
            self._files.clear()

    def _flush_regularly(self) -> None:
        while not self._stopped.wait(EVERY_SECONDS):
            with contextlib.suppress(OSError):  # the next attempt, at the latest `flush` at a save, may succeed
                self.flush()
