"""Short error messages for a full disk or an unreadable file, mostly from orbax, and fewer tracebacks from it."""

import contextlib
import functools
import http
import logging
import os
import re
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from typing import Any

from etils import epath

from nextllm_jax.errors import RunFailed
from nextllm_jax.storage.interface import StorageError


def cause(error: BaseException) -> str:
    """A short message about the innermost cause of an exception that has one for people."""
    while error.__cause__ is not None and not isinstance(error, StorageError):
        error = error.__cause__
    if isinstance(error, StorageError):
        return str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore includes it in a long message
    if code:
        return os.strerror(int(code.group(1)))
    refused = re.search(r"([A-Z]+(?:_[A-Z]+)*): Error (\w+) .*gs://", str(error))  # tensorstore, too
    if refused:
        return f"the bucket answered {refused[1].lower().replace('_', ' ')} while {refused[2]}"
    answered = re.match(r"(\d{3}) [A-Z]+ https?://", str(error))  # google-cloud-storage
    if answered:
        return f"the bucket answered {http.HTTPStatus(int(answered[1])).phrase.lower()}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """A context in which a failure to write `path`, such as a full disk, becomes a RunFailed with a short message."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"{path} cannot be written ({cause(error)}); make room or fix the directory, and run the same command again"
        ) from error


def _not_a_background_traceback(record: logging.LogRecord) -> bool:
    """False for an exception that a thread or task of orbax logs, since it is also raised to the caller."""
    error = record.exc_info[1] if record.exc_info else None
    if record.name == "asyncio":  # a task, or a future that may only name tensorstore, or neither
        named = any(package in record.getMessage() for package in ("orbax", "tensorstore"))
        return not (named or (error and _passed_orbax(error)))
    return not (error and "orbax" in record.pathname)


def _passed_orbax(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(f"{os.sep}orbax{os.sep}" in frame.f_code.co_filename for frame, _ in frames)


@functools.cache
def silence_tracebacks() -> None:
    """Suppress, in this process, the tracebacks and warnings that follow a failure to read or write one array.

    Orbax stops at the first failure and closes its event loop. Each array that is still in progress then causes a
    traceback in a tensorstore thread, recognized by asyncio's first frame, or a warning that it was never awaited.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_a_background_traceback)
    print_uncaught, print_unraisable = sys.excepthook, sys.unraisablehook

    def follows(trace: types.TracebackType | None) -> bool:
        return trace is not None and trace.tb_frame.f_code.co_name == "call_soon_threadsafe"

    def uncaught(kind: Any, error: BaseException, trace: types.TracebackType | None) -> None:
        if not follows(trace):
            print_uncaught(kind, error, trace)

    def unraisable(what: Any) -> None:
        if not follows(what.exc_traceback):
            print_unraisable(what)

    sys.excepthook, sys.unraisablehook = uncaught, unraisable
