import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap

import pytest
from etils import epath

from nextllm_jax.checkpoint.run_dir import DIRECTORIES, FILES, RunDir
from nextllm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from nextllm_jax.config.files import from_json
from nextllm_jax.errors import InputError, RunFailed
from nextllm_jax.storage import disk
from nextllm_jax.training.open_run import open_run

CONFIG = Config(workdir="w")


def files(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def replace(**parts):
    return dataclasses.replace(CONFIG, **parts)


@pytest.fixture
def run(tmp_path):
    """A run that has written something, in a directory where somebody else keeps notes."""
    workdir = tmp_path / "runs" / "small"
    with open_run(workdir, CONFIG):
        (workdir / "checkpoints" / "5").mkdir(parents=True)
        (workdir / "checkpoints" / "5" / "weights").write_text("weights")
        (workdir / "metrics.jsonl").write_text("{}\n")
        (workdir / "notes.txt").write_text("mine")
    return workdir


def test_new_run(tmp_path):
    for workdir in (tmp_path / "a" / "b", tmp_path / "empty"):
        if workdir.name == "empty":
            workdir.mkdir()
        with open_run(str(workdir), CONFIG) as run:
            assert run.dir.path == epath.Path(workdir)
            assert run.set_aside is None
        assert from_json((workdir / "config.json").read_text(), "here") == CONFIG


def test_a_start_that_got_no_further_than_the_lock_is_still_empty(tmp_path):
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".config.json.new").write_text("{")
    with open_run(tmp_path, CONFIG):
        pass
    assert list(files(tmp_path)) == ["config.json"]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(training=TrainingConfig(log_every_steps=7, sample_tokens=0, accumulation_steps=2)),
        replace(training=TrainingConfig(steps=9000), optimizer=OptimizerConfig(schedule_steps=5000)),
        replace(model=ModelConfig(dtype="float32", remat="full")),
        replace(data=DataConfig(path="elsewhere", num_processes=1, tokens_per_shard=2048)),
        replace(platform="cpu", workdir="other", mesh=MeshConfig(data=1, fsdp=2)),
    ],
)
def test_run_continues(run, config):
    before = files(run)
    with open_run(run, config) as opened:
        assert opened.set_aside is None
        assert files(run) == before  # until the run has passed its checks
        opened.dir.write_config(config)
    assert from_json((run / "config.json").read_text(), "here") == config
    assert files(run) | {"config.json": b""} == before | {"config.json": b""}


def test_another_config_is_refused_and_consent_is_reported(run):
    before, other = files(run), replace(seed=1, model=ModelConfig(rope_theta=500.0))
    with pytest.raises(InputError, match="another config"), open_run(run, other, allow_change=["seed"]):
        pass
    assert files(run) == before
    with open_run(run, other, allow_change=["seed", "model.rope_theta"]) as opened:
        assert [change.name for change in opened.changes] == ["seed", "model.rope_theta"]
        assert files(run) == before


def test_overwrite_moves_the_files_of_the_run_and_nothing_else(run):
    other = replace(model=ModelConfig(num_layers=4))
    before = files(run)
    for number, config in ((1, other), (2, CONFIG)):
        with open_run(run, config, overwrite=True) as opened:
            assert opened.set_aside == epath.Path(run / "overwritten" / str(number))
            assert not list((run / "checkpoints").iterdir())
        assert from_json((run / "config.json").read_text(), "here") == config
    old = {name: content for name, content in before.items() if name != "notes.txt"}
    assert files(run / "overwritten" / "1") == old
    assert (run / "notes.txt").read_text() == "mine"


def test_overwrite_moves_every_file_of_a_run(tmp_path):
    """Whatever `RunDir` writes, and what libraries write into the directories that it names."""
    with open_run(tmp_path, CONFIG) as opened:
        run = opened.dir
        names = [*FILES, *(f"{name}/file" for name in DIRECTORIES)]
        for name in names[1:]:
            run.write(name, name.encode())
    paths = [value for value in vars(run).values() if isinstance(value, epath.Path) and value != run.path]
    assert {path.name for path in paths} == set(DIRECTORIES)
    before = files(tmp_path)
    assert sorted(before) == sorted(names)
    with open_run(tmp_path, CONFIG, overwrite=True):
        assert list(files(tmp_path)) == ["config.json", *(f"overwritten/1/{name}" for name in sorted(names))]
    assert files(tmp_path / "overwritten" / "1") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "config.json", "overwritten"]
    assert not list(run.checkpoints.iterdir())


