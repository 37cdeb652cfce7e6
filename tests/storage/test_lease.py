"""One of several processes holds the lease of a directory in a bucket; it is taken over once it is not renewed."""

import json
import subprocess
import sys
import threading
import time

import pytest

from nextllm_jax.errors import InputError
from nextllm_jax.storage import lease
from nextllm_jax.storage.interface import StorageError
from nextllm_jax.storage.open_storage import open_storage
from tests.faults.bucket_proxy import Fault

ELSEWHERE = {"pid": 7, "host": "far", "since": "2026-01-01 10:00:00", "machine": "far", "start": "1", "id": "x"}


@pytest.fixture
def fast(monkeypatch):
    """Leases end after a second."""
    for name, seconds in (("SECONDS", 1.0), ("RENEW_SECONDS", 0.1), ("_POLL_SECONDS", 0.05)):
        monkeypatch.setattr(lease, name, seconds)


def test_a_second_holder_is_refused_and_told_who(bucket):
    with open_storage(bucket).lock(".lock"):
        for attempt in (
            open_storage(bucket).lock(".lock").__enter__,
            lambda: open_storage(bucket).require_unlocked(".lock"),
        ):
            with pytest.raises(
                InputError, match=f"{bucket} is in use by process \\d+ on .* since 20.*taken over 60 s after"
            ):
                attempt()
    open_storage(bucket).require_unlocked(".lock")
    assert open_storage(bucket).names() == []


def test_a_lease_of_another_machine_is_waited_for(bucket, fast, messages):
    """It is taken over when it was not renewed for a time; while it is renewed, it is refused."""
    storage = open_storage(bucket)
    storage.write(".lock", json.dumps(ELSEWHERE).encode())
    with storage.lock(".lock"):
        assert json.loads(storage.read(".lock"))["host"] != "far"
    assert "process 7 on far since 2026-01-01 10:00:00" in messages.text
    storage.write(".lock", json.dumps(ELSEWHERE).encode())
    renewed = threading.Timer(0.3, lambda: open_storage(bucket).write(".lock", json.dumps(ELSEWHERE).encode()))
    renewed.start()
    with pytest.raises(InputError, match="in use by process 7 on far"):
        storage.require_unlocked(".lock")
    renewed.join()


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(bucket):
    program = f"""
import os
from nextllm_jax.storage.open_storage import open_storage
with open_storage("{bucket}").lock(".lock"):
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    storage = open_storage(bucket)
    assert storage.exists(".lock")
    with storage.lock(".lock"):
        pass


def test_a_process_that_lost_its_lease_cannot_commit(bucket, fast):
    storage, other = open_storage(bucket), open_storage(bucket)

    def work():
        with storage.lock(".lock"):
            storage.append("metrics", b"1")
            storage.sync()
            other.write(".lock", json.dumps(ELSEWHERE).encode())
            storage.append("metrics", b"2")
            with pytest.raises(StorageError, match="lost its lease"):
                storage.sync()
            storage.write("loss.png", b"3")

    with pytest.raises(StorageError, match=f"lost its lease on {bucket}, which process 7 on far since .* took over"):
        work()
    assert other.read("metrics") == b"1"
    assert not other.exists("loss.png")
    assert json.loads(other.read(".lock"))["host"] == "far"  # it is not this process's to delete


def test_a_file_that_another_process_wrote_is_not_overwritten(bucket):
    storage = open_storage(bucket)
    storage.append("metrics", b"1")
    storage.sync()
    open_storage(bucket).write("metrics", b"of another")
    storage.append("metrics", b"2")
    with pytest.raises(StorageError, match="metrics was written by another process"):
        storage.sync()
    assert open_storage(bucket).read("metrics") == b"of another"


def test_renewals_outlast_a_failing_service(bucket, bucket_service, fast):
    storage = open_storage(bucket)
    with storage.lock(".lock"):
        faults = Fault("POST .*lock", 503, count=2), Fault("POST .*lock", 503, after=True, skip=2)
        with bucket_service.failing(*faults):
            for _ in range(3):
                storage.sync()
        assert all(fault.struck > fault.skip for fault in faults)
        storage.sync()


RACE = """
import sys, time
from nextllm_jax.errors import InputError
from nextllm_jax.storage.open_storage import open_storage
open_storage(sys.argv[1]).names()
for line in sys.stdin:
    number, start = line.split()
    storage = open_storage(f"{sys.argv[1]}/{number}")
    while time.time() < float(start):
        pass
    try:
        lock = storage.lock(".lock")
        lock.__enter__()
        print("holds", flush=True)
    except InputError as error:
        print(error, flush=True)
"""


@pytest.mark.parametrize("races", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_races_of_two_processes(bucket, races):
    """Each time exactly one holds the lease and the other is refused; half of the leases were abandoned before."""
    processes = [
        subprocess.Popen([sys.executable, "-c", RACE, bucket], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for number in range(races):
            if number % 2:
                gone = ELSEWHERE | {"machine": lease._machine(), "pid": 2**22 + 1}
                open_storage(f"{bucket}/{number}").write(".lock", json.dumps(gone).encode())
            start = time.time() + (2 if number == 0 else 0.05)
            for process in processes:
                process.stdin.write(f"{number} {start}\n")
                process.stdin.flush()
            answers = sorted(process.stdout.readline() for process in processes)
            assert answers[1] == "holds\n", answers
            assert "is in use by process" in answers[0], answers
    finally:
        for process in processes:
            process.kill()
            process.communicate()
