"""Paths of buckets for etils.epath, which orbax uses for its small files. Importing this module registers them.

epath's own way needs gcsfs, which looks for credentials again at each call, even of an emulator. Here all requests go
through `Bucket`, with its credentials, retries and errors.
"""

import fnmatch
import functools
import io
import posixpath
from collections.abc import Callable, Iterator
from typing import IO, Any

from etils import epath
from etils.epath import backend, gpath, stat_utils

from nextllm_jax.storage.bucket import SCHEME, Bucket
from nextllm_jax.storage.s3 import S3
from nextllm_jax.storage.s3 import SCHEME as S3_SCHEME


def directory(address: str) -> Bucket | S3:
    """The files below an address."""
    return S3(address) if address.startswith(S3_SCHEME) else Bucket(address)


@functools.cache
def _root(bucket: str) -> Any:
    return directory(bucket)


def _split(path: epath.PathLike) -> tuple[Any, str]:
    """The bucket of a path, and the name in it. Paths in S3 can only be read and written, not moved or copied."""
    scheme, _, rest = str(path).partition("://")
    bucket, _, name = rest.partition("/")
    return _root(f"{scheme}://{bucket}"), name


class _Written(io.BytesIO):
    """A new file, which is written when it is closed."""

    def __init__(self, path: epath.PathLike, content: bytes = b"") -> None:
        super().__init__()
        self._path = path
        self.write(content)

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            super().close()  # incomplete
        self.close()

    def close(self) -> None:
        if not self.closed:
            bucket, name = _split(self._path)
            bucket.write(name, self.getvalue())
        super().close()


class _BucketBackend(backend.Backend):
    """File operations on gs:// and s3:// paths."""

    def open(self, path: epath.PathLike, mode: str) -> IO[Any]:
        bucket, name = _split(path)
        if "r" in mode:
            file = io.BytesIO(bucket.read_all(name))
        else:
            file = _Written(path, bucket.read(name) if "a" in mode else b"")
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

    def exists(self, path: epath.PathLike) -> bool:
        bucket, name = _split(path)
        return bucket.exists(name)

    def isdir(self, path: epath.PathLike) -> bool:
        bucket, name = _split(path)
        return bucket.is_directory(name)

    def listdir(self, path: epath.PathLike) -> list[str]:
        bucket, name = _split(path)
        return bucket.names(name)

    def glob(self, path: epath.PathLike) -> list[str]:
        parent, pattern = posixpath.split(str(path))
        parents = self.glob(parent) if any(letter in parent for letter in "*?[") else [parent]
        return [f"{each}/{name}" for each in parents for name in self.listdir(each) if fnmatch.fnmatch(name, pattern)]

    def walk(
        self,
        top: epath.PathLike,
        *,
        top_down: bool = True,
        on_error: Callable[[OSError], object] | None = None,
    ) -> Iterator[tuple[epath.PathLike, list[str], list[str]]]:
        names = self.listdir(top)
        directories = [name for name in names if self.isdir(f"{top}/{name}")]
        here = top, directories, [name for name in names if name not in directories]
        if top_down:
            yield here
        for name in directories:
            yield from self.walk(f"{top}/{name}", top_down=top_down, on_error=on_error)
        if not top_down:
            yield here

    def makedirs(self, path: epath.PathLike, *, exist_ok: bool = False, mode: int | None = None) -> None:
        self.mkdir(path, exist_ok=exist_ok)

    def mkdir(self, path: epath.PathLike, *, exist_ok: bool = False, mode: int | None = None) -> None:
        """Nothing: a directory exists once there is a file in it."""
        if not exist_ok and self.exists(path):
            raise FileExistsError(17, "File exists", str(path))

    def rmtree(self, path: epath.PathLike) -> None:
        bucket, name = _split(path)
        bucket.delete(name)

    def remove(self, path: epath.PathLike) -> None:
        bucket, name = _split(path)
        if bucket.identity(name) is None:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        bucket.delete(name)

    def rename(self, path: epath.PathLike, dst: epath.PathLike) -> None:
        bucket, name = _split(path)
        bucket.move(name, _split(dst)[1])

    def replace(self, path: epath.PathLike, dst: epath.PathLike) -> None:
        self.rename(path, dst)

    def copy(self, path: epath.PathLike, dst: epath.PathLike, overwrite: bool) -> None:
        bucket, name = _split(path)
        if not overwrite and self.exists(dst):
            raise FileExistsError(17, "File exists", str(dst))
        to, new = _split(dst)
        bucket.copy(name, new, to)

    def stat(self, path: epath.PathLike) -> stat_utils.StatResult:
        bucket, name = _split(path)
        found = bucket.identity(name)
        if found is None and not bucket.is_directory(name):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return stat_utils.StatResult(is_directory=found is None, length=found.size if found else 0, mtime=0)


@epath.register_path_cls([SCHEME, S3_SCHEME])
class BucketPath(gpath.PosixGPath):
    """A path such as gs://bucket/run/config.json."""

    @property
    def _backend(self) -> backend.Backend:
        return _BACKEND

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self


_BACKEND = _BucketBackend()
