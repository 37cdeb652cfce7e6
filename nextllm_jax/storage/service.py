"""Requests to Google Cloud Storage: the client, retries with a time limit, and errors in one line.

With STORAGE_EMULATOR_HOST set, requests go to that address and no credentials are looked for.
"""

import functools
import http.client
import os
from collections.abc import Callable
from typing import Any, TypeVar

from nextllm_jax.errors import missing_package
from nextllm_jax.storage import costs
from nextllm_jax.storage.interface import CONNECTIONS, StorageError, StorageUnavailable

FIRST_LIMIT_SECONDS = 15.0
"""Time limit of a request until the first one succeeds: a wrong address or missing network is reported soon."""
LIMIT_SECONDS = 120.0
"""Time limit of every later request, with all its retries: the service may fail for a while during a training."""
_REQUEST_SECONDS = (5.0, 30.0)  # to connect, and between two parts of a response

Result = TypeVar("Result")


@functools.cache
def client() -> Any:
    """The client of this process. Raises InputError if the extra is not installed, StorageError without credentials."""
    try:
        from google.auth.credentials import AnonymousCredentials
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
    except ModuleNotFoundError as error:
        raise missing_package("gs:// paths need", error, "nextllm_jax[gcs]") from error
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        # Tensorstore, which reads and writes the arrays of checkpoints, has variables of its own.
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        created = storage.Client(project="none", credentials=AnonymousCredentials())
    else:
        try:
            created = storage.Client(project="none")  # needed only to create and list buckets
        except GoogleAuthError as error:
            raise _no_credentials(error) from error
    _set_up_session(created._http)  # which other methods share
    return created


def _set_up_session(session: Any) -> None:
    """Count the requests of a requests.Session, and let it keep CONNECTIONS connections open instead of 10."""
    from requests.adapters import HTTPAdapter

    session.hooks["response"].append(costs.count)
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(pool_connections=CONNECTIONS, pool_maxsize=CONNECTIONS))


class Service:
    """Requests for the objects of one bucket."""

    def __init__(self, bucket: str) -> None:
        self.address = f"gs://{bucket}"
        self._found = False
        """Whether the bucket has answered a request."""

    def call(self, request: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """The result of a method of the client. It is retried while the service is busy, fails or cannot be reached.

        Raises FileNotFoundError for a missing object, StorageError for everything else that goes wrong, and the
        client's PreconditionFailed.
        """
        from google.api_core.exceptions import NotFound, PreconditionFailed
        from google.api_core.retry import Retry

        limit = LIMIT_SECONDS if self._found else FIRST_LIMIT_SECONDS
        retry = Retry(predicate=_is_transient, initial=0.2, multiplier=2, maximum=10, timeout=limit)
        try:
            result = retry(request)(*arguments, retry=None, timeout=_REQUEST_SECONDS, **options)
        except PreconditionFailed:
            raise
        except NotFound as error:
            self._require_bucket()
            raise FileNotFoundError(2, f"{self.address} has no such object") from error
        except Exception as error:
            raise self._translated(error, limit) from error
        self._found = True
        return result

    def _require_bucket(self) -> None:
        """Raise StorageError if the bucket is missing, which the service reports as it reports a missing object."""
        if self._found:
            return
        from google.api_core.exceptions import NotFound

        try:
            list(client().list_blobs(self.address[5:], max_results=1, timeout=_REQUEST_SECONDS))
        except NotFound as error:
            raise self.missing() from error
        except Exception as error:
            raise self._translated(error, _REQUEST_SECONDS[1]) from error
        self._found = True

    def missing(self) -> StorageError:
        """The error for a bucket that does not exist."""
        return StorageError(
            f"bucket {self.address} does not exist; check its name, or create it with "
            f"gcloud storage buckets create {self.address}"
        )

    def _translated(self, error: Exception, limit: float) -> StorageError:
        """The error with a one-line message."""
        from google.api_core import exceptions
        from google.auth.exceptions import GoogleAuthError, TransportError

        error = _cause(error)
        if isinstance(error, exceptions.Forbidden):
            return StorageError(
                f"no permission for {self.address} ({_message(error)}); grant roles/storage.objectAdmin on the bucket"
            )
        if isinstance(error, exceptions.Unauthorized) or (
            isinstance(error, GoogleAuthError) and not isinstance(error, TransportError)
        ):
            return _no_credentials(error)
        where = os.environ.get("STORAGE_EMULATOR_HOST", "storage.googleapis.com")
        if not _is_transient(error):
            return StorageError(f"a request for {self.address} failed ({type(error).__name__}: {_message(error)})")
        if isinstance(error, exceptions.GoogleAPICallError):
            return StorageUnavailable(f"{self.address} failed for {limit:.0f} s ({_message(error)}); try again later")
        return StorageUnavailable(
            f"{self.address} could not be reached for {limit:.0f} s ({type(error).__name__} at {where}); check the "
            "network"
        )


def _no_credentials(error: Exception) -> StorageError:
    return StorageError(
        f"there are no valid Google Cloud credentials ({_message(error)}); run gcloud auth application-default login, "
        "or give the machine a service account"
    )


def _cause(error: Exception) -> Exception:
    """The last failure, if `error` says that retrying has taken too long."""
    from google.api_core.exceptions import RetryError

    return error.cause if isinstance(error, RetryError) and isinstance(error.cause, Exception) else error


def _message(error: Exception) -> str:
    code = getattr(error, "code", None)
    text = str(getattr(error, "message", error)).strip().partition("\n")[0][:120]
    return f"HTTP {int(code)}" if isinstance(code, int) else text


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    from google.api_core import exceptions
    from google.auth.exceptions import TransportError
    from google.cloud.storage.exceptions import DataCorruption
    from requests import exceptions as requests_exceptions
    from urllib3.exceptions import HTTPError

    return isinstance(
        error,
        (
            exceptions.TooManyRequests,
            exceptions.ServerError,
            DataCorruption,  # the checksum of what came differs from the service's
            requests_exceptions.ConnectionError,
            requests_exceptions.ChunkedEncodingError,
            requests_exceptions.ContentDecodingError,
            requests_exceptions.Timeout,
            TransportError,
            HTTPError,  # of urllib3, when a download breaks off
            ConnectionError,
            http.client.HTTPException,
        ),
    ) or (isinstance(error, exceptions.GoogleAPICallError) and error.code == 408)
