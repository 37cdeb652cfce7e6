"""What is stored at a path, on disk or in a bucket: `open_storage`, `open_bucket` and `as_path`."""

import os
import re

from etils import epath

from nextllm_jax.errors import InputError
from nextllm_jax.storage.disk import Disk
from nextllm_jax.storage.interface import BucketFiles, Storage

_GCS, _S3 = "gs://", "s3://"
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]*[a-zA-Z0-9]")


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address, such as gs://bucket/data, and not one in the file system."""
    # Path("gs://bucket") is "gs:/bucket". A misspelled gs:bucket/data is taken for an address too, to be refused.
    return re.match(r"[a-zA-Z][a-zA-Z0-9]+:/|(gs|s3):", os.fspath(path)) is not None


def open_storage(path: str | os.PathLike[str]) -> Storage:
    """The files of a run in a directory, which need not exist. Accesses none of them.

    Raises InputError for an address that is not supported, and if the package that it needs is not installed.
    """
    address = os.fspath(path)
    if not is_address(address):
        return Disk(address)
    if address.startswith(_S3):
        raise InputError(
            f"{address} cannot be a run: orbax writes no checkpoints to S3; give a local path or "
            "gs://BUCKET/DIRECTORY (data, imported models and exports may be in s3://)"
        )
    _require_bucket(address)
    if special := {*"#?%"} & {*address}:
        raise InputError(f"{address} cannot be a run: orbax takes '{min(special)}' for a part of a URL; leave it out")
    from nextllm_jax.storage.bucket import Bucket  # imports the client only for an address

    return Bucket(address)


def open_bucket(address: str | os.PathLike[str]) -> BucketFiles:
    """The files in a directory of a bucket, which need not exist. Accesses none of them. Raises as `open_storage`."""
    _require_bucket(os.fspath(address))
    from nextllm_jax.storage.bucket_path import directory

    return directory(os.fspath(address))


def as_path(path: str | os.PathLike[str]) -> epath.Path:
    """The path as an object that has the methods of pathlib.Path, for a bucket too. Raises as `open_storage` does."""
    address = os.fspath(path)
    if is_address(address):
        _require_bucket(address)
        from nextllm_jax.storage import bucket_path  # noqa: F401  # registers the paths of buckets
    return epath.Path(address)


def require_local(path: str | os.PathLike[str], name: str) -> None:
    """Raise InputError, which begins with `name`, if a path is an address: an output that needs a file system."""
    if is_address(path):
        raise InputError(f"{name} {os.fspath(path)} is not a local path; give one, and copy the result")


def _require_bucket(address: str) -> None:
    if address.startswith(_GCS):
        from nextllm_jax.storage.service import client
    elif address.startswith(_S3):
        from nextllm_jax.storage.s3 import client
    else:
        raise InputError(
            f"{address} is neither a local path nor gs://BUCKET/DIRECTORY nor s3://BUCKET/DIRECTORY; copy it to this "
            "machine and give its path"
        )
    bucket, _, directory = address[len(_GCS) :].partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise InputError(
            f"{address} names no bucket; give {address[: len(_GCS)]}BUCKET/DIRECTORY, where BUCKET has letters, "
            "digits, '-', '_' and '.'"
        )
    if {"", ".", ".."} & {*directory.rstrip("/").split("/")} and directory.rstrip("/"):
        raise InputError(f"{address} has an empty part, '.' or '..', which buckets do not resolve; give its plain form")
    client()
