"""`open_storage`: the storage of a path, on disk or in a bucket."""

import os
import re

from etils import epath

from nextllm_jax.errors import InputError
from nextllm_jax.storage.disk import Disk
from nextllm_jax.storage.interface import Storage

_GCS = "gs://"


def open_storage(path: str | os.PathLike[str]) -> Storage:
    """The files in a directory, which need not exist. Accesses none of them.

    Raises InputError for an address that is not supported, and if the package that it needs is not installed.
    """
    address = os.fspath(path)
    if "://" not in address:
        return Disk(address)
    _require_bucket(address)
    from nextllm_jax.storage.bucket import Bucket  # imports the client only for an address

    return Bucket(address)


def as_path(path: str | os.PathLike[str]) -> epath.Path:
    """The path as an object that has the methods of pathlib.Path, for a bucket too. Raises as `open_storage` does."""
    address = os.fspath(path)
    if "://" in address:
        _require_bucket(address)
        from nextllm_jax.storage import bucket_path  # noqa: F401  # registers the paths of buckets
    return epath.Path(address)


def require_local(path: str | os.PathLike[str], name: str) -> None:
    """Raise InputError, which begins with `name`, if a path is an address: an output that needs a file system."""
    if re.match(r"[a-z][a-z0-9]+:/", os.fspath(path)):  # Path("gs://bucket") is "gs:/bucket"
        raise InputError(f"{name} {os.fspath(path)} is not a local path; give one, and copy the result")


def _require_bucket(address: str) -> None:
    if not address.startswith(_GCS):
        raise InputError(
            f"{address} is neither a local path nor gs://BUCKET/DIRECTORY; copy it to this machine and give its path"
        )
    from nextllm_jax.storage.service import client

    client()
