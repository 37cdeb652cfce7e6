"""The files in a directory of a Google Cloud Storage bucket.

A bucket has objects, whose names contain "/", but no directories. A directory exists as long as there is an object
below it; `make_directory` writes an empty object whose name ends in "/".
"""

import base64
import concurrent.futures
import contextlib
import functools
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nextllm_jax.storage.appends import Appends
from nextllm_jax.storage.interface import Identity, StorageError
from nextllm_jax.storage.lease import Lease
from nextllm_jax.storage.service import Service, client

SCHEME = "gs://"
_THREADS = 8


@functools.cache
def _service(bucket: str) -> Service:
    return Service(bucket)


class Bucket:
    """The objects below gs://bucket/directory; see `Storage`. The constructor sends no request."""

    is_local = renames = False

    def __init__(self, address: str) -> None:
        bucket, _, directory = address.removeprefix(SCHEME).partition("/")
        self._address = f"{SCHEME}{bucket}/{directory}".rstrip("/")
        self._service, self._name = _service(bucket), bucket
        self._prefix = f"{directory.strip('/')}/" if directory.strip("/") else ""
        self._appends = Appends(self)
        self._lease: Lease | None = None

    def _key(self, name: str) -> str:
        return self._prefix + name.strip("/")

    def _below(self, directory: str) -> str:
        """The prefix of all objects in a directory."""
        key = self._key(directory)
        return f"{key}/" if key and not key.endswith("/") else key

    def _blob(self, name: str) -> Any:
        return client().bucket(self._name).blob(self._key(name))

    def _list(self, prefix: str, *, deep: bool) -> tuple[list[Any], set[str]]:
        """The objects whose names start with a prefix, and, if not `deep`, the directories that start with it."""

        def request(**options: Any) -> tuple[list[Any], set[str]]:
            fields = "items(name,size,generation,crc32c,updated),prefixes,nextPageToken"
            found = client().list_blobs(
                self._name, prefix=prefix, delimiter=None if deep else "/", fields=fields, **options
            )
            return list(found), set(found.prefixes)

        try:
            return self._service.call(request)
        except FileNotFoundError:
            raise self._service.missing() from None

    def names(self, directory: str = "") -> list[str]:
        """The names in a directory; empty if it is missing."""
        prefix = self._below(directory)
        blobs, directories = self._list(prefix, deep=False)
        keys = {blob.name for blob in blobs} | {key.rstrip("/") for key in directories}
        return sorted(name for key in keys if (name := key.removeprefix(prefix)))

    def files(self, directory: str = "") -> dict[str, Identity]:
        """Every object in a directory and below, sorted by its path relative to the directory."""
        prefix = self._below(directory)
        blobs, _ = self._list(prefix, deep=True)
        return {blob.name.removeprefix(prefix): _identity(blob) for blob in blobs if not blob.name.endswith("/")}

    def exists(self, name: str) -> bool:
        """Whether there is a file or a directory."""
        key = self._key(name).rstrip("/")
        blobs, directories = self._list(key, deep=False)
        return (
            bool(not key and (blobs or directories))
            or f"{key}/" in directories
            or any(blob.name == key for blob in blobs)
        )

    def is_directory(self, name: str) -> bool:
        """Whether there is an object below this name."""
        key = self._key(name).rstrip("/")
        blobs, directories = self._list(key, deep=False)
        return bool(not key and (blobs or directories)) or f"{key}/" in directories

    def identity(self, name: str) -> Identity | None:
        """The identity of a file; None if it is missing."""
        blob = self._stat(name)
        return None if blob is None else _identity(blob)

    def _stat(self, name: str) -> Any:
        blob = self._blob(name)
        try:
            self._service.call(blob.reload)
        except FileNotFoundError:
            return None
        return blob

    def read(self, name: str) -> bytes:
        """The content of a file; empty if it is missing."""
        pending = self._appends.content(name)
        if pending is not None:
            return pending
        try:
            return self.read_all(name)
        except FileNotFoundError:
            return b""

    def read_all(self, name: str) -> bytes:
        """The content of a file, compared with the service's checksum. Raises FileNotFoundError if it is missing."""
        return self._service.call(self._blob(name).download_as_bytes, raw_download=True, checksum="crc32c")

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """At most `length` bytes of a file from `start` on. Raises FileNotFoundError if it is missing."""
        from google.api_core.exceptions import RequestRangeNotSatisfiable

        def request(**options: Any) -> bytes:
            with contextlib.suppress(RequestRangeNotSatisfiable):  # at the end of the file
                return self._blob(name).download_as_bytes(
                    start=start, end=start + length - 1, raw_download=True, checksum=None, **options
                )
            return b""

        return self._service.call(request)

    def download(self, name: str, path: Path) -> None:
        """Write the content of a file to a local file. Raises FileNotFoundError if it is missing."""
        self._service.call(self._blob(name).download_to_filename, path, raw_download=True, checksum="crc32c")

    def upload(self, name: str, path: Path) -> Identity:
        """Write or replace a file with the content of a local file. Returns its identity."""
        blob = self._blob(name)
        try:
            self._service.call(blob.upload_from_filename, path, checksum="crc32c")
        except FileNotFoundError:
            raise self._service.missing() from None
        return _identity(blob)

    def matches(self, found: Identity, path: Path) -> bool:
        """Whether a file of this identity has the content of a local file, by the service's checksum."""
        import google_crc32c

        if found.size != path.stat().st_size:
            return False
        digest = google_crc32c.Checksum()
        with open(path, "rb") as file:
            for _ in digest.consume(file, 2**20):
                pass
        return found.crc32c == base64.b64encode(digest.digest()).decode()

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file. Raises StorageError if this object's lease is known to be lost."""
        if self._lease is not None:
            self._lease.require_held()
        self._appends.forget(name)
        self._put(name, content)

    def _put(self, name: str, content: bytes, generation: int | None = None) -> Identity | None:
        """Write a file if its generation matches (0: if it does not exist; None: in any case); None if it does not."""
        from google.api_core.exceptions import PreconditionFailed

        blob, conditions = self._blob(name), {} if generation is None else {"if_generation_match": generation}
        try:
            self._service.call(blob.upload_from_string, content, checksum="crc32c", **conditions)
        except FileNotFoundError:
            raise self._service.missing() from None
        except PreconditionFailed:
            # The first attempt may have succeeded although its answer was lost. Equal content is as good as ours.
            found = self._stat(name)
            same = found is not None and found.size == len(content) and self.read_all(name) == content
            return _identity(found) if same else None
        return _identity(blob)

    def append(self, name: str, content: bytes) -> None:
        """Append to a file, which is written later; see `Storage`."""
        self._appends.append(name, content)

    def create(self, name: str, content: bytes) -> Identity | None:
        """Write a file that does not exist yet; None, and nothing is written, if it does."""
        return self._put(name, content, generation=0)

    def replace(self, name: str, content: bytes, found: Identity) -> Identity | None:
        """Replace a file that still has the identity `found`; None, and nothing is written, if it has not."""
        return self._put(name, content, generation=found.generation)

    def delete(self, name: str) -> None:
        """Delete a file, or a directory with all files below it. Nothing happens if it is missing."""
        key, below = self._key(name), self._below(name)
        blobs, _ = self._list(key, deep=True)
        self._at_once(self._delete, [blob for blob in blobs if blob.name == key or blob.name.startswith(below)])

    def _delete(self, blob: Any, **conditions: Any) -> None:
        from google.api_core.exceptions import PreconditionFailed

        with contextlib.suppress(FileNotFoundError, PreconditionFailed):
            self._service.call(blob.delete, **conditions)

    def delete_if(self, name: str, found: Identity) -> None:
        """Delete a file that still has the identity `found`."""
        self._delete(self._blob(name), if_generation_match=found.generation)

    def move(self, name: str, new: str) -> None:
        """Copy a file or a directory, then delete the original."""
        self.copy(name, new)
        self.delete(name)

    def copy(self, name: str, new: str, to: "Bucket | None" = None) -> None:
        """Copy a file, or a directory with all files below it, to `new` in `to` (None: here).

        Raises FileNotFoundError if it is missing.
        """
        key, below, to = self._key(name), self._below(name), to or self
        blobs, _ = self._list(key, deep=True)
        found = [blob for blob in blobs if blob.name == key or blob.name.startswith(below)]
        if not found:
            raise FileNotFoundError(2, "No such file or directory", f"{self._address}/{name}")

        def copy(blob: Any) -> None:
            copied, token = to._blob(new + blob.name.removeprefix(key)), None
            while True:
                token, _, _ = self._service.call(copied.rewrite, blob, token=token)
                if token is None:
                    return

        # The service's console and some libraries mark a directory by an empty object, whose name ends with a slash.
        self._at_once(copy, [blob for blob in found if not blob.name.endswith("/")])

    def _at_once(self, function: Callable[[Any], None], blobs: Iterable[Any]) -> None:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(function, blobs):
                pass

    def make_directory(self, name: str) -> None:
        """Write the empty object of a directory. Nothing happens if it exists."""
        blob = client().bucket(self._name).blob(f"{self._key(name)}/")
        try:
            self._service.call(blob.upload_from_string, b"", checksum="crc32c")
        except FileNotFoundError:
            raise self._service.missing() from None

    @contextlib.contextmanager
    def local_directory(self, name: str) -> Iterator[Path]:
        """A context with a temporary directory, whose files are uploaded at its end."""
        with tempfile.TemporaryDirectory(prefix="nextllm-") as temporary:
            yield Path(temporary)
            for folder, _, files in os.walk(temporary):
                for file in files:
                    path = Path(folder, file)
                    self._put(f"{name}/{path.relative_to(temporary).as_posix()}", path.read_bytes())

    def require_writable(self, name: str, *, is_directory: bool) -> None:
        """Nothing: `lock` finds missing rights by writing."""

    def modified(self, name: str) -> float | None:
        """When a file was written, in seconds since the epoch; None if it is missing."""
        found = self._stat(name)
        return None if found is None else found.updated.timestamp()

    def clock(self) -> float:
        """The time by the service's clock, which is that of a file that this writes and deletes."""
        file = self._blob(f".clock-{uuid.uuid4().hex[:12]}")
        try:
            self._service.call(file.upload_from_string, b"", checksum="crc32c")
        except FileNotFoundError:
            raise self._service.missing() from None
        self._delete(file)
        return file.updated.timestamp()

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """A context that holds a lease, and writes what was appended before it ends.

        Raises InputError, which names the other process, if another process holds it.
        """
        self._lease = Lease(self, name, self._address)
        self._lease.acquire()
        try:
            try:
                yield
            except BaseException:
                with contextlib.suppress(OSError):
                    self.sync()
                raise
            self.sync()
        finally:
            self._appends.stop()
            self._lease.release()
            self._lease = None

    def require_unlocked(self, name: str) -> None:
        """Raise InputError, which names the process, if a process currently holds a lease."""
        Lease(self, name, self._address).require_free()

    def sync(self) -> None:
        """Write what was appended, and raise StorageError if another process took over the lease."""
        if self._lease is not None:
            self._lease.renew()
        self._appends.flush()

    def free_bytes(self) -> int | None:
        """None: a bucket is not limited."""
        return None


def _identity(blob: Any) -> Identity:
    if blob.generation is None or blob.size is None:
        raise StorageError(f"the service did not describe {blob.name}; is this an implementation of its JSON API?")
    return Identity(int(blob.size), int(blob.generation), blob.crc32c)