def metrics_up_to(run, step):
    lines = [json.dumps({"step": i, "split": "train", "loss": 1.0}) for i in range(1, step + 1)]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("lost", ["moved away", "not mounted", "a link to nothing"])
def test_a_run_that_lost_its_checkpoints_is_refused(run, lost):
    metrics_up_to(run, 21)
    config = replace(checkpoint=CheckpointConfig(every_steps=10))
    with open_run(run, config) as opened:
        opened.dir.write_config(config)
    shutil.rmtree(run / "checkpoints")
    if lost == "not mounted":
        (run / "checkpoints").mkdir()
    elif lost == "a link to nothing":
        (run / "checkpoints").symlink_to("/nowhere")
    before = files(run)
    with pytest.raises(InputError, match=r"metrics up to step 21, but no checkpoint in .*start over with --overwrite"):
        open_run(run, config).__enter__()
    assert files(run) == before
    with open_run(run, config, overwrite=True):
        assert (run / "checkpoints").is_dir()


@pytest.mark.parametrize("step", [0, 5, 20])
def test_a_run_that_ended_before_its_first_save_was_complete_starts_over(tmp_path, step):
    config = replace(checkpoint=CheckpointConfig(every_steps=10))
    with open_run(tmp_path, config):
        metrics_up_to(tmp_path, step)
    with open_run(tmp_path, config) as run:
        assert run.set_aside is None


@pytest.mark.parametrize(
    ("name", "problem"), [("metrics.jsonl", "is not a regular file"), ("flight", "is not a directory")]
)
def test_what_stands_in_the_way_of_a_file_is_named(run, name, problem):
    path = run / name
    path.unlink(missing_ok=True)
    path.mkdir() if "." in name else path.write_text("")
    with pytest.raises(InputError, match=f"{name} {problem}.*move it"):
        open_run(run, CONFIG).__enter__()


@pytest.mark.parametrize("name", ["", "checkpoints", "metrics.jsonl"])
def test_what_is_not_writable_is_named(run, name, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != str(run / name) and access(path, mode))
    with pytest.raises(InputError, match=f"{run / name} is not writable"):
        open_run(run, CONFIG).__enter__()


def test_adapters_without_their_base_are_refused(run):
    config = replace(init_from="elsewhere", lora=LoraConfig(rank=2))
    (run / "checkpoints" / "5" / "manifest.json").write_text("{}")
    with open_run(run, config, allow_change=["init_from"], overwrite=True):
        pass
    (run / "overwritten" / "1" / "checkpoints" / "5").rename(run / "checkpoints" / "5")
    with pytest.raises(InputError, match=r"base/0/manifest.json cannot be read"):
        open_run(run, config).__enter__()


def test_a_device_is_no_file_of_a_run(run):
    (run / "samples.txt").symlink_to("/dev/full")  # which never ends when it is read
    with pytest.raises(InputError, match=r"samples.txt is not a regular file"):
        open_run(run, CONFIG).__enter__()


def test_a_run_whose_overwrite_was_killed_is_refused_until_that_is_finished(run):
    before = files(run)
    (run / "overwritten" / "1").mkdir(parents=True)
    (run / "checkpoints").rename(run / "overwritten" / "1" / "checkpoints")
    with pytest.raises(InputError, match=r"was interrupted, so part of the run is in .*overwritten/1; run again"):
        open_run(run, CONFIG).__enter__()
    with open_run(run, CONFIG, overwrite=True) as opened:
        assert opened.set_aside == epath.Path(run / "overwritten" / "1")
    assert files(run / "overwritten" / "1") == {name: before[name] for name in before if name != "notes.txt"}


