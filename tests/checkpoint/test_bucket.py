"""Checkpoints in a bucket: the manifest is the commit, and what the service returns is verified."""

import json
import threading

import jax
import numpy as np
import pytest

from nextllm_jax.checkpoint import saved_steps, step_files, verify
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.checkpoint.saved_steps import DamagedCheckpoint
from nextllm_jax.checkpoint.verify import check_steps, find_steps
from nextllm_jax.errors import RunFailed
from nextllm_jax.storage import service
from nextllm_jax.storage.interface import StorageError
from nextllm_jax.storage.open_storage import open_storage
from tests.checkpoint.tree import abstract, save, tree
from tests.faults.bucket_proxy import Fault


def states(where):
    return {report.path.name: report.state for report in check_steps(find_steps(where))}


def kernel(checkpoints, step):
    return np.asarray(checkpoints.restore(step, "params", abstract(tree()))["layers"]["kernel"])


@pytest.fixture
def saved(bucket):
    """Steps 1 and 2."""
    with Checkpoints(bucket, keep_last=2) as checkpoints:
        save(checkpoints, 1, 2.0)
        save(checkpoints, 2)
    return bucket


def largest(where, step):
    """The name of the largest file of a step, in an item."""
    files = open_storage(where).files(str(step))
    return f"{step}/" + max((name for name in files if "/params/" in name), key=lambda name: files[name].size)


def test_what_is_kept(bucket):
    """The best, the latest, milestones and pinned ones, as on disk; losses can be added later."""
    with Checkpoints(bucket, keep_every_steps=3) as checkpoints:
        for step, loss in ((1, 0.5), (2, None), (3, 2.0), (4, None), (5, None)):
            save(checkpoints, step, loss)
            if step == 4:
                checkpoints.pin(4)
        assert checkpoints.steps() == [1, 3, 4, 5]
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (1, 5)
        checkpoints.add_validation_loss(5, 0.1, {"position": "scored"})
        checkpoints.wait()
        assert (checkpoints.best_step(), checkpoints.steps()) == (5, [3, 4, 5])
        with pytest.raises(ValueError, match="already saved"):
            save(checkpoints, 5)
    assert Checkpoints(bucket).record(5) == {"position": "scored"}
    for step in (3, 4, 5):
        np.testing.assert_array_equal(kernel(Checkpoints(bucket), step), np.full((8, 4), step))
    assert states(bucket) == {"3": "ok", "4": "ok", "5": "ok"}
    objects = open_storage(bucket).files("5")
    assert {name.split("/")[0] for name in objects if name != "manifest.json"} == {
        json.loads(open_storage(bucket).read("5/manifest.json"))["manifest"]["prefix"]
    }


@pytest.mark.parametrize(("module", "function"), [(verify, "_check_step"), (saved_steps, "read_manifest")])
def test_a_step_that_a_training_deletes_meanwhile_is_not_damaged(saved, messages, monkeypatch, module, function):
    """Its manifest is deleted before its other files."""
    original = getattr(module, function)

    def late(path, *arguments):
        (path / "manifest.json").unlink(missing_ok=True)
        return original(path, *arguments)

    monkeypatch.setattr(module, function, late)
    if module is verify:
        assert states(f"{saved}/1") == {}
    else:
        assert Checkpoints(saved).best_step() is None
    assert not messages.messages


def test_a_step_without_its_manifest_does_not_exist(saved):
    """The next save deletes what is left of it, and of other attempts; of other files it deletes none."""
    storage = open_storage(saved)
    storage.delete("2/manifest.json")
    storage.write("1/attempt-0123456789ab/params/leftover", b"x")
    storage.write("1/notes", b"mine")
    storage.write("notes", b"mine")
    checkpoints = Checkpoints(saved, keep_last=2)
    assert checkpoints.steps() == [1]
    assert states(saved) == {"1": "ok", "2": "unfinished"}
    (report,) = [report for report in check_steps(find_steps(saved)) if report.state == "ok"]
    assert report.unknown == ("attempt-0123456789ab/", "notes")
    with checkpoints:
        save(checkpoints, 3)
        assert checkpoints.steps() == [1, 3]
        assert storage.names() == ["1", "3", "notes"]
        save(checkpoints, 2)
        assert [name for name in storage.names("1") if name.startswith("attempt-0123")] == []
    np.testing.assert_array_equal(kernel(Checkpoints(saved), 2), np.full((8, 4), 2))


def test_saving_waits_for_no_request(bucket, monkeypatch):
    """Requests are held back until `save` and what follows it in a training have returned."""
    held, call = threading.Event(), service.Service.call

    def call_later(*arguments, **options):
        assert held.wait(5), "save() waits for a request"
        return call(*arguments, **options)

    monkeypatch.setattr(service.Service, "call", call_later)
    with Checkpoints(bucket, keep_last=2) as checkpoints:
        for step in (1, 2, 3):
            held.set()
            checkpoints.prepare({"params": tree()})
            checkpoints.wait()
            held.clear()
            assert (checkpoints.is_saved(step), checkpoints.is_best(1 / step)) == (False, True)
            checkpoints.save(step, {"params": tree(float(step))}, {}, validation_loss=None)
            checkpoints.add_validation_loss(step, 1 / step, {})
            held.set()
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
    assert Checkpoints(bucket).best_step() == 3


