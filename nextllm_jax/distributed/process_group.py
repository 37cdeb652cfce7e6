"""The processes that train together: how they meet, and the line between them beside jax's own.

jax's start ends in C++ (SIGABRT) where a process is missing, its collectives wait for one that died, and its
barriers have time limits. So the processes meet here first: process 0 listens at the coordinator's port, the others
connect, and the connections stay for the whole run (jax then listens at the same port). Over them goes, as lines of
JSON through process 0, what must not wait for devices: who is missing, whether all run the same config and code,
that the data is prepared, a request to stop, the sentence of a failure. A connection that closes in the middle of a
run is a process that died, and ends the others. Importing this module does not import jax.
"""

import atexit
import hashlib
import importlib.metadata
import os
import platform
import selectors
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from nextllm_jax.config import Config
from nextllm_jax.config.fields import fields_of
from nextllm_jax.distributed.rendezvous import DistributedConfig, Line, Meeting, Place, find_place, report
from nextllm_jax.errors import EXIT_BAD_INPUT, EXIT_FAILED, InputError, RunFailed
from nextllm_jax.standard_streams import write_at_once

LAST_SECONDS = 10
"""Time that a process has to end by itself once another one has failed."""
_LINGER_SECONDS = 0.3
_PATIENCE_SECONDS, _REMINDER_SECONDS = 3, 60
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tiktoken")


Handler = Callable[[int, Any], None]
"""(process that sent, value); called by the thread that reads the connections."""


