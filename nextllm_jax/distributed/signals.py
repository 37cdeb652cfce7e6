"""A request to stop, by a signal to any process, that all processes of a run honour at the same place.

Ctrl-C, SIGTERM and SIGHUP (the terminal is gone) are requests, and so is a pipe on standard output or error whose
reader leaves (`train.py | head`). SIGHUP stays ignored where it was ignored at the start, as under nohup. SIGINT and
SIGTERM do not: a shell makes every background job of a script ignore SIGINT, and whoever sends one wants a stop.

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

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from nextllm_jax.distributed.process_group import Group
from nextllm_jax.errors import EXIT_INTERRUPTED
from nextllm_jax.standard_streams import unfailing_output, write_at_once

_IMPATIENT = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask for an immediate end if they come a second time."""
_STOP_SIGNALS = (*_IMPATIENT, signal.SIGHUP)

_ONE_REQUEST_SECONDS = 1.0
"""Signals within this time are one request: `timeout`, for one, sends its signal to a process and to its group."""


class StopRequest:
    """Context manager that turns the first signal, or a closed pipe, into a request to all processes of a group.

    With `may_exit`, as on the command line, the process ends at once for a signal after `allow_exit`, with exit
    code 75, and for a second SIGINT or SIGTERM, over a second after the first signal, with 128 + its number; after the
    block SIGTERM and SIGHUP stay ignored, since only the exit is left. Without, that second signal acts as if this were
    not here. Outside of the main thread no signal is taken.
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
        self._doing: str | None = None
        self._insisted = False
        self._previous: dict[signal.Signals, Any] = {}

    def reached(self) -> str | None:
        """The signal's name if this is the place to stop at (and after it), else None."""
        with self._changed:
            self._changed.wait_for(lambda: not self._agreeing)
            if self._stop_at is not None and self._passed >= self._stop_at:
                return self.name
            self._passed += 1
            return None

    def allow_exit(self, doing: str) -> None:
        """From now on a signal ends the process at once, because no work would be lost; the message says `doing`."""
        self._set_doing(doing)

    def defer_signals(self) -> None:
        """From now on a signal waits for `reached`."""
        self._set_doing(None)

    def _set_doing(self, doing: str | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._agreeing)
            self._doing = doing

    def _asked(self, process: int, name: str) -> None:
        """All processes, by the group's thread: say where this one is, and hold it there until all agree."""
        with self._changed:
            if self.name is not None:
                return
            self.name, self._agreeing = name, True
            state = [self._passed, self._may_exit and bool(self._doing)]
        self._group.send("gather for stop", state)

    def _agreed(self, process: int, states: list[tuple[int, bool]]) -> None:
        if all(may_exit for _, may_exit in states):
            if self._group.process_id == 0:
                write_at_once(f"\n{self.name} while {self._doing}: nothing is lost; run the same command again")
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
            if number not in (*_STOP_SIGNALS, signal.SIGPIPE):
                continue
            if first is None:
                first = time.monotonic()
                self._group.send("stop", signal.Signals(number).name)
            elif number in _IMPATIENT and not self._insisted and time.monotonic() - first > _ONE_REQUEST_SECONDS:
                self._insist(number)

    def _insist(self, number: int) -> None:
        """A second signal has come: end, or let the main thread have it."""
        if self._may_exit:
            name = signal.Signals(number).name
            write_at_once(f"\nerror: a second signal, {name}: ended without saving; the latest checkpoint stands")
            os._exit(128 + number)
        self._insisted = True
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Nothing, until `_listen` says so: here, after a long call into C++, signals come late and together."""
        if self._insisted:
            self._restore()
            signal.raise_signal(number)

    def _reader_left(self) -> None:
        write_at_once("\nthe reader of the output pipe has exited; saving and stopping; run the same command again")
        with contextlib.suppress(OSError):  # closed: it is too late to stop
            self._writer.send(bytes([signal.SIGPIPE]))

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __enter__(self) -> Self:
        self._numbers, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._listen, args=[self._numbers], daemon=True)
        self._thread.start()
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            numbers = _IMPATIENT if nohup else _STOP_SIGNALS
            self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        self._output = unfailing_output(self._reader_left)
        self._output.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._output.__exit__(None, None, None)
        if self._previous:
            self._restore()
            if self._may_exit:  # the command ends: a scheduler's signal in these seconds must not change its exit code
                for number in (signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
            signal.set_wakeup_fd(self._previous_wakeup)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._numbers.close()
