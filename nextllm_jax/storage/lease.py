"""A lease in a bucket, where there are no locks: an object that its holder renews, and that others take over later.

The object is created only if it is absent, and replaced only if it is unchanged, so of several processes exactly one
succeeds. All ages are times of the storage service; the clocks of the machines play no role. A lease that was not
renewed for SECONDS may be taken over. Its holder finds out at the next renewal, which precedes every commit.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from nextllm_jax.errors import InputError
from nextllm_jax.storage.interface import Identity, StorageError

SECONDS = 60.0
"""A lease that was not renewed for so long may be taken over."""
RENEW_SECONDS = 10.0
_POLL_SECONDS = 1.0

_log = logging.getLogger(__name__)


class _Files(Protocol):
    """The operations that a lease needs from a bucket."""

    def read(self, name: str) -> bytes: ...
    def modified(self, name: str) -> float | None: ...
    def clock(self) -> float: ...
    def identity(self, name: str) -> Identity | None: ...
    def create(self, name: str, content: bytes) -> Identity | None: ...
    def replace(self, name: str, content: bytes, found: Identity) -> Identity | None: ...
    def delete_if(self, name: str, found: Identity) -> None: ...


class Lease:
    """A lease on the directory `where`, stored in the object `name`."""

    def __init__(self, bucket: _Files, name: str, where: str) -> None:
        self._bucket, self._name, self._where = bucket, name, where
        self._content = json.dumps(_this_process() | {"id": uuid.uuid4().hex}).encode()
        self._identity: Identity | None = None
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Hold the lease until `release`. Waits for a lease that is not renewed, and then takes it over.

        Raises InputError, which names the holder, if a living process holds it.
        """
        while self._identity is None:
            self._identity = self._bucket.create(self._name, self._content)
            if self._identity is None and (abandoned := self._abandoned()):
                self._identity = self._bucket.replace(self._name, self._content, abandoned)
        self._thread = threading.Thread(target=self._renew_regularly, name="lease", daemon=True)
        self._thread.start()

    def require_free(self) -> None:
        """Raise InputError, which names the holder, if a living process holds the lease."""
        self._abandoned()

    def _abandoned(self) -> Identity | None:
        """The identity of a lease whose holder is gone; None if there is no lease. Waits until that is certain.

        Raises InputError, which names the holder, if it renews the lease.
        """
        seen = None
        while (found := self._bucket.identity(self._name)) is not None:
            holder, written = _parsed(self._bucket.read(self._name)), self._bucket.modified(self._name)
            alive, age = _is_alive(holder), self._bucket.clock() - (written or 0.0)
            if alive is False or age > SECONDS:
                return found
            if alive or (seen is not None and seen.generation != found.generation):
                raise InputError(
                    f"{self._where} is in use by {_describe(holder)}; stop that process, or choose another --workdir "
                    f"(its lease can be taken over {SECONDS:.0f} s after the process ended)"
                )
            if seen is None:
                _log.info(
                    f"{self._where} was last used by {_describe(holder)}, {age:.0f} s ago; waiting up to "
                    f"{SECONDS - age:.0f} s to see whether it still runs"
                )
            seen = found
            time.sleep(_POLL_SECONDS)
        return None

    def renew(self) -> None:
        """Renew the lease now. Raises StorageError if another process has taken it over."""
        with self._renewing:
            if self._identity is not None:
                self._identity = self._bucket.replace(self._name, self._content, self._identity)
        self.require_held()

    def require_held(self) -> None:
        """Raise StorageError if the last renewal found that another process has taken the lease over."""
        if self._identity is None:
            taker = {}
            with contextlib.suppress(OSError):
                taker = _parsed(self._bucket.read(self._name))
            raise StorageError(f"this process lost its lease on {self._where}, which {_describe(taker)} took over")

    def _renew_regularly(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with contextlib.suppress(StorageError):  # `renew` before the next commit raises it
                self.renew()

    def release(self) -> None:
        """Stop renewing, and delete the lease unless another process has taken it over."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._identity is not None:
            with contextlib.suppress(OSError):
                self._bucket.delete_if(self._name, self._identity)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    try:
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except KeyError:
        return "another process"


def _this_process() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "since": since, "machine": _machine(), "start": _start_of(pid)}


def _machine() -> str:
    """Identifies this boot of this machine, and the container in it; empty if the system does not tell."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process of this machine was started, in clock ticks; empty if there is no such process."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether a holder on this machine still runs; None if it is on another machine."""
    machine = _machine()
    if not machine or holder.get("machine") != machine or not holder.get("start"):
        return None
    return _start_of(int(holder.get("pid", 0))) == holder["start"]
