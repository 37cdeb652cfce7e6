"""Handles standard streams that are closed, that lose their reader, or that write to a full disk."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


def open_missing() -> None:
    """Open /dev/null for each standard stream that is closed, as in some daemons.

    Must be called first. Otherwise the next file that is opened would get the descriptor of the missing stream, and
    would receive what C++, child processes and `write_at_once` write to standard error.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  stays open


def write_at_once(text: str) -> None:
    """Write a line to standard error, if possible. Bypasses Python's buffers, whose locks a thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def drop_unwritten() -> None:
    """Flush the output, and drop what cannot be written, since a failing flush at exit would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _discard(stream.fileno())


def _discard(number: int) -> None:
    """Redirect a file descriptor to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


class _UnfailingFile(io.FileIO):
    """A file descriptor whose writes never fail; output that cannot be written is dropped.

    The first write to a pipe without a reader calls `reader_left`.
    """

    def __init__(self, number: int, reader_left: Callable[[], None]) -> None:
        super().__init__(number, "w", closefd=False)
        self._reader_left = reader_left

    def write(self, data: Any, /) -> int:
        written = None
        try:
            written = super().write(data)
        except BrokenPipeError:
            _discard(self.fileno())
            self._reader_left()
        except OSError:  # a full disk, or a closed terminal
            pass
        return len(data) if written is None else written


@contextlib.contextmanager
def unfailing_output(reader_left: Callable[[], None]) -> Iterator[None]:
    """A context in which writing to sys.stdout and sys.stderr never raises OSError.

    When the reader of a pipe has exited, the thread that prints calls `reader_left`. Output that cannot be written for
    another reason is dropped, and later output is tried again. Streams that are not the process's own (in a notebook)
    are not replaced.
    """
    replaced = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        own = stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper) and not stream.closed
        if own:
            unfailing = io.TextIOWrapper(
                io.BufferedWriter(_UnfailingFile(stream.fileno(), reader_left)),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering or stream.write_through,
            )
            with contextlib.suppress(OSError):
                stream.flush()
            replaced[name] = stream, unfailing
            setattr(sys, name, unfailing)
    try:
        yield
    finally:
        for name, (stream, unfailing) in replaced.items():
            unfailing.flush()
            setattr(sys, name, stream)
