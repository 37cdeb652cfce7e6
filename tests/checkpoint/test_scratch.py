"""Rolling steps in a scratch directory count like all others, and may expire."""

import numpy as np
import pytest

from nextllm_jax.checkpoint import scratch
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.saved_steps import DamagedCheckpoint
from nextllm_jax.checkpoint.verify import check_steps, find_steps
from nextllm_jax.errors import InputError
from nextllm_jax.storage.open_storage import as_path, open_storage
from tests.checkpoint.tree import abstract, save, tree
from tests.runs import assert_same_end, interrupt


@pytest.fixture(params=["disk", "bucket"])
def where(request, tmp_path):
    """The checkpoints of a run, and a directory for scratch."""
    top = str(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket")
    open_storage(top).write("run/checkpoints/notes", b"")
    scratch.use(as_path(f"{top}/run/checkpoints"), f"{top}/scratch")
    return f"{top}/run/checkpoints", f"{top}/scratch"


def saved_in(directory):
    names = [name for name in open_storage(directory).files() if name.endswith("manifest.json")]
    return sorted(int(name.split("/")[-2]) for name in names)


def save_rolling(checkpoints, step):
    checkpoints.save(step, {"params": tree(float(step))}, {}, validation_loss=None, rolling=True)


def kernel(checkpoints, step):
    return np.asarray(checkpoints.restore(step, "params", abstract(tree()))["layers"]["kernel"])


def test_what_is_saved_where(where):
    """Milestones and the best in the run, other steps in scratch; a pinned one and a new best come to the run."""
    run, apart = where
    with Checkpoints(run, keep_last=2, keep_every_steps=4, use_scratch=True) as checkpoints:
        for step in range(1, 6):
            save_rolling(checkpoints, step)
        checkpoints.add_validation_loss(5, 1.0, {})
        checkpoints.wait()
        assert (saved_in(run), saved_in(apart), checkpoints.steps()) == ([4], [5], [4, 5])
        assert (checkpoints.is_rolling(5), checkpoints.is_rolling(4), checkpoints.is_best(0.5)) == (True, False, True)
        save(checkpoints, 5, 0.5)
        save_rolling(checkpoints, 6)
        checkpoints.wait()
        assert (saved_in(run), saved_in(apart)) == ([4, 5], [6])
        checkpoints.pin(6)
        save_rolling(checkpoints, 7)
        checkpoints.wait()
        with pytest.raises(ValueError, match="already saved"):
            save_rolling(checkpoints, 6)
    assert (saved_in(run), saved_in(apart)) == ([4, 5, 6], [7])
    reader = Checkpoints(run)
    assert [reader.resolve(name) for name in ("best", "latest", "4")] == [5, 7, 4]
    for step in (4, 5, 6, 7):
        np.testing.assert_array_equal(kernel(reader, step), np.full((8, 4), step))
    reports = {report.path.name: (report.state, report.marks) for report in check_steps(find_steps(run))}
    assert reports == {"4": ("ok", ()), "5": ("ok", ("best",)), "6": ("ok", ("pinned",)), "7": ("ok", ("latest",))}


def test_what_expires_is_no_error(where):
    run, apart = where
    with Checkpoints(run, keep_last=2, use_scratch=True) as checkpoints:
        save(checkpoints, 1, 1.0)
        save_rolling(checkpoints, 2)
        save_rolling(checkpoints, 3)
    (directory,) = open_storage(apart).names()
    files = open_storage(apart).files(f"{directory}/3")
    largest = max((name for name in files if "/params/" in f"/{name}"), key=lambda name: files[name].size)
    open_storage(apart).delete(f"{directory}/3/{largest}")
    reader = Checkpoints(run)
    with pytest.raises(DamagedCheckpoint, match="is missing"):
        kernel(reader, 3)
    reader.set_aside(3)
    assert reader.steps() == [1, 2]
    open_storage(apart).delete(directory)
    assert reader.steps() == [1]
    with Checkpoints(run, use_scratch=True) as checkpoints:
        save_rolling(checkpoints, 2)
    assert (saved_in(run), saved_in(apart)) == ([1], [2])


def test_runs_do_not_meet(where):
    """Neither a second run, nor a copy of the run, nor the run after --overwrite touches the steps of the first one."""
    run, apart = where
    with Checkpoints(run, use_scratch=True) as checkpoints:
        save_rolling(checkpoints, 1)
    for number, entries in enumerate([b"[]", open_storage(run).read("scratch.json")]):
        other = as_path(f"{apart}-{number}")
        other.mkdir(parents=True)
        open_storage(other).write("scratch.json", entries)
        scratch.use(other, apart)
        scratch.use(other, apart)
        with Checkpoints(other, use_scratch=True) as checkpoints:
            save_rolling(checkpoints, 2)
            checkpoints.wait()
            assert checkpoints.steps() == [[2], [1, 2]][number]
            checkpoints.add_validation_loss(checkpoints.steps()[0], 0.5, {})
        assert Checkpoints(other).best_step() == [2, 1][number]
    assert (Checkpoints(run).steps(), Checkpoints(run).best_step()) == ([1], None)
    scratch.use(as_path(run), f"{apart}-new")
    with Checkpoints(run, use_scratch=True) as checkpoints:
        save_rolling(checkpoints, 3)
    assert (saved_in(f"{apart}-new"), Checkpoints(run).steps()) == ([3], [3])


def test_a_bucket_and_a_disk_do_not_mix(tmp_path, bucket):
    with pytest.raises(InputError, match="must be both on disk or both in buckets"):
        scratch.require_usable(as_path(tmp_path / "run" / "checkpoints"), bucket)
    for content in (b"[{", b"[{}]", b"[1]", b"1", b"\xff"):
        (tmp_path / "scratch.json").write_bytes(content)
        with pytest.raises(InputError, match=r"scratch\.json is damaged; restore it, or delete it"):
            Checkpoints(tmp_path).steps()


@pytest.mark.slow
def test_a_run_continues_from_scratch(trained, door):
    settings = ("--checkpoint.scratch", "scratch", "--checkpoint.keep-last", "1")
    code, output = interrupt(door, "SIGTERM", 33, *settings)
    assert (code, saved_in(door.directory / "runs"), saved_in(door.directory / "scratch")) == (75, [20], [33]), output
    assert "continuing from step 33" in door.run("train.py", "--config", "config.py", *settings).stderr
    assert_same_end(door.directory / "runs" / "config", trained.directory / "runs" / "config", 40)
    assert "(best, latest)" in door.run("nextllm_jax.cli", "verify", "runs/config").stdout
    refused = door.run("train.py", "--config", "config.py", "--checkpoint.scratch", "gs://bucket/x", exit_code=2).stderr
    assert "must be both on disk or both in buckets" in refused
