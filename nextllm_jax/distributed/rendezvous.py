"""How the processes of a run find each other: process 0 listens, the others connect, missing processes are reported.

Importing this module does not import jax.
"""

import contextlib
import dataclasses
import json
import logging
import os
import selectors
import socket
import time
import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

from nextllm_jax.errors import InputError, RunFailed

_log = logging.getLogger(__name__)

_REPORT_SECONDS = 3
_HELLO = "nextllm_jax 1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Multi-process training. Unset values are detected from the cluster, if there is one: TPU VMs, TPUs in GKE, SLURM,
    Open MPI."""

    coordinator_address: str | None = None
    """HOST:PORT at which the other processes reach process 0."""
    num_processes: int | None = None
    """Number of processes that train together; 1: only this one, even in a cluster."""
    process_id: int | None = None
    """Number of this process, from 0."""
    start_timeout_seconds: int = 300
    """How long the processes wait for each other at startup."""
    heartbeat_timeout_seconds: int = 100
    """A process that does not respond for this long counts as lost."""

    def __post_init__(self) -> None:
        for name in ("num_processes", "start_timeout_seconds", "heartbeat_timeout_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"distributed.{name} is {value}; it must be positive")
        number, count = self.process_id, self.num_processes
        if number is not None and (number < 0 or (count is not None and number >= count)):
            last = "the number of processes less 1" if count is None else count - 1
            raise InputError(f"distributed.process_id is {number}; it must be between 0 and {last}")
        if self.coordinator_address is not None:
            host, _, port = self.coordinator_address.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise InputError(f"distributed.coordinator_address is {self.coordinator_address}; it must be HOST:PORT")


class ProcessInfo(NamedTuple):
    """The id of a process in its group, and how to reach the group."""

    address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


def find_process_info(config: DistributedConfig) -> ProcessInfo | None:
    """The process info from the flags and the cluster; None if this is the only process."""
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
            f"distributed.{' and distributed.'.join(missing)} must be set too, since no cluster provides it"
        )
    return ProcessInfo(*found)


def _ask_cluster(given: tuple[Any, ...], timeout_seconds: int) -> tuple[Any, ...]:
    """Address, number of processes, process id and local devices. jax detects those that are not given.

    A process that SLURM or Open MPI started alone on its machine uses all devices there; jax would use only the first.
    """
    # jax has no public function for this; jax.distributed.initialize detects and connects at once.
    from jax._src.clusters import ClusterEnv

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jax warns about the missing Kubernetes package in every pod
            *info, local = ClusterEnv.auto_detect_unset_distributed_params(
                given[0], given[1], given[2], None, None, timeout_seconds
            )
    except Exception as error:
        raise InputError(
            f"the cluster's process information cannot be read ({' '.join(str(error).split())[:200]}); set the "
            "--distributed flags, or --distributed.num-processes 1 to train in this process only"
        ) from error
    nodes, tasks = (os.environ.get(f"SLURM_STEP_NUM_{things}") for things in ("NODES", "TASKS"))
    alone = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (nodes is not None and nodes == tasks)
    return (*info, None if alone else local)


class Connection:
    """A TCP connection for JSON objects, one per line. `process` is the id of the peer, once it is known."""

    def __init__(self, sock: socket.socket, timeout_seconds: int) -> None:
        self.socket = sock
        self.process: int | None = None
        self._unread = b""
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel sends keepalive probes to silent machines, even while this process is busy.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {"TCP_KEEPIDLE": timeout_seconds // 2, "TCP_KEEPINTVL": timeout_seconds // 8, "TCP_KEEPCNT": 4}
        for name, value in options.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, value))

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the reader notices a closed connection
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived in full; None if the peer has closed or is not a process of this program."""
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


def _failure(error: InputError | RunFailed) -> dict[str, Any]:
    return {"kind": "failed", "value": [str(error), isinstance(error, InputError)]}