class Group:
    """The processes that train together, seen from one of them; alone until `meet`.

    Leaving it with an exception ends the others with the same sentence and exit code: at once where they wait in
    `gather`, after LAST_SECONDS where they are stuck on devices.
    """

    def __init__(self, config: DistributedConfig | None = None) -> None:
        self._config = config or DistributedConfig(num_processes=1)
        self._place = Place("", 1, 0)
        self._changed = threading.Condition(threading.RLock())
        self._lines: dict[int, Line] = {}  # of process 0: to all others; of others: to process 0
        self._closed: set[int] = set()  # the processes at the other ends of lines that have closed
        self._jax_started = False
        self._ended = False
        self._failure: Exception | None = None
        self._reported: BaseException | None = None
        self._rounds = 0
        self._gathering: dict[str, dict[int, Any]] = {}
        self._handlers: dict[str, Handler] = {"failed": self._other_failed, "lost": lambda _, lost: self._lost(lost)}

    @property
    def process_id(self) -> int:
        """Number of this process, from 0."""
        return self._place.process_id

    @property
    def num_processes(self) -> int:
        """How many there are."""
        return self._place.num_processes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.report(kind, error, traceback)
        if self._failure is None:  # else the end of the process closes them, which process 0 waits for
            for line in self._lines.values():
                line.close()

    def meet(self) -> None:
        """Wait until all processes that the flags or the cluster say have come; nothing if it is this one alone.

        Raises InputError for bad flags, and RunFailed if a process does not come in time.
        """
        place = find_place(self._config)
        if place is None:
            return
        meeting, lines = Meeting(place, self._config), {}
        try:
            lines = meeting.lines_to_others() if place.process_id == 0 else {0: meeting.line_to_process_0()}
        finally:
            meeting.close(keep=lines.values())
        with self._changed:
            self._place, self._lines = place, lines
        threading.Thread(target=self._read_lines, daemon=True).start()

    def on(self, kind: str, handler: Handler) -> None:
        """Call `handler` for each message of a kind that `send` sends."""
        self._handlers[kind] = handler

    def send(self, kind: str, value: Any) -> None:
        """Give all processes a message, this one too.

        Where the kind begins with "gather", process 0 waits for everyone's and gives all of them the list instead.
        """
        message = {"kind": kind, "process": self.process_id, "value": value}
        with self._changed:
            if self.process_id == 0:
                self._relay(message)
            else:
                self._lines[0].send(message)

    def gather(self, value: Any, waiting_for: str = "the others", *, last: bool = False) -> list[Any]:
        """The values of all processes, by process id. All must call it; it waits as long as they are alive.

        After the `last` one a connection that closes means nothing. Raises what another process failed with.
        """
        self._rounds += 1
        results: list[list[Any]] = []

        def arrived(_: int, values: list[Any]) -> None:
            with self._changed:
                results.append(values)
                self._ended = last
                self._changed.notify_all()

        self.on(kind := f"gather {self._rounds}", arrived)
        self.send(kind, value)
        with self._changed:
            patience = _PATIENCE_SECONDS
            while not self._changed.wait_for(lambda: results or self._failure, timeout=patience):
                report(f"process {self.process_id} waits for {waiting_for}")
                patience = _REMINDER_SECONDS
        del self._handlers[kind]
        if not results:
            assert self._failure is not None
            raise self._failure
        return results[0]

    def check_same(self, facts: dict[str, str]) -> None:
        """Raise InputError, in all processes, if a process has other facts than process 0."""
        if self.num_processes == 1:
            return
        ours: dict[str, str] = self.gather(facts if self.process_id == 0 else None)[0]
        for process, fact in enumerate(self.gather(_first_difference(facts, ours))):
            if fact is not None:
                name, here, there = fact
                raise InputError(
                    f"process {process} has {name} {here} where process 0 has {there}; start all processes with the "
                    "same config, code and libraries"
                )

    def start_jax(self) -> None:
        """Connect jax's own runtime, before it looks for devices."""
        if self.num_processes == 1:
            return
        import jax

        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from our own handler
        jax.distributed.initialize(
            *self._place,
            cluster_detection_method="deactivate",
            initialization_timeout=self._config.start_timeout_seconds,
            heartbeat_timeout_seconds=self._config.heartbeat_timeout_seconds,
            shutdown_timeout_seconds=self._config.heartbeat_timeout_seconds,
        )
        self._jax_started = True

    def end(self) -> None:
        """Part, once all are here."""
        self.gather(None, last=True)
        if self._jax_started:
            import jax

            jax.distributed.shutdown()

    def report(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Tell the others of the exception that leaves a context, or raise instead what another process failed with.

        For `ExitStack.push`, inside of what waits for other processes when it closes.
        """
        if error is None or self.num_processes == 1 or error is self._reported:
            return
        if not isinstance(error, InputError | RunFailed | KeyboardInterrupt):
            with self._changed:  # a collective that breaks is faster than the message that says why
                self._changed.wait_for(lambda: self._failure, timeout=2)
        if self._failure is None:
            self._fail(error)
        elif self._failure is not error and not isinstance(error, InputError | RunFailed):
            raise self._failure from error

    def _fail(self, error: BaseException) -> None:
        """Tell the others what this process fails with, and make sure that it ends."""
        code = EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED
        known = isinstance(error, InputError | RunFailed)
        sentence = str(error) if known else f"{type(error).__name__} ({' '.join(str(error).split())[:200]})"
        with self._changed:
            if self._ended:
                return
            self._failure = error if isinstance(error, Exception) else RunFailed(sentence)
            self._reported = error
        self.send("failed", [sentence, code])
        self._end_within(LAST_SECONDS, sentence, code)

    def _read_lines(self) -> None:
        with selectors.DefaultSelector() as selector:
            for line in self._lines.values():
                selector.register(line.socket, selectors.EVENT_READ, line)
            while selector.get_map():
                for key, _ in selector.select():
                    messages = key.data.receive()
                    with self._changed:
                        for message in messages or ():
                            if self.process_id == 0:
                                self._relay({**message, "process": key.data.process})
                            else:
                                self._deliver(message)
                        if messages is None:
                            selector.unregister(key.fileobj)
                            self._closed.add(key.data.process)
                            self._changed.notify_all()
                            self._lost(key.data.process)

    def _relay(self, message: dict[str, Any]) -> None:
        """Process 0: pass a message on to all, or keep it until everyone's is there."""
        kind = message["kind"]
        if kind.startswith("gather"):
            values = self._gathering.setdefault(kind, {})
            values[message["process"]] = message["value"]
            if len(values) <= len(self._lines):
                return
            del self._gathering[kind]
            message = {"kind": kind, "process": 0, "value": [value for _, value in sorted(values.items())]}
        for line in self._lines.values():
            line.send(message)
        self._deliver(message)

    def _deliver(self, message: dict[str, Any]) -> None:
        handler = self._handlers.get(message["kind"])
        if handler:
            handler(message["process"], message["value"])

    def _other_failed(self, process: int, failure: tuple[str, int]) -> None:
        sentence, code = failure
        with self._changed:
            if self._failure or self._ended:
                return
            sentence = f"process {process} failed: {sentence}"
            self._failure = InputError(sentence) if code == EXIT_BAD_INPUT else RunFailed(sentence)
            self._changed.notify_all()
        self._end_within(LAST_SECONDS, sentence, code)

    def _lost(self, process: int) -> None:
        """End this process at once, since another one is gone without a word."""
        if self._failure or self._ended:
            return
        if self.process_id == 0:
            for line in self._lines.values():
                line.send({"kind": "lost", "process": 0, "value": process})
        self._exit(
            f"process {process} died (killed, out of memory, or its machine is gone), so process {self.process_id} "
            "ends; the latest checkpoint stands: run the same command in all processes again",
            EXIT_FAILED,
        )

    def _end_within(self, seconds: float, sentence: str, code: int) -> None:
        """Exit with a sentence, if this process has not ended by itself by then."""
        # Not by jax's own exit, which waits for the processes that are still at work.
        atexit.register(self._exit, None, code)
        timer = threading.Timer(seconds, self._exit, [sentence, code])
        timer.daemon = True
        timer.start()

    def _exit(self, sentence: str | None, code: int) -> None:
        if sentence and threading.main_thread().is_alive():
            write_at_once(f"error: {sentence}")
        self._wait_for_others() if self._failure else self.linger()
        os._exit(code)

    def _wait_for_others(self) -> None:
        """Process 0: stay until all others have ended, since jax aborts a process that loses process 0."""
        if self.process_id == 0:
            with self._changed:
                self._changed.wait_for(lambda: self._closed == self._lines.keys(), timeout=LAST_SECONDS + 1)

    def linger(self) -> None:
        """Process 0: leave the others the time to read what was sent, which closing with unread data would drop."""
        if self._lines and self.process_id == 0:
            time.sleep(_LINGER_SECONDS)


def _first_difference(here: dict[str, str], there: dict[str, str]) -> list[str] | None:
    """[name, here, there] of the first fact that is not the same."""
    for name in {**there, **here}:
        values = [facts.get(name, "none") for facts in (here, there)]
        if values[0] != values[1]:
            return [name, *values]
    return None


def facts_of(config: Config) -> dict[str, str]:
    """What must be the same in all processes: each field of a config, the code, and the libraries' versions."""
    code = hashlib.sha256()
    package = Path(__file__).parent.parent
    for file in sorted(package.rglob("*.py")):
        code.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    facts = {name: str(field.value) for name, field in fields_of(config).items()}
    facts["the package nextllm_jax with sha256"] = code.hexdigest()[:12]
    facts["Python"] = platform.python_version()
    return facts | {name: importlib.metadata.version(name) for name in _LIBRARIES}
