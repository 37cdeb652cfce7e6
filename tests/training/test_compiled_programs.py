"""The programs of a run in a bucket, on a machine whose own cache is empty."""

import dataclasses
import re
import time

import pytest

from nextllm_jax.checkpoint.run_dir import CONFIG, RunDir
from nextllm_jax.config import Config
from nextllm_jax.storage.bucket import Bucket
from nextllm_jax.storage.open_storage import open_storage
from nextllm_jax.training import compiled_programs
from nextllm_jax.training.compiled_programs import CompiledPrograms
from tests.conftest import Door
from tests.faults.bucket_proxy import Fault

METRICS = None  # which storing does not read


@pytest.mark.slow
def test_a_new_machine_fetches_the_programs_of_an_earlier_one(door, bucket, tmp_path):
    def train(cache, steps, *arguments):
        schedule = "--training.steps", steps, "--optimizer.schedule-steps", "40", "--training.sample-tokens", "0"
        command = "train.py", "--config", "config.py", "--workdir", bucket, *schedule, *arguments
        return Door(door.directory, cache).run(*command).stderr

    first, second = tmp_path / "first", tmp_path / "second"
    assert "compiled programs" not in train(first, "2")
    stored = {name.split("/")[-1] for name in open_storage(f"{bucket}/compiled").files()}
    assert stored == {path.name for path in first.glob("*-cache")}
    said = train(second, "3", "--allow-change", "training.steps")
    assert re.search(rf"fetched {len(stored)} compiled programs.*compiling the train step", said, re.DOTALL), said
    (step,) = {path.name for path in second.glob("jit_train_step*-cache")}
    assert step in stored, "it is compiled only once, although the local cache has another path"


@pytest.fixture
def machine(bucket, tmp_path, monkeypatch):
    """A function that returns the programs of a run in a bucket on a new machine, and its local cache."""

    def make(name):
        local = tmp_path / name
        monkeypatch.setattr(compiled_programs, "_local_cache", lambda: local)
        return CompiledPrograms(RunDir(bucket)), local

    return make


def store(programs, local, **sizes):
    for name, size in sizes.items():
        local.mkdir(exist_ok=True)
        (local / f"{name}-cache").write_bytes(b"x" * size)
        (local / f"{name}-atime").write_bytes(b"")
        programs.after_evaluation(1, METRICS)
        programs._thread.join(60)


def test_all_programs_together_have_a_size_limit(machine, monkeypatch):
    monkeypatch.setattr(compiled_programs, "MOST_BYTES", 100)
    programs, local = machine("first")
    programs.wait()
    store(programs, local, a=40, b=40, c=30)
    programs, local = machine("second")
    programs.wait()
    assert {path.name for path in local.iterdir()} == {"b-cache", "c-cache"}, "the oldest was deleted"
    monkeypatch.setattr(compiled_programs, "MOST_BYTES", 60)
    programs, local = machine("third")
    programs.wait()
    assert {path.name for path in local.iterdir()} == {"c-cache"}, "the newest come first"


def test_a_program_that_is_deleted_meanwhile_is_not_cached(machine, monkeypatch):
    programs, local = machine("first")
    programs.wait()
    store(programs, local, a=1)
    monkeypatch.setattr(Bucket, "read", lambda *_: b"")
    programs, local = machine("second")
    programs.wait()
    assert not list(local.iterdir())


def test_a_bucket_that_hangs_does_not_delay_beyond_the_limit(machine, bucket_service, monkeypatch, messages):
    monkeypatch.setattr(compiled_programs, "FETCH_SECONDS", 0.5)
    monkeypatch.setattr(compiled_programs, "CLOSE_SECONDS", 0.5)
    with bucket_service.failing(Fault("compiled", "wait", count=100, seconds=10)):
        started = time.monotonic()
        programs, local = machine("first")
        programs.wait()
        programs.after_step(1, METRICS)
        programs.close()
        assert time.monotonic() - started < 2
        assert not local.exists()
    assert [record.levelname for record in messages.records] == ["WARNING"]
    assert "takes over 0 s; continuing without waiting" in messages.text


def test_a_failure_is_one_warning(machine, bucket_service, messages):
    with bucket_service.failing(Fault("compiled", 403, count=100)):
        programs, local = machine("first")
        programs.wait()
        store(programs, local, a=1, b=1)
    assert [record.getMessage().partition(" (")[0] for record in messages.records] == [
        "fetching compiled programs is disabled for this training",
        "storing compiled programs is disabled for this training",
    ]


def test_starting_over_leaves_the_programs(machine, bucket):
    programs, local = machine("first")
    programs.wait()
    store(programs, local, a=1)
    run = RunDir(bucket)
    run.require_run_or_empty()
    run.write_config(dataclasses.replace(Config(), workdir=bucket))
    aside = run.set_aside()
    assert sorted(open_storage(aside).files()) == [CONFIG]
    assert len(open_storage(f"{bucket}/compiled").files()) == 1


def test_runs_on_disk_have_none(tmp_path):
    assert CompiledPrograms(RunDir(tmp_path))._thread is None