def flip(storage, name):
    content = bytearray(storage.read(name))
    content[len(content) // 2] ^= 1
    storage.write(name, bytes(content))


def truncate(storage, name):
    storage.write(name, storage.read(name)[:-1])


def remove(storage, name):
    storage.delete(name)


@pytest.mark.parametrize(
    ("harm", "says"),
    [(flip, "service's crc32c differs"), (truncate, r"has [\d,]+ bytes instead of"), (remove, "is missing")],
)
def test_damage_is_named_and_set_aside(saved, harm, says):
    name = largest(saved, 2)
    harm(open_storage(saved), name)
    checkpoints = Checkpoints(saved)
    with pytest.raises(
        DamagedCheckpoint, match=f"damaged .*{name.split('/', 2)[2]} .*{says}.*; use another step: 1"
    ) as damage:
        kernel(checkpoints, 2)
    assert damage.value.step == 2
    assert states(saved) == {"1": "ok", "2": "damaged"}
    checkpoints.set_aside(2)
    assert checkpoints.steps() == [1]
    assert states(saved) == {"1": "ok", "2.damaged": "set aside"}
    np.testing.assert_array_equal(kernel(checkpoints, 1), np.full((8, 4), 1))


def test_a_bit_that_flips_on_the_way_is_found(saved, bucket_service):
    file = largest(saved, 2).rsplit("/", 1)[1]
    with (
        bucket_service.failing(Fault(f"GET .*download.*{file}", "flip")),
        pytest.raises(DamagedCheckpoint, match="its crc32c differs"),
    ):
        kernel(Checkpoints(saved), 2)
    np.testing.assert_array_equal(kernel(Checkpoints(saved), 2), np.full((8, 4), 2))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST .*uploadType=media", 503, count=3),
        Fault("POST .*uploadType=media", "cut", skip=3),
        Fault("POST .*manifest.json", 503, after=True),
        Fault("POST .*uploadType=multipart", 503, count=5),
        Fault("GET", 503, skip=2, count=4),
    ],
    ids=lambda fault: f"{fault.pattern} {fault.action}",
)
def test_a_save_outlasts_a_failing_service(bucket, bucket_service, fault):
    with bucket_service.failing(fault), Checkpoints(bucket) as checkpoints:
        save(checkpoints, 1)
    assert fault.struck >= fault.skip + fault.count
    np.testing.assert_array_equal(kernel(Checkpoints(bucket), 1), np.full((8, 4), 1))


@pytest.mark.slow  # usually seconds, but sometimes minutes, in which tensorstore repeats its requests
def test_a_save_that_fails_keeps_the_step_before(saved, bucket_service, monkeypatch):
    monkeypatch.setattr(service, "LIMIT_SECONDS", 1.0)
    checkpoints = Checkpoints(saved)
    says = f"step 3 could not be saved in {saved} .the bucket answered permission denied.*the last checkpoint is step 2"
    with bucket_service.failing(Fault("POST", 403, count=1000)), pytest.raises(RunFailed, match=says) as error:
        save(checkpoints, 3)
    assert "\n" not in str(error.value)
    assert states(saved) == {"1": "ok", "2": "ok"}


def test_a_bucket_that_cannot_be_read_is_no_bucket_without_losses(saved, bucket_service):
    unreadable = Fault("GET .*manifest.json.*alt=media", 403, count=9)
    with bucket_service.failing(unreadable), pytest.raises(StorageError, match="no permission for gs://bucket"):
        Checkpoints(saved).best_step()


def test_a_process_that_lost_its_lease_neither_commits_nor_deletes(bucket):
    run = RunDir(bucket)
    checkpoints = Checkpoints(run.checkpoints, guard=run.sync)

    def work():
        with run.lock():
            save(checkpoints, 1)
            open_storage(bucket).write(".lock", json.dumps({"pid": 7, "host": "far", "since": "now"}).encode())
            open_storage(bucket).write("checkpoints/2/attempt-0123456789ab/file", b"of the process that took over")
            save(checkpoints, 2)

    with pytest.raises(RunFailed, match=r"step 2 could not be saved .*lost its lease .* process 7 on far since now"):
        work()
    assert checkpoints.steps() == [1]
    assert open_storage(bucket).exists("checkpoints/2/attempt-0123456789ab/file")


def test_two_saves_of_a_step_are_one(saved, monkeypatch):
    """As of two processes, of which one does not know yet that it lost its lease."""
    checkpoints = Checkpoints(saved)
    commit = step_files.commit

    def late(directory, attempt, step, content):
        open_storage(directory).write(f"{step}/manifest.json", b"of another")
        commit(directory, attempt, step, content)

    monkeypatch.setattr(step_files, "commit", late)
    with pytest.raises(RunFailed, match="another process has saved step 3"):
        save(checkpoints, 3)
    assert open_storage(saved).read("3/manifest.json") == b"of another"


def test_a_copy_of_a_run_on_disk_is_read(tmp_path, bucket):
    """As `gcloud storage cp` makes it, in either direction: the formats of both are read in both places."""
    with Checkpoints(tmp_path / "disk") as checkpoints:
        save(checkpoints, 1)
    with Checkpoints(f"{bucket}/there") as checkpoints:
        save(checkpoints, 1)
    pairs = (str(tmp_path / "disk"), f"{bucket}/copy"), (f"{bucket}/there", str(tmp_path / "copy"))
    for source, target in pairs:
        for name in open_storage(source).files():
            open_storage(target).write(name, open_storage(source).read(name))
        np.testing.assert_array_equal(kernel(Checkpoints(target), 1), np.full((8, 4), 1))
        assert states(target) == {"1": "ok"}
    assert jax.process_count() == 1
