"""The group of processes that train together, connected by TCP in addition to jax's own runtime.

jax.distributed aborts with SIGABRT if a process is missing at startup, its collectives hang if a process dies, and its
barriers have time limits. So the processes connect here first: process 0 listens at the coordinator's port, and the
others connect to it. The connections stay open for the whole run; jax then listens at the same port. Messages are lines
of JSON, relayed by process 0. They carry what must not wait for devices: which processes are missing, whether all run
the same config and code, that the data is prepared, requests to stop, and error messages. A connection that closes
during a run means that a process died, and ends the others. Importing this module does not import jax.
"""

import atexit
import hashlib
import importlib.metadata
import logging
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
from nextllm_jax.distributed.rendezvous import (
    Connection,
    DistributedConfig,
    ProcessInfo,
    Rendezvous,
    find_process_info,
)
from nextllm_jax.errors import EXIT_BAD_INPUT, EXIT_FAILED, InputError, RunFailed
from nextllm_jax.standard_streams import write_at_once

_log = logging.getLogger(__name__)

LAST_SECONDS = 10
"""Time that a process has to exit by itself after another process has failed."""
_LINGER_SECONDS = 0.3
_PATIENCE_SECONDS, _REMINDER_SECONDS = 3, 60
_LOCATIONS = ("data.path", "data.mixture_paths", "data.cache_dir", "data.cache_bytes")
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tiktoken")


Handler = Callable[[int, Any], None]
"""Called with (sending process, value) by the thread that reads the connections."""


