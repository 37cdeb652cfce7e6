"""Maps a function over parts in spawned processes, in order, with few parts in memory at a time."""

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nextllm_jax.errors import InputError

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


def map_in_processes(work: Callable[[_Part], _Result], parts: Iterable[_Part], num_processes: int) -> Iterator[_Result]:
    """The result of `work`, a function of a module, for each part, in order. Raises InputError if a process is killed.

    The processes do not import the caller's script, so it needs no `if __name__ == "__main__"`.
    """
    if num_processes == 1:
        yield from map(work, parts)
        return
    context = multiprocessing.get_context("spawn")
    waiting: collections.deque[Future[_Result]] = collections.deque()
    with ProcessPoolExecutor(num_processes, context, initializer=_start_worker) as executor:
        try:
            for part in parts:
                with _without_main_module():  # submitting may start a process
                    waiting.append(executor.submit(work, part))
                if len(waiting) > 2 * num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise InputError(
                "a tokenizing process was killed, possibly out of memory; run again with a smaller "
                "data.num_processes (finished parts are kept)"
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """A context in which multiprocessing does not find the file that new processes would import as their main module.

    A script that trains without a guard would train again in each of them, and wait for the data that they prepare.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker() -> None:
    """Leave Ctrl-C and SIGHUP to the parent, and exit when it exits: otherwise a worker would wait forever."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
