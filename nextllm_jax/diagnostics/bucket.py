"""Checks of a bucket: rights, conditional writes, its distance from this machine, and settings that multiply its bill.

Each check yields a message and its status. `machine.clock` compares the clock of a bucket with that of this machine.
"""

import os
import urllib.request
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from nextllm_jax.diagnostics.machine import Status
from nextllm_jax.storage.interface import Identity, StorageError
from nextllm_jax.storage.open_storage import open_bucket, open_storage
from nextllm_jax.storage.service import Service, client

_PRODUCT_FILE = Path("/sys/class/dmi/id/product_name")
_METADATA_SECONDS = 2.0
_CONTINENTS = {"US": "US-", "EU": "EUROPE-", "ASIA": "ASIA-"}
"""How the names of regions begin in which a bucket is, by the location of a bucket in several regions."""
_DAY_SECONDS = 86_400

Finding = tuple[str, Status]


def check_run(workdir: str) -> Iterator[Finding]:
    """Whether a run in a bucket can do there what it needs. Writes a file next to its directory and deletes it."""
    name, file = _bucket(workdir), "file"
    directory = workdir.removeprefix(f"gs://{name}").strip("/")
    probe = open_storage(f"gs://{name}/{directory}.doctor-{uuid.uuid4().hex[:12]}")
    try:
        probe.names()
        yield f"gs://{name} exists, and files can be listed", "ok"
    except StorageError as error:
        yield f"files cannot be listed: {error}", "PROBLEM"
        if not _is_forbidden(error):
            return
    if (yield from _attempt("files", "be written", lambda: probe.create(file, b"1") is not None)):
        yield from _attempt("files", "be read", lambda: probe.read(file) == b"1")
        yield from _attempt(
            "writes",
            "depend on conditions",
            lambda: probe.create(file, b"2") is None and probe.replace(file, b"3", Identity(1, 1)) is None,
        )
        yield from _attempt("files", "be deleted", lambda: not probe.delete(file))
    yield from _check_settings(name)


def check_data(path: str) -> Iterator[Finding]:
    """Whether the files of data in a bucket can be read, if there are any."""
    bucket = open_bucket(path)
    if files := bucket.files():
        bucket.read_range(min(files, key=lambda file: files[file].size), 0, 1)
        yield f"{path} can be read", "ok"


def _bucket(address: str) -> str:
    return address.split("/")[2]


def _is_forbidden(error: StorageError) -> bool:
    from google.api_core.exceptions import Forbidden

    return isinstance(error.__cause__, Forbidden)


def _attempt(subject: str, verb: str, succeeds: Callable[[], bool]) -> Generator[Finding, None, bool]:
    """Yield the finding that the subject can or cannot do something, and return which."""
    try:
        can, why = succeeds(), "the service ignores conditions, or does not return what was written"
    except StorageError as error:
        can, why = False, str(error)
    yield (f"{subject} can {verb}", "ok") if can else (f"{subject} cannot {verb}: {why}", "PROBLEM")
    return can


def _check_settings(name: str) -> Iterator[Finding]:
    """Where the bucket is, and whether it keeps what was deleted."""
    bucket = client().bucket(name)
    try:
        Service(name).call(bucket.reload)
    except StorageError as error:
        if not _is_forbidden(error):
            raise
        yield "its location and settings are unknown, since storage.buckets.get is not permitted", "ok"
        return
    yield _distance(bucket, _zone())
    again = f"gcloud storage buckets update gs://{name}"
    if bucket.versioning_enabled:
        yield f"object versioning keeps deleted checkpoints, which are paid for; {again} --no-versioning", "warning"
    if seconds := bucket.soft_delete_policy.retention_duration_seconds:
        yield (
            f"soft delete keeps deleted checkpoints for {int(seconds) / _DAY_SECONDS:g} days, which are paid for; "
            f"{again} --clear-soft-delete",
            "warning",
        )
    if not bucket.versioning_enabled and not seconds:
        yield "deleted files are not kept: versioning and soft delete are off", "ok"


def _distance(bucket: Any, zone: str | None) -> Finding:
    location = str(bucket.location)
    where = f"gs://{bucket.name} is in {location}"
    if zone is None:
        return f"{where}; the zone of this machine is unknown", "ok"
    region = zone.rpartition("-")[0].upper()
    if region in (location, *(bucket.data_locations or ())):
        return f"{where}, near this machine in {zone}", "ok"
    if region.startswith(_CONTINENTS.get(location, location)):
        return f"{where}, which includes this machine in {zone}", "ok"
    return f"{where}, but this machine is in {zone}: traffic is slower and is paid for; use a bucket there", "warning"


def _zone() -> str | None:
    """The zone of this machine of Google Compute Engine; None elsewhere, where no metadata server is asked."""
    host = os.environ.get("GCE_METADATA_HOST")
    if host is None:
        if "STORAGE_EMULATOR_HOST" in os.environ or not _is_google_machine():
            return None
        host = "metadata.google.internal"
    address = f"http://{host}/computeMetadata/v1/instance/zone"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode().rpartition("/")[2]
    except OSError:
        return None


def _is_google_machine() -> bool:
    try:
        return _PRODUCT_FILE.read_text().startswith("Google")
    except OSError:
        return False
