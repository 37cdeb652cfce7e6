"""Where the processes of a run find each other: process 0 listens, the others connect, who is missing is named.

Importing this module does not import jax.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import time
import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

from nextllm_jax.errors import InputError, RunFailed

_REPORT_SECONDS = 3
_HELLO = "nextllm_jax 1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Processes that train together; what is not given comes from the cluster, if there is one: TPU VMs, TPUs in GKE,
    SLURM, Open MPI."""

    coordinator_address: str | None = None
    """HOST:PORT at which process 0 is reached by the others."""
    num_processes: int | None = None
    """Processes that train together; 1: this one alone, whatever the cluster says."""
    process_id: int | None = None
    """Number of this process, from 0."""
    start_timeout_seconds: int = 300
    """How long the processes wait for each other at the start."""
    heartbeat_timeout_seconds: int = 100
    """Silence after which a machine that went down, or a process that hangs, counts as lost."""

    def __post_init__(self) -> None:
        for name in ("num_processes", "start_timeout_seconds", "heartbeat_timeout_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"distributed.{name} is {value}; it must be positive")
        number, count = self.process_id, self.num_processes
        if number is not None and (number < 0 or (count is not None and number >= count)):
            last = "the number of processes less 1" if count is None else count - 1
            raise InputError(f"distributed.process_id is {number}; it must lie in 0 to {last}")
        if self.coordinator_address is not None:
            host, _, port = self.coordinator_address.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise InputError(f"distributed.coordinator_address is {self.coordinator_address}; it must be HOST:PORT")


class Place(NamedTuple):
    """Who a process is among the others."""

    address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


def find_place(config: DistributedConfig) -> Place | None:
    """What the flags and the cluster say; None for a process alone."""
    names = ("coordinator_address", "num_processes", "process_id")
    given: tuple[Any, ...] = tuple(getattr(config, name) for name in names)
    if config.num_processes == 1:
        return None
    found: tuple[Any, ...] = (*given, None)
    if None in given:
        found = _ask_cluster(given, config.start_timeout_seconds)
    missing = [name for name, value in zip(names, found, strict=False) if value is None]
    if len(missing) == 3 or (not missing and found[1] == 1):
        return None
    if missing:
        raise InputError(
            f"distributed.{' and distributed.'.join(missing)} must be given too: there is no cluster that says"
        )
    return Place(*found)


def _ask_cluster(given: tuple[Any, ...], timeout_seconds: int) -> tuple[Any, ...]:
    """Address, number of processes, process id and local devices, as jax finds them out where they are not given.

    A process that SLURM or Open MPI started alone on its machine takes all devices there; jax would take the first.
    """
    # jax has no public name for this: jax.distributed.initialize asks and connects in one.
    from jax._src.clusters import ClusterEnv

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Kubernetes without its package", in every pod
            *place, local = ClusterEnv.auto_detect_unset_distributed_params(
                given[0], given[1], given[2], None, None, timeout_seconds
            )
    except Exception as error:
        raise InputError(
            f"what the cluster says of its processes cannot be read ({' '.join(str(error).split())[:200]}); give the "
            "--distributed flags, or --distributed.num-processes 1 to train in this process alone"
        ) from error
    nodes, tasks = (os.environ.get(f"SLURM_STEP_NUM_{things}") for things in ("NODES", "TASKS"))
    alone = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (nodes is not None and nodes == tasks)
    return (*place, None if alone else local)


class Line:
    """A connection that carries JSON objects, one a line. `process` is who is at the other end, once known."""

    def __init__(self, connection: socket.socket, timeout_seconds: int) -> None:
        self.socket = connection
        self.process: int | None = None
        self._unread = b""
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The system asks silent machines for a sign of life, whatever this process is busy with.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {"TCP_KEEPIDLE": timeout_seconds // 2, "TCP_KEEPINTVL": timeout_seconds // 8, "TCP_KEEPCNT": 4}
        for name, value in options.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, value))

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a closed connection is noticed by its reader
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come, at least in part; None if the other end has closed, or is none of ours."""
        try:
            data = self.socket.recv(2**16)
            *lines, self._unread = (self._unread + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        ours = all(isinstance(message, dict) and isinstance(message.get("kind"), str) for message in messages)
        return messages if data and ours else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def report(text: str) -> None:
    """Print a line on standard error, now."""
    print(text, file=sys.stderr, flush=True)


def _failure(error: InputError | RunFailed) -> dict[str, Any]:
    return {"kind": "failed", "value": [str(error), isinstance(error, InputError)]}


class Meeting:
    """The start of a group: who is here, who is missing, and for how long that may be so."""

    def __init__(self, place: Place, config: DistributedConfig) -> None:
        self._place = place
        self._heartbeat = config.heartbeat_timeout_seconds
        self._timeout = config.start_timeout_seconds
        self._deadline = time.monotonic() + self._timeout
        self._next_report = time.monotonic() + _REPORT_SECONDS
        self._joined: dict[int, Line] = {}
        self._opened: list[Line] = []

    def close(self, keep: Collection[Line] = ()) -> None:
        """Close all connections but those in `keep`."""
        for line in self._opened:
            if line not in keep:
                line.close()

    def lines_to_others(self) -> dict[int, Line]:
        """Process 0: the connections to all others, once all have come.

        Raises RunFailed if one does not come in time, and InputError, in all that are here, if two say that they are
        the same process or one counts otherwise.
        """
        port = int(self._place.address.rpartition(":")[2])
        try:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            listener = socket.create_server(("", port), family=family, dualstack_ipv6=both)
        except OSError as error:
            raise InputError(
                f"process 0 cannot listen at port {port} ({error.strerror or error}); choose another "
                "--distributed.coordinator-address"
            ) from error
        try:
            with listener, selectors.DefaultSelector() as selector:
                selector.register(listener, selectors.EVENT_READ)
                while len(self._joined) < self._place.num_processes - 1:
                    self._accept_and_greet(selector, listener)
        except (InputError, RunFailed) as error:
            self._tell_joined(_failure(error))
            raise
        self._tell_joined({"kind": "met", "value": None})
        return self._joined

    def _accept_and_greet(self, selector: selectors.BaseSelector, listener: socket.socket) -> None:
        for key, _ in selector.select(timeout=_REPORT_SECONDS / 3):
            if key.fileobj is listener:
                connection, _ = listener.accept()
                selector.register(connection, selectors.EVENT_READ, self._open(connection))
                continue
            line: Line = key.data
            messages = line.receive()
            if messages is None:  # it left, or is something else than a process of this run
                selector.unregister(line.socket)
                line.close()
                if line.process is not None:
                    del self._joined[line.process]
            for message in messages or ():
                if message["kind"] == _HELLO:
                    self._greet(line, message["value"])
        self._report_who_is_missing()

    def _open(self, connection: socket.socket) -> Line:
        self._opened.append(Line(connection, self._heartbeat))
        return self._opened[-1]

    def _greet(self, line: Line, hello: dict[str, Any]) -> None:
        process, count = hello["process"], self._place.num_processes
        if hello["of"] != count:
            problem = f"process {process} counts {hello['of']} processes where process 0 counts {count}"
        elif process in self._joined or process == 0:
            problem = f"two processes say that they are process {process}, one of them {hello['who']}"
        else:
            line.process = process
            self._joined[process] = line
            return
        error = InputError(f"{problem}; give each its own --distributed.process-id, and all the same num-processes")
        line.send(_failure(error))
        raise error

    def _report_who_is_missing(self) -> None:
        joined, count = [0, *sorted(self._joined)], self._place.num_processes
        if time.monotonic() >= self._deadline:
            missing = ", ".join(str(process) for process in range(count) if process not in joined)
            raise RunFailed(
                f"of {count} processes at {self._place.address}, {missing} did not come within {self._timeout} "
                "seconds; look at what they print, and start all of them"
            )
        if time.monotonic() >= self._next_report:
            self._next_report += _REPORT_SECONDS
            here = ", ".join(map(str, joined))
            text = f"waiting for {count} processes at {self._place.address}, {len(joined)} joined: {here}"
            report(text)
            self._tell_joined({"kind": "waiting", "value": text})

    def _tell_joined(self, message: dict[str, Any]) -> None:
        for line in self._joined.values():
            line.send(message)

    def line_to_process_0(self) -> Line:
        """Another process: its connection to process 0, once all have come.

        Raises what process 0 ends the meeting with, and RunFailed if it does not answer in time.
        """
        while True:
            line = self._connect()
            who = f"{socket.gethostname()} {os.getpid()}"
            hello = {"process": self._place.process_id, "of": self._place.num_processes, "who": who}
            line.send({"kind": _HELLO, "value": hello})
            with selectors.DefaultSelector() as selector:
                selector.register(line.socket, selectors.EVENT_READ)
                if self._wait_until_met(selector, line):
                    return line
            line.close()

    def _wait_until_met(self, selector: selectors.BaseSelector, line: Line) -> bool:
        """True once all have come, False if process 0 has gone again."""
        while True:
            if not selector.select(timeout=_REPORT_SECONDS):
                self._give_up_in_time("it does not answer", grace=_REPORT_SECONDS)
                continue
            messages = line.receive()
            if messages is None:
                time.sleep(_REPORT_SECONDS / 10)
                return False
            for message in messages:
                value = message["value"]
                if message["kind"] == "met":
                    line.process = 0
                    return True
                if message["kind"] == "failed":
                    raise (InputError if value[1] else RunFailed)(value[0])
                report(value)

    def _connect(self) -> Line:
        host, _, port = self._place.address.rpartition(":")
        while True:
            try:
                return self._open(socket.create_connection((host.strip("[]"), int(port)), timeout=_REPORT_SECONDS))
            except OSError as error:
                self._give_up_in_time(error.strerror or str(error))
            if time.monotonic() >= self._next_report:
                self._next_report += _REPORT_SECONDS
                report(f"process {self._place.process_id} is waiting for process 0 at {self._place.address}")
            time.sleep(_REPORT_SECONDS / 10)

    def _give_up_in_time(self, reason: str, grace: float = 0.0) -> None:
        if time.monotonic() >= self._deadline + grace:
            raise RunFailed(
                f"process {self._place.process_id} found no process 0 at {self._place.address} within "
                f"{self._timeout} seconds ({reason}); start it, or fix --distributed.coordinator-address"
            )
