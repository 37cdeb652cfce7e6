"""The files in a directory of an S3 bucket, or of another service with its API (AWS_ENDPOINT_URL).

boto3 finds credentials, region and endpoint as it does for other tools, and retries requests that fail.
"""

import contextlib
import functools
import hashlib
import time
from pathlib import Path
from typing import Any

from nextllm_jax.errors import missing_package
from nextllm_jax.storage.interface import CONNECTIONS, Identity, StorageError, StorageUnavailable

SCHEME = "s3://"
_ATTEMPTS = 10
"""Of a request; the pauses between them add up to about one minute."""
_SINGLE_PUT_BYTES = 2**30
"""Larger files are uploaded in parts. Only a file that is not has a checksum that `matches` can compare."""


@functools.cache
def client() -> Any:
    """The client of this process. Raises InputError if the extra is not installed."""
    try:
        import boto3
        from botocore.config import Config
    except ModuleNotFoundError as error:
        raise missing_package("s3:// paths need", error, "nextllm_jax[s3]") from error
    retries: Any = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
    settings = Config(retries=retries, connect_timeout=5, read_timeout=30, max_pool_connections=CONNECTIONS)
    try:
        with _translating(SCHEME):
            return boto3.Session().client("s3", config=settings)  # not the default one, which keeps its credentials
    except ValueError as error:
        raise StorageError(f"{error}; AWS_ENDPOINT_URL must begin with http:// or https://") from error


class S3:
    """The objects below s3://bucket/directory; see `BucketFiles`. The constructor sends no request."""

    def __init__(self, address: str) -> None:
        self._bucket, _, directory = address.removeprefix(SCHEME).partition("/")
        self._prefix = f"{directory.strip('/')}/" if directory.strip("/") else ""

    def _call(self, method: str, **options: Any) -> Any:
        """The answer to a request. Raises FileNotFoundError for a missing object, and StorageError for other errors."""
        with _translating(f"{SCHEME}{self._bucket}"):
            return getattr(client(), method)(Bucket=self._bucket, **options)

    def _list(self, prefix: str) -> dict[str, Identity]:
        """The objects whose names start with a prefix."""
        found: dict[str, Identity] = {}
        options: dict[str, Any] = {"Prefix": prefix}
        while True:
            page = self._call("list_objects_v2", **options)
            found |= {each["Key"]: _identity(each["Size"], each["ETag"]) for each in page.get("Contents", [])}
            if not page["IsTruncated"]:
                return found
            options["ContinuationToken"] = page["NextContinuationToken"]

    def _below(self, directory: str) -> str:
        key = self._prefix + directory.strip("/")
        return f"{key}/" if key and not key.endswith("/") else key

    def names(self, directory: str = "") -> list[str]:
        """The names in a directory; empty if it is missing."""
        return sorted({name.partition("/")[0] for name in self.files(directory)})

    def files(self, directory: str = "") -> dict[str, Identity]:
        """Every object in a directory and below, sorted by its path relative to the directory."""
        prefix = self._below(directory)
        return {key.removeprefix(prefix): found for key, found in self._list(prefix).items() if not key.endswith("/")}

    def exists(self, name: str) -> bool:
        """Whether there is a file or a directory."""
        return self.identity(name) is not None or self.is_directory(name)

    def is_directory(self, name: str) -> bool:
        """Whether there is an object below this name."""
        return bool(self._call("list_objects_v2", Prefix=self._below(name), MaxKeys=1).get("Contents"))

    def identity(self, name: str) -> Identity | None:
        """The identity of a file; None if it is missing."""
        try:
            found = self._call("head_object", Key=self._prefix + name)
        except FileNotFoundError:
            return None
        return _identity(found["ContentLength"], found["ETag"])

    def read(self, name: str) -> bytes:
        """The content of a file; empty if it is missing."""
        try:
            return self.read_all(name)
        except FileNotFoundError:
            return b""

    def read_all(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError if it is missing."""
        return self._get(name)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """At most `length` bytes of a file from `start` on. Raises FileNotFoundError if it is missing."""
        return self._get(name, Range=f"bytes={start}-{start + length - 1}")

    def _get(self, name: str, **options: Any) -> bytes:
        from botocore.exceptions import BotoCoreError, ClientError

        for attempt in range(_ATTEMPTS):
            try:
                answer = self._call("get_object", Key=self._prefix + name, **options)
            except StorageError as error:
                if isinstance(error.__cause__, ClientError) and _code(error.__cause__) == "InvalidRange":
                    return b""  # at the end of the file
                raise
            try:
                return answer["Body"].read()
            except BotoCoreError as error:  # the download broke off, or its checksum is wrong
                if attempt == _ATTEMPTS - 1:
                    raise _translated(error, f"{SCHEME}{self._bucket}") from error
                time.sleep(min(0.2 * 2**attempt, 10))
        raise AssertionError

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file."""
        self._call("put_object", Key=self._prefix + name, Body=content)

    def create(self, name: str, content: bytes) -> Identity | None:
        """Write a file that does not exist yet; None, and nothing is written, if it does."""
        from botocore.exceptions import ClientError

        try:
            answer = self._call("put_object", Key=self._prefix + name, Body=content, IfNoneMatch="*")
        except StorageError as error:
            if not isinstance(error.__cause__, ClientError) or _code(error.__cause__) != "PreconditionFailed":
                raise
            # The first attempt may have succeeded although its answer was lost. Equal content is as good as ours.
            return self.identity(name) if self.read(name) == content else None
        return _identity(len(content), answer["ETag"])

    def delete(self, name: str) -> None:
        """Delete a file, or a directory with all files below it. Nothing happens if it is missing."""
        key = self._prefix + name.strip("/")
        for found in self._list(key):
            if found == key or found.startswith(self._below(name)):
                self._call("delete_object", Key=found)

    def upload(self, name: str, path: Path) -> Identity | None:
        """Write or replace a file with the content of a local file. Returns its identity, see `BucketFiles`."""
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=_SINGLE_PUT_BYTES, multipart_chunksize=2**26)
        with open(path, "rb") as file:
            self._call("upload_fileobj", Key=self._prefix + name, Fileobj=file, Config=config)
        return self.identity(name)

    def download(self, name: str, path: Path) -> None:
        """Write the content of a file to a local file. Raises FileNotFoundError if it is missing."""
        with open(path, "wb") as file:
            self._call("download_fileobj", Key=self._prefix + name, Fileobj=file)

    def matches(self, found: Identity, path: Path) -> bool:
        """Whether a file of this identity has the content of a local file, by the service's checksum."""
        if found.size != path.stat().st_size:
            return False
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False))
        return found == _identity(found.size, digest.hexdigest())


