"""What a run in a bucket survives: a table of faults and moments, each inflicted on real processes of train.py.

Each training ends, bit for bit, where one on disk without faults ends, or it stops with a one-line error, and the same
command does so once the fault is gone.
"""

import dataclasses
import re

import pytest

from nextllm_jax.checkpoint.verify import check_steps, find_steps
from nextllm_jax.storage.open_storage import open_storage
from tests.faults.bucket_proxy import Fault
from tests.runs import assert_same_end, fetched

ARRAYS, SMALL, MANIFEST = "POST .*uploadType=media", "POST .*name=.*_METADATA", "POST .*name=.*/manifest.json"
METRICS, LEASE, LISTING = "POST .*name=.*metrics.jsonl", r"POST .*name=.*\.lock", r"GET [^&]*/o\?"
DOWNLOAD, DELETION = "GET .*(alt=media|/download/)", "DELETE"
ALWAYS = 10**6

SURVIVED = {
    "429 while arrays are written": Fault(ARRAYS, 429, count=5),
    "503 while arrays are written": Fault(ARRAYS, 503, count=5),
    "a cut upload of arrays": Fault(ARRAYS, "cut", skip=2, count=3),
    "arrays whose answer is lost": Fault(ARRAYS, 503, after=True, count=3),
    "429 at orbax's metadata": Fault(SMALL, 429, count=2),
    "503 at orbax's metadata": Fault(SMALL, 503, count=2),
    "a cut upload of orbax's metadata": Fault(SMALL, "cut", count=2),
    "429 at a manifest": Fault(MANIFEST, 429, count=3),
    "503 at a manifest": Fault(MANIFEST, 503, count=3),
    "a manifest whose answer is lost": Fault(MANIFEST, 503, after=True),
    "a cut upload of a manifest": Fault(MANIFEST, "cut"),
    "503 at metrics.jsonl": Fault(METRICS, 503, count=2),
    "metrics.jsonl whose answer is lost": Fault(METRICS, 503, after=True, count=2),
    "503 at the lease": Fault(LEASE, 503, count=3),
    "a renewal whose answer is lost": Fault(LEASE, 503, after=True, skip=1, count=2),
    "412 for a renewal that was right": Fault(LEASE, 412, skip=2),
    "429 at listings": Fault(LISTING, 429, skip=10, count=10),
    "503 at listings": Fault(LISTING, 503, skip=20, count=5),
    "cut listings": Fault(LISTING, "cut", skip=10, count=3),
    "cut downloads": Fault(DOWNLOAD, "cut", count=5),
    "bits flipped on the way": Fault(r"GET .*(config.json|manifest.json)\?.*media", "flip", count=5),
    "503 at deletions": Fault(DELETION, 503, count=5),
    "deletions whose answer is lost": Fault(DELETION, 503, after=True, count=5),
    "no right to delete": Fault(r"DELETE .*attempt", 403, count=ALWAYS),
    "50 ms for each request": Fault(".", "wait", count=ALWAYS, seconds=0.05),
}
STOPPED = {
    "the bucket vanishes": (Fault(".", 404, skip=300, count=ALWAYS), "bucket gs://bucket does not exist|not found"),
    "the credentials expire": (Fault(".", 401, skip=250, count=ALWAYS), "credentials|unauthenticated"),
    "the right to write is lost": (Fault("POST", 403, skip=100, count=ALWAYS), "permission"),
    "no right to write arrays": (Fault(ARRAYS, 403, count=ALWAYS), "permission denied"),
    "no right to read": (Fault("GET", 403, skip=5, count=ALWAYS), "no permission for gs://bucket"),
    "a manifest that is refused": (Fault(MANIFEST, 412), "another process has saved step 15"),
}

pytestmark = pytest.mark.slow


def train(door, address, exit_codes):
    process = door.start("train.py", "--config", "config.py", "--workdir", address)
    out, err = process.communicate(timeout=600)
    assert process.returncode in exit_codes, f"exit {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err, err
    return err


@pytest.mark.parametrize("name", SURVIVED)
def test_survived(trained, door, bucket, bucket_service, tmp_path, name):
    fault = dataclasses.replace(SURVIVED[name])
    with bucket_service.failing(fault):
        train(door, bucket, [0])
    assert fault.struck > fault.skip
    assert_same_end(fetched(bucket, tmp_path / "fetched"), trained.directory / "runs" / "config", 40)


@pytest.mark.parametrize("name", STOPPED)
def test_stopped(trained, door, bucket, bucket_service, tmp_path, name):
    fault, says = STOPPED[name]
    with bucket_service.failing(dataclasses.replace(fault)):
        error = train(door, bucket, [1, 2])
    assert re.search(f"^error: .*({says})", error, re.MULTILINE), error
    if open_storage(bucket).exists("config.json"):
        assert {report.state for report in check_steps(find_steps(bucket))} <= {"ok", "unfinished"}
    train(door, bucket, [0])
    assert_same_end(fetched(bucket, tmp_path / "fetched"), trained.directory / "runs" / "config", 40)