class ProcessGroup:
    """The processes that train together, as seen by one of them. Until `connect` it contains only this process.

    An exception that leaves this context also ends the other processes, with the same message and exit code: at once if
    they wait in `gather`, or after LAST_SECONDS if they wait for devices.
    """

    def __init__(self, config: DistributedConfig | None = None) -> None:
        self._config = config or DistributedConfig(num_processes=1)
        self._info = ProcessInfo("", 1, 0)
        self._changed = threading.Condition(threading.RLock())
        self._connections: dict[int, Connection] = {}  # in process 0: to all others; in others: to process 0
        self._closed: set[int] = set()  # processes whose connections have closed
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
        return self._info.process_id

    @property
    def num_processes(self) -> int:
        """Number of processes in the group."""
        return self._info.num_processes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.report(kind, error, traceback)
        if self._failure is None:  # after a failure they close when the process exits, which process 0 waits for
            for connection in self._connections.values():
                connection.close()

    def connect(self) -> None:
        """Connect all processes that the flags or the cluster specify. Does nothing if this is the only process.

        Raises InputError for bad flags, and RunFailed if a process does not connect in time.
        """
        info = find_process_info(self._config)
        if info is None:
            return
        rendezvous, connections = Rendezvous(info, self._config), {}
        try:
            if info.process_id == 0:
                connections = rendezvous.connect_to_others()
            else:
                connections = {0: rendezvous.connect_to_process_0()}
        finally:
            rendezvous.close(keep=connections.values())
        with self._changed:
            self._info, self._connections = info, connections
        threading.Thread(target=self._read_connections, daemon=True).start()

    def on(self, kind: str, handler: Handler) -> None:
        """Call `handler` for each message of a kind that a process sends."""
        self._handlers[kind] = handler

    def send(self, kind: str, value: Any) -> None:
        """Send a message to all processes, including this one.

        For a kind that begins with "gather", process 0 waits for the messages of all processes, and sends them the list
        of values.
        """
        message = {"kind": kind, "process": self.process_id, "value": value}
        with self._changed:
            if self.process_id == 0:
                self._relay(message)
            else:
                self._connections[0].send(message)

    def gather(self, value: Any, waiting_for: str = "the others", *, last: bool = False) -> list[Any]:
        """The values of all processes, by process id. All must call it. It waits for as long as they are alive.

        After the `last` call, a closed connection is no longer an error. If another process fails, raises its error.
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
                _log.info(f"process {self.process_id} is waiting for {waiting_for}")
                patience = _REMINDER_SECONDS
        del self._handlers[kind]
        if not results:
            assert self._failure is not None
            raise self._failure
        return results[0]

    def check_same(self, facts: dict[str, str]) -> None:
        """Raise InputError, in all processes, if the facts of a process differ from those of process 0."""
        if self.num_processes == 1:
            return
        ours: dict[str, str] = self.gather(facts if self.process_id == 0 else None)[0]
        for process, fact in enumerate(self.gather(_first_difference(facts, ours))):
            if fact is not None:
                name, here, there = fact
                raise InputError(
                    f"process {process} has {name} {here}, but process 0 has {there}; start all processes with the "
                    "same config, code and libraries"
                )

    def start_jax(self) -> None:
        """Initialize jax.distributed. Must be called before jax looks for devices."""
        if self.num_processes == 1:
            return
        import jax

        jax.config.update("jax_enable_preemption_service", False)  # it would replace our SIGTERM handler
        jax.distributed.initialize(
            *self._info,
            cluster_detection_method="deactivate",
            initialization_timeout=self._config.start_timeout_seconds,
            heartbeat_timeout_seconds=self._config.heartbeat_timeout_seconds,
            shutdown_timeout_seconds=self._config.heartbeat_timeout_seconds,
        )
        self._jax_started = True

    def end(self) -> None:
        """Wait for all processes, then shut down jax.distributed."""
        self.gather(None, last=True)
        if self._jax_started:
            import jax

            jax.distributed.shutdown()

    def report(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Send the exception that leaves a context to the others, or raise the error of another process instead.

        For `ExitStack.push`. Push it after contexts that wait for other processes on exit, so it runs before them.
        """
        if error is None or self.num_processes == 1 or error is self._reported:
            return
        if not isinstance(error, InputError | RunFailed | KeyboardInterrupt):
            with self._changed:  # a collective may fail before the message with its cause arrives
                self._changed.wait_for(lambda: self._failure, timeout=2)
        if self._failure is None:
            self._fail(error)
        elif self._failure is not error and not isinstance(error, InputError | RunFailed):
            raise self._failure from error

    def _fail(self, error: BaseException) -> None:
        """Send the others the error of this process, and make sure that this process exits."""
        code = error.exit_code if isinstance(error, InputError) else EXIT_FAILED
        known = isinstance(error, InputError | RunFailed)
        sentence = str(error) if known else f"{type(error).__name__} ({' '.join(str(error).split())[:200]})"
        with self._changed:
            if self._ended:
                return
            self._failure = error if isinstance(error, Exception) else RunFailed(sentence)
            self._reported = error
        self.send("failed", [sentence, code])
        self._end_within(LAST_SECONDS, sentence, code)

    def _read_connections(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._connections.values():
                selector.register(connection.socket, selectors.EVENT_READ, connection)
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
        """In process 0: relay a message to all processes, or store it until every process has sent its own."""
        kind = message["kind"]
        if kind.startswith("gather"):
            values = self._gathering.setdefault(kind, {})
            values[message["process"]] = message["value"]
            if len(values) <= len(self._connections):
                return
            del self._gathering[kind]
            message = {"kind": kind, "process": 0, "value": [value for _, value in sorted(values.items())]}
        for connection in self._connections.values():
            connection.send(message)
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
        """Exit at once, since another process died without an error message."""
        if self._failure or self._ended:
            return
        if self.process_id == 0:
            for connection in self._connections.values():
                connection.send({"kind": "lost", "process": 0, "value": process})
        self._exit(
            f"process {process} died (killed, out of memory, or its machine is down), so process {self.process_id} "
            "exits; run the same command in all processes again to continue from the latest checkpoint",
            EXIT_FAILED,
        )

    def _end_within(self, seconds: float, sentence: str, code: int) -> None:
        """Exit with an error message after `seconds`, unless this process has already exited."""
        # Not through jax's exit handler, which waits for processes that are still running.
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
        """In process 0: wait until all others have exited, since jax aborts them if process 0 exits first."""
        if self.process_id == 0:
            with self._changed:
                self._changed.wait_for(lambda: self._closed == self._connections.keys(), timeout=LAST_SECONDS + 1)

    def linger(self) -> None:
        """In process 0: give the others time to read sent messages, which would be lost when the sockets close."""
        if self._connections and self.process_id == 0:
            time.sleep(_LINGER_SECONDS)


def _first_difference(here: dict[str, str], there: dict[str, str]) -> list[str] | None:
    """[name, here, there] of the first fact that differs; None if all are equal."""
    for name in {**there, **here}:
        values = [facts.get(name, "none") for facts in (here, there)]
        if values[0] != values[1]:
            return [name, *values]
    return None


def facts_of(config: Config) -> dict[str, str]:
    """What must be equal in all processes: each field of the config, the code, and the versions of libraries.

    Where a process reads the data may differ; the id of the data may not.
    """
    code = hashlib.sha256()
    package = Path(__file__).parent.parent
    for file in sorted(package.rglob("*.py")):
        code.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    facts = {name: str(field.value) for name, field in fields_of(config).items() if name not in _LOCATIONS}
    facts["the package nextllm_jax with sha256"] = code.hexdigest()[:12]
    facts["Python"] = platform.python_version()
    return facts | {name: importlib.metadata.version(name) for name in _LIBRARIES}