def _identity(size: int, etag: str) -> Identity:
    """The entity tag is the MD5 of the content, unless the object was uploaded in parts or is encrypted with a key."""
    return Identity(size, int.from_bytes(etag.strip('"').encode()))


@contextlib.contextmanager
def _translating(address: str) -> Any:
    from botocore.exceptions import BotoCoreError, ClientError
    from s3transfer.exceptions import RetriesExceededError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise _translated(error, address) from error
    except RetriesExceededError as error:  # of a download
        raise _translated(error.last_exception, address) from error


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


_REFUSED_CREDENTIALS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401")


def _translated(error: Exception, address: str) -> OSError:
    """The error with a one-line message."""
    from botocore import exceptions

    text = str(error).partition("\n")[0][:160]
    if isinstance(error, exceptions.ClientError):
        code = _code(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            return StorageError(f"bucket {address} does not exist; check its name, or create it")
        if status == 404:
            return FileNotFoundError(2, f"{address} has no such object")
        if code in _REFUSED_CREDENTIALS:
            return _no_credentials(code)
        if status == 403:
            return StorageError(
                f"no permission for {address} ({code}); allow s3:ListBucket, s3:GetObject, s3:PutObject"
            )
        if status == 429 or status >= 500:
            return StorageUnavailable(f"{address} failed again and again (HTTP {status}, {code}); try again later")
        return StorageError(f"a request for {address} failed (HTTP {status}, {code})")
    if isinstance(error, exceptions.EndpointConnectionError | exceptions.HTTPClientError):
        return StorageUnavailable(f"{address} could not be reached ({text}); check the network and AWS_ENDPOINT_URL")
    if "redential" in type(error).__name__ or "Token" in type(error).__name__ or "Profile" in type(error).__name__:
        return _no_credentials(text)
    return StorageError(f"a request for {address} failed ({text})")


def _no_credentials(reason: str) -> StorageError:
    return StorageError(f"there are no valid AWS credentials ({reason}); run aws configure, or give the machine a role")
