"""Counts the requests of this process to buckets, since a storage service bills each of them.

Writes and lists cost about ten times as much as reads; deletions are free. What the client sends is counted with its
retries. Tensorstore, through which orbax reads and writes arrays, counts its own requests. On a disk all counts are 0.
"""

import sys
import threading
import urllib.parse
from typing import Any, NamedTuple

from nextllm_jax.hardware import readable_bytes


class Costs(NamedTuple):
    """Requests and bytes."""

    writes: int = 0
    """Writes, copies and lists: operations of class A in price lists."""
    reads: int = 0
    """Operations of class B."""
    bytes_written: int = 0
    bytes_read: int = 0

    def plus(self, other: "Costs", sign: int = 1) -> "Costs":
        """The sum of both; with `sign` -1 the difference."""
        return Costs(*(mine + sign * theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def requests(self) -> int:
        """All requests that are billed."""
        return self.writes + self.reads

    def __str__(self) -> str:
        return (
            f"{self.writes:,} writes and lists, {self.reads:,} reads, {readable_bytes(self.bytes_written)} written, "
            f"{readable_bytes(self.bytes_read)} read"
        )


_of_client = Costs()
_lock = threading.Lock()


def count(response: Any, **_: Any) -> None:
    """Count a request of the client by its `requests.Response`."""
    global _of_client
    request = response.request
    if request.method == "DELETE":
        return
    is_read = request.method == "GET" and not urllib.parse.urlsplit(request.url).path.endswith("/o")
    sent, received = (int(headers.get("Content-Length") or 0) for headers in (request.headers, response.headers))
    with _lock:
        _of_client = _of_client.plus(Costs(not is_read, is_read, sent, received))


def total() -> Costs:
    """What this process has spent so far."""
    return _of_client.plus(_of_tensorstore())


def _of_tensorstore() -> Costs:
    tensorstore = sys.modules.get("tensorstore")
    if tensorstore is None:
        return Costs()
    prefix = "/tensorstore/kvstore/gcs/"
    metrics = tensorstore.experimental_collect_matching_metrics(prefix)
    found = {each["name"].removeprefix(prefix): each["values"][0].get("value", 0) for each in metrics}
    write, listed, retries, read, sent, received = (
        found.get(name, 0) for name in ("write", "list", "retries", "read", "bytes_written", "bytes_read")
    )
    return Costs(write + listed + retries, read, sent, received)