def test_overwrite_never_moves_onto_something(run):
    (run / "overwritten" / "1" / "checkpoints").mkdir(parents=True)
    with open_run(run, CONFIG, overwrite=True) as opened:
        assert opened.set_aside == epath.Path(run / "overwritten" / "2")


def test_overwrite_of_nothing_is_a_new_run(tmp_path):
    with open_run(tmp_path / "new", CONFIG, overwrite=True) as run:
        assert run.set_aside is None


def test_an_interrupted_overwrite_can_be_repeated(run, monkeypatch):
    before = files(run)
    rename, count = os.rename, 0

    def interrupted(path, target):
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(InputError, match=r"cannot be used \(Input/output error\)"):
        open_run(run, CONFIG, overwrite=True).__enter__()
    monkeypatch.undo()
    with open_run(run, CONFIG, overwrite=True):
        pass
    kept = files(run / "overwritten" / "1") | files(run / "overwritten" / "2")
    assert kept == {name: content for name, content in before.items() if name != "notes.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.tex", b"all of it"),
        (".git", b""),
        ("metrics.jsonl", b"{}"),
        ("config.json", b'{"architectures": ["LlamaForCausalLM"], "hidden_size": 64}'),
        ("config.json", b"not json"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[]"),
        ("config.json", b"{}"),
        ("config.json", b'{"model": "resnet"}'),
    ],
)
def test_a_directory_that_is_not_a_run_is_left_alone(tmp_path, name, content, overwrite):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="is not empty and not"), open_run(tmp_path, CONFIG, overwrite=overwrite):
        pass
    assert files(tmp_path) == {name: content}
    assert not (tmp_path / ".lock").exists()


def test_second_training_is_refused_and_names_the_first(run):
    with open_run(run, CONFIG):
        holder = f"process {os.getpid()} on {socket.gethostname()} since"
        for overwrite in (False, True):
            with pytest.raises(InputError, match=holder), open_run(run, CONFIG, overwrite=overwrite):
                pass
        assert (run / "checkpoints").exists()
    with open_run(run, CONFIG):
        pass


def test_lock_ends_with_its_process(run):
    script = textwrap.dedent(
        """
        import sys
        from nextllm_jax.config import Config
        from nextllm_jax.training.open_run import open_run

        with open_run(sys.argv[1], Config(workdir="w")):
            print("locked", flush=True)
            sys.stdin.read()
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"process {process.pid} on"), open_run(run, CONFIG):
            pass
        process.kill()
        process.wait()
        with open_run(run, CONFIG):
            pass


def test_lock_is_let_go_when_training_fails(run):
    with contextlib.suppress(RuntimeError), open_run(run, CONFIG):
        raise RuntimeError
    with open_run(run, CONFIG) as again:
        assert os.fspath(again.dir.path) == os.fspath(run)


def test_file_system_without_locks_is_used_without(run, monkeypatch):
    monkeypatch.setattr(disk.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    with open_run(run, CONFIG) as used:
        assert os.fspath(used.dir.path) == os.fspath(run)


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file is not a directory; move it, or choose another --workdir"):
        open_run(tmp_path / "file", CONFIG).__enter__()
    with pytest.raises(InputError, match=r"file is not a directory; move it, or choose another --workdir"):
        open_run(tmp_path / "file" / "run", CONFIG).__enter__()


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    run = RunDir(tmp_path)
    run.write("config.json", b"old")
    (tmp_path / ".config.json.new").mkdir()
    with pytest.raises(RunFailed, match=r"config.json cannot be written \(Is a directory\); make room"):
        run.write("config.json", b"new")
    assert run.read("config.json") == b"old"


@pytest.mark.parametrize("write", [RunDir.write, RunDir.append])
def test_a_run_that_was_removed_does_not_come_back(tmp_path, write):
    with pytest.raises(RunFailed, match="No such file or directory"):
        write(RunDir(tmp_path / "gone"), "metrics.jsonl", b"")
    assert not list(tmp_path.iterdir())


def test_config_json_is_readable(tmp_path):
    with open_run(tmp_path, CONFIG):
        assert json.loads((tmp_path / "config.json").read_text())["model"]["num_layers"] == 8
