"""A request to stop, from Ctrl-C or SIGTERM to any process, that all processes of a run honour at the same place.

The training loop calls `StopRequest.reached` at places that all processes pass in the same order: before each step,
and before each batch of an evaluation. A thread learns of a signal at once, even while the main thread is in C++,
and tells the group. Then the threads agree: each says how many places its main thread has passed, and holds it at
the next one meanwhile, which takes a round trip; all stop at the first place that none has passed. So a step costs
the host no waiting for others, however far one runs ahead of another. (jax's own preemption sync point does
the same for SIGTERM alone, and takes its handler away.)

Where nothing would be lost (waiting for processes, preparing data, restoring, compiling and taking the first step)
the threads end all processes at once, since a compilation can take minutes in which Python runs no handler. A signal
during another compilation (of the first evaluation) is honoured when that ends.
"""

import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from nextllm_jax.distributed import Group
from nextllm_jax.errors import EXIT_INTERRUPTED

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_ONE_REQUEST_SECONDS = 1.0
"""Signals within this time are one request: `timeout`, for one, sends its signal to a process and to its group."""


class StopRequest:
    """Context manager that turns the first SIGINT or SIGTERM into a request to all processes of a group.

    With `may_exit`, as on the command line, the process ends at once for a signal after `nothing_to_lose`, with exit
    code 75, and for a second signal, over a second after the first, with 128 + its number. Without, a second signal
    acts as if this were not here.
    """

    def __init__(self, group: Group | None = None, *, may_exit: bool = False) -> None:
        self.name: str | None = None
        """Name of the signal that came, to this or another process; None: none."""
        self._group = group or Group()
        self._group.on("stop", self._asked)
        self._group.on("gather for stop", self._agreed)
        self._may_exit = may_exit
        self._changed = threading.Condition()
        self._passed = 0
        self._agreeing = False
        self._stop_at: int | None = None
        self._losing_nothing: str | None = None
        self._handled: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def reached(self) -> str | None:
        """The signal's name if this is the place to stop at (and after it), else None."""
        with self._changed:
            self._changed.wait_for(lambda: not self._agreeing)
            if self._stop_at is not None and self._passed >= self._stop_at:
                return self.name
            self._passed += 1
            return None

    def nothing_to_lose(self, doing: str) -> None:
        """From here on the process may end at any moment without a loss; `doing` says in the message what it does."""
        self._set_doing(doing)

    def something_to_lose(self) -> None:
        """From here on a signal waits for `reached`."""
        self._set_doing(None)

    def _set_doing(self, doing: str | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._agreeing)
            self._losing_nothing = doing

    def _asked(self, process: int, name: str) -> None:
        """All processes, by the group's thread: say where this one is, and hold it there until all agree."""
        with self._changed:
            if self.name is not None:
                return
            self.name, self._agreeing = name, True
            state = [self._passed, self._may_exit and bool(self._losing_nothing)]
        self._group.send("gather for stop", state)

    def _agreed(self, process: int, states: list[tuple[int, bool]]) -> None:
        if all(may_exit for _, may_exit in states):
            if self._group.process_id == 0:
                _print_at_once(f"{self.name} while {self._losing_nothing}: nothing is lost; run the same command again")
            self._group.linger()
            os._exit(EXIT_INTERRUPTED)
        with self._changed:
            self._stop_at = max(passed for passed, _ in states)
            self._agreeing = False
            self._changed.notify_all()

    def _listen(self, numbers: socket.socket) -> None:
        """Take signals as the system's handler writes them, one byte each, whatever the main thread is doing."""
        first = None
        while received := numbers.recv(1):
            number = received[0]
            if number not in STOP_SIGNALS:
                continue
            name = signal.Signals(number).name
            if first is None:
                first = time.monotonic()
                self._group.send("stop", name)
            elif self._may_exit and time.monotonic() - first > _ONE_REQUEST_SECONDS:
                _print_at_once(f"error: a second signal, {name}: ended without saving; the latest checkpoint stands")
                os._exit(128 + number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._handled is None:
            self._handled = now
        elif not self._may_exit and now - self._handled > _ONE_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        self._numbers, writer = socket.socketpair()
        writer.setblocking(False)
        self._writer = writer
        self._previous_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=[self._numbers], daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        signal.set_wakeup_fd(self._previous_wakeup)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._numbers.close()


def _print_at_once(text: str) -> None:
    """Write to standard error past Python's buffers, whose locks the main thread may hold."""
    os.write(2, f"\n{text}\n".encode())
