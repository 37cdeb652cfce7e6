"""Stops all processes of a run at the same step after a signal to any of them.

Ctrl-C, SIGTERM and SIGHUP (the terminal closed) request a stop. So does a pipe on standard output or error whose reader
exits (`train.py | head`). SIGHUP stays ignored if it was ignored at startup, as under nohup. SIGINT and SIGTERM do not,
since a shell lets the background jobs of a script ignore SIGINT, and whoever sends one wants a stop.

The training loop calls `StopRequest.reached` at sync points that all processes pass in the same order: before each step
and before each batch of an evaluation. A thread receives a signal at once, even while the main thread is in C++, and
notifies the group. The threads then agree on a sync point. Each reports how many its main thread has passed, and blocks
it at the next one for this round trip. All stop at the first sync point that no process has passed. So a step never
waits for other processes, no matter how far one is ahead. (jax's preemption sync point works the same way, but only for
SIGTERM, whose handler it replaces.)

When no work would be lost (while waiting for processes, preparing data, restoring, compiling and running the first
step), the threads exit all processes at once, since a compilation can take minutes in which Python runs no handler.
During the compilation of the first evaluation, a signal takes effect when the compilation ends.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from nextllm_jax.distributed.process_group import ProcessGroup
from nextllm_jax.errors import EXIT_INTERRUPTED
from nextllm_jax.standard_streams import unfailing_output, write_at_once

_IMPATIENT = (signal.SIGINT, signal.SIGTERM)
"""Signals that force an immediate exit when they come a second time."""
_STOP_SIGNALS = (*_IMPATIENT, signal.SIGHUP)

_ONE_REQUEST_SECONDS = 1.0
"""Signals within this time count as one: `timeout`, for example, signals both a process and its process group."""


class StopRequest:
    """Context manager that turns the first signal, or a closed pipe, into a stop request to all processes of a group.

    With `may_exit`, as on the command line,
    - a signal after `allow_exit` ends the process at once, with exit code 75;
    - a second SIGINT or SIGTERM, more than a second after the first signal, ends it with 128 + the signal's number;
    - SIGTERM and SIGHUP stay ignored after the context ends, since the process is about to exit.

    Without `may_exit`, the second signal has the effect that it would have without this context. Outside the main
    thread, signals are not handled.
    """

    def __init__(self, group: ProcessGroup | None = None, *, may_exit: bool = False) -> None:
        self.name: str | None = None
        """Name of the signal that this or another process received; None without one."""
        self.asked_at = 0.0
        """`time.monotonic()` when this process learned of the signal."""
        self._group = group or ProcessGroup()
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
        """A sync point: the signal's name if the run must stop here, also in later calls; else None."""
        with self._changed:
            self._changed.wait_for(lambda: not self._agreeing)
            if self._stop_at is not None and self._passed >= self._stop_at:
                return self.name
            self._passed += 1
            return None

    def allow_exit(self, doing: str) -> None:
        """From now on a signal ends the process at once, since no work would be lost. The message contains `doing`."""
        self._set_doing(doing)

    def defer_signals(self) -> None:
        """From now on a signal takes effect at the next sync point, see `reached`."""
        self._set_doing(None)

    def _set_doing(self, doing: str | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._agreeing)
            self._doing = doing

    def _asked(self, process: int, name: str) -> None:
        """In each process, in the group's thread: report its position, and block it until all processes agree."""
        with self._changed:
            if self.name is not None:
                return
            self.name, self.asked_at, self._agreeing = name, time.monotonic(), True
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
        """Read signals, one byte each, from the wakeup socket, whatever the main thread is doing."""
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
        """Handle a second signal: exit, or deliver it to the main thread."""
        if self._may_exit:
            name = signal.Signals(number).name
            write_at_once(f"\nerror: second signal {name}: exiting without saving; the latest checkpoint is kept")
            os._exit(128 + number)
        self._insisted = True
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Does nothing before `_insist`. Python runs it late, after long calls into C++, so `_listen` does the work."""
        if self._insisted:
            self._restore()
            signal.raise_signal(number)

    def _reader_left(self) -> None:
        write_at_once("\nthe reader of the output pipe has exited; saving and stopping; run the same command again")
        with contextlib.suppress(OSError):  # the socket is closed, so it is too late to stop
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
            if self._may_exit:  # a scheduler's signal during the exit must not change the exit code
                for number in (signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
            signal.set_wakeup_fd(self._previous_wakeup)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._numbers.close()