class Rendezvous:
    """Connects the processes of a group at startup, with a timeout and reports of missing processes."""

    def __init__(self, info: ProcessInfo, config: DistributedConfig) -> None:
        self._info = info
        self._heartbeat = config.heartbeat_timeout_seconds
        self._timeout = config.start_timeout_seconds
        self._deadline = time.monotonic() + self._timeout
        self._next_report = time.monotonic() + _REPORT_SECONDS
        self._joined: dict[int, Connection] = {}
        self._opened: list[Connection] = []

    def close(self, keep: Collection[Connection] = ()) -> None:
        """Close all connections but those in `keep`."""
        for connection in self._opened:
            if connection not in keep:
                connection.close()

    def connect_to_others(self) -> dict[int, Connection]:
        """In process 0: wait for all other processes, and return the connections to them.

        Raises RunFailed if a process does not connect in time. Raises InputError, in all connected processes, if two
        processes have the same id or a different number of processes.
        """
        port = int(self._info.address.rpartition(":")[2])
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
                while len(self._joined) < self._info.num_processes - 1:
                    self._accept_and_greet(selector, listener)
        except (InputError, RunFailed) as error:
            self._tell_joined(_failure(error))
            raise
        self._tell_joined({"kind": "met", "value": None})
        return self._joined

    def _accept_and_greet(self, selector: selectors.BaseSelector, listener: socket.socket) -> None:
        for key, _ in selector.select(timeout=_REPORT_SECONDS / 3):
            if key.fileobj is listener:
                accepted, _ = listener.accept()
                selector.register(accepted, selectors.EVENT_READ, self._open(accepted))
                continue
            connection: Connection = key.data
            messages = connection.receive()
            if messages is None:  # it disconnected, or is not a process of this program
                selector.unregister(connection.socket)
                connection.close()
                if connection.process is not None:
                    del self._joined[connection.process]
            for message in messages or ():
                if message["kind"] == _HELLO:
                    self._greet(connection, message["value"])
        self._report_who_is_missing()

    def _open(self, sock: socket.socket) -> Connection:
        self._opened.append(Connection(sock, self._heartbeat))
        return self._opened[-1]

    def _greet(self, connection: Connection, hello: dict[str, Any]) -> None:
        process, count = hello["process"], self._info.num_processes
        if hello["of"] != count:
            problem = f"process {process} has num-processes {hello['of']}, but process 0 has {count}"
        elif process in self._joined or process == 0:
            problem = f"two processes have the process-id {process}, one of them {hello['who']}"
        else:
            connection.process = process
            self._joined[process] = connection
            return
        error = InputError(f"{problem}; give each its own --distributed.process-id and all the same num-processes")
        connection.send(_failure(error))
        raise error

    def _report_who_is_missing(self) -> None:
        joined, count = [0, *sorted(self._joined)], self._info.num_processes
        if time.monotonic() >= self._deadline:
            missing = ", ".join(str(process) for process in range(count) if process not in joined)
            raise RunFailed(
                f"of {count} processes at {self._info.address}, {missing} did not connect within {self._timeout} "
                "seconds; check their output, and start all of them"
            )
        if time.monotonic() >= self._next_report:
            self._next_report += _REPORT_SECONDS
            here = ", ".join(map(str, joined))
            text = f"waiting for {count} processes at {self._info.address}, {len(joined)} joined: {here}"
            _log.info(text)
            self._tell_joined({"kind": "waiting", "value": text})

    def _tell_joined(self, message: dict[str, Any]) -> None:
        for connection in self._joined.values():
            connection.send(message)

    def connect_to_process_0(self) -> Connection:
        """In another process: connect to process 0, wait for all others, and return the connection.

        Raises the error that process 0 sends, if any, and RunFailed if process 0 does not answer in time.
        """
        while True:
            connection = self._connect_to_coordinator()
            who = f"{socket.gethostname()} {os.getpid()}"
            hello = {"process": self._info.process_id, "of": self._info.num_processes, "who": who}
            connection.send({"kind": _HELLO, "value": hello})
            with selectors.DefaultSelector() as selector:
                selector.register(connection.socket, selectors.EVENT_READ)
                if self._wait_until_complete(selector, connection):
                    return connection
            connection.close()

    def _wait_until_complete(self, selector: selectors.BaseSelector, connection: Connection) -> bool:
        """True once all processes have connected; False if process 0 has disconnected."""
        while True:
            if not selector.select(timeout=_REPORT_SECONDS):
                self._give_up_in_time("it does not answer", grace=_REPORT_SECONDS)
                continue
            messages = connection.receive()
            if messages is None:
                time.sleep(_REPORT_SECONDS / 10)
                return False
            for message in messages:
                value = message["value"]
                if message["kind"] == "met":
                    connection.process = 0
                    return True
                if message["kind"] == "failed":
                    raise (InputError if value[1] else RunFailed)(value[0])
                _log.info(value)

    def _connect_to_coordinator(self) -> Connection:
        host, _, port = self._info.address.rpartition(":")
        while True:
            try:
                return self._open(socket.create_connection((host.strip("[]"), int(port)), timeout=_REPORT_SECONDS))
            except OSError as error:
                self._give_up_in_time(error.strerror or str(error))
            if time.monotonic() >= self._next_report:
                self._next_report += _REPORT_SECONDS
                _log.info(f"process {self._info.process_id} is waiting for process 0 at {self._info.address}")
            time.sleep(_REPORT_SECONDS / 10)

    def _give_up_in_time(self, reason: str, grace: float = 0.0) -> None:
        if time.monotonic() >= self._deadline + grace:
            raise RunFailed(
                f"process {self._info.process_id} could not reach process 0 at {self._info.address} within "
                f"{self._timeout} seconds ({reason}); start it, or fix --distributed.coordinator-address"
            )
