"""Messages and progress bars for people, on standard error. Results of commands go to standard output instead.

A module writes a message with `logging.getLogger(__name__).info(...)` or `.warning(...)`. tqdm is imported when it is
needed, so `--help` appears at once.
"""

import contextlib
import io
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_LOG_SECONDS = 30.0
"""Time between the lines of a progress bar where standard error is not a terminal."""

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, ETA {remaining}, {rate_noinv_fmt}{postfix}]"


_PHASE_SECONDS = 2.0
"""Duration from which a phase is reported."""

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A context that reports itself if it takes longer than two seconds: what it does, and finally how long it took."""
    timer = threading.Timer(_PHASE_SECONDS, _log.info, [f"{name} ..."])
    timer.daemon = True
    started = time.monotonic()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.monotonic() - started) > _PHASE_SECONDS:
        _log.info(f"{name} took {seconds:.1f} s")


def show_messages() -> None:
    """Write the messages of this package to standard error, unless the caller has configured logging.

    If the logger `nextllm_jax` and the root logger have no handler, this installs one that writes above progress bars.
    The level becomes INFO if none is set. A program silences the messages with
    `logging.getLogger("nextllm_jax").setLevel(logging.ERROR)`, and routes them with a handler of its own.
    """
    logger = logging.getLogger("nextllm_jax")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers and all(map(_is_default, logging.root.handlers)):
        logger.addHandler(_Handler())
        logger.propagate = False  # else a default handler would write each message a second time


def _is_default(handler: logging.Handler) -> bool:
    """Whether `logging.basicConfig()` installed the handler, which importing orbax does."""
    form = handler.formatter and handler.formatter._fmt
    return type(handler) is logging.StreamHandler and form == logging.BASIC_FORMAT


class _Handler(logging.Handler):
    """Writes messages above the progress bar, and the level in front of those that are more than information."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        level = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        with contextlib.suppress(OSError):  # a message that cannot be written must not end the work
            tqdm.write(f"{level}{self.format(record)}", file=sys.stderr)


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    total: float | None = None,
    initial: int = 0,
    unit: str = "it",
    unit_scale: bool = False,
    disable: bool = False,
) -> "tqdm":
    """A tqdm bar on standard error with an ETA, which disappears at the end.

    Where standard error is not a terminal, it writes a line every 30 seconds, and none for shorter work. The arguments
    are those of tqdm. With `initial`, the speed and the ETA count only what follows.
    """
    from tqdm import tqdm

    is_terminal = sys.stderr.isatty()
    if total is None and iterable is not None:
        total = len(iterable) if hasattr(iterable, "__len__") else None  # pyright: ignore[reportArgumentType]
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=unit_scale,
        disable=disable or total == 0,
        file=sys.stderr if is_terminal else _Lines(),
        leave=not is_terminal,
        dynamic_ncols=is_terminal,
        mininterval=0.2 if is_terminal else _LOG_SECONDS,
        miniters=0,
        delay=0 if is_terminal else _LOG_SECONDS,
        bar_format=None if total is None else _BAR,
    )


class _Lines(io.TextIOBase):
    """Writes each redraw of a bar as a line to standard error, unless it repeats the progress of the line before."""

    _last = ""

    def write(self, text: str, /) -> int:
        line = text.strip()
        progress = line.partition("[")[0]
        if progress and progress != self._last:
            self._last = progress
            with contextlib.suppress(OSError):
                sys.stderr.write(f"{line}\n")
        return len(text)
