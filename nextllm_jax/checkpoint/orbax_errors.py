"""What is raised and printed when a disk is full or a file unreadable, by orbax above all, in a few words."""

import contextlib
import functools
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


def cause(error: BaseException) -> str:
    """The innermost cause of an exception in a few words."""
    while error.__cause__ is not None:
        error = error.__cause__
    code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore buries it in a paragraph
    if code:
        return os.strerror(int(code.group(1)))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """A context in which a failure to write `path` (a full disk) becomes one sentence, as RunFailed."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"{path} cannot be written ({cause(error)}); make room or fix the directory, and run the same command again"
        ) from error


def _not_a_background_traceback(record: logging.LogRecord) -> bool:
    """False for what orbax's threads and tasks log of an exception, which itself comes out of a call."""
    error = record.exc_info[1] if record.exc_info else None
    if record.name == "asyncio":  # of a task or, without its name in the message, of a future
        return not ("orbax" in record.getMessage() or (error and _passed_orbax(error)))
    return not (error and "orbax" in record.pathname)


def _passed_orbax(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(f"{os.sep}orbax{os.sep}" in frame.f_code.co_filename for frame, _ in frames)


@functools.cache
def silence_tracebacks() -> None:
    """Keep quiet, in this process, about what follows a failure to read or write one array.

    Orbax gives up at the first and closes its event loop; each array still under way then ends in a traceback of its
    own from a thread of tensorstore, which asyncio's first frame gives away, or in a warning that nobody awaited it.
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
