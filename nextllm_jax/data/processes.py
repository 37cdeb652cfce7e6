"""Maps a function over parts in spawned processes, in order, with few parts in memory at a time."""

import collections
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nextllm_jax.errors import InputError

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


def map_in_processes(work: Callable[[_Part], _Result], parts: Iterable[_Part], num_processes: int) -> Iterator[_Result]:
    """The result of `work` for each part, in order. Raises InputError if a process is killed."""
    if num_processes == 1:
        yield from map(work, parts)
        return
    context = multiprocessing.get_context("spawn")
    waiting: collections.deque[Future[_Result]] = collections.deque()
    with ProcessPoolExecutor(num_processes, context, initializer=_start_worker) as executor:
        try:
            for part in parts:
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
