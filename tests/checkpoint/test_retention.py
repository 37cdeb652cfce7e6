"""What is kept, and that a save that is under way or fails is never lost without a word."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from nextllm_jax.checkpoint import step_files
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.errors import InputError, RunFailed
from tests.checkpoint.tree import abstract, names, save, tree


@pytest.mark.parametrize(
    ("retention", "losses", "kept"),
    [
        ({"keep_last": 2}, [1.0, 2.0, 3.0, 4.0, 5.0], [1, 4, 5]),
        ({"keep_last": 2}, [5.0, 4.0, 3.0, 2.0, 1.0], [4, 5]),
        ({"keep_last": 3}, [math.nan] * 5, [3, 4, 5]),
        ({"keep_last": 9}, [None, 1.0, math.nan, 2.0], [1, 2, 3, 4]),
        ({"keep_every_steps": 2}, [1.0, 2.0, 3.0, 4.0, 5.0], [1, 2, 4, 5]),
        ({"keep_every_steps": 3, "keep_last": 2}, [None, 1.0, None, math.nan, 3.0, None, None], [2, 3, 6, 7]),
    ],
)
@pytest.mark.parametrize("restarts", [False, True])
def test_retention(tmp_path, retention, losses, kept, restarts):
    checkpoints = Checkpoints(tmp_path, **retention)
    for step, loss in enumerate(losses, start=1):
        if restarts:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, **retention)
        save(checkpoints, step, loss)
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == kept
    assert names(tmp_path) == sorted(map(str, kept))


def test_step_0_is_no_multiple(tmp_path):
    with Checkpoints(tmp_path, keep_every_steps=5) as checkpoints:
        save(checkpoints, 0)
        save(checkpoints, 5)
        save(checkpoints, 6)
    assert checkpoints.steps() == [5, 6]


def test_a_pinned_step_stays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        checkpoints.pin(1)
        save(checkpoints, 2)
        with pytest.raises(InputError, match="has no checkpoint '7'"):
            checkpoints.pin(7)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3, 1.0)
        save(checkpoints, 4, 2.0)
        assert checkpoints.steps() == [1, 3, 4]
        checkpoints.restore(1, "params", abstract(tree()))  # the pin is no foreign file
        (tmp_path / "1" / "pinned").unlink()
        save(checkpoints, 5)
    assert checkpoints.steps() == [3, 5]


def refuse(*_):
    raise OSError(1, "Operation not permitted")


@pytest.mark.parametrize("refused", ["rmtree", "rename"])
def test_a_step_that_cannot_be_deleted_is_a_warning_and_goes_later(tmp_path, monkeypatch, messages, refused):
    directory, steps = type(epath.Path(tmp_path)), ["1", "2", "3"]
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        if refused == "rmtree":
            monkeypatch.setattr(directory, "rmtree", refuse)
            steps[:2] = ["1.deleted", "2.deleted"]
        else:
            monkeypatch.setattr(step_files, "delete", refuse)
        save(checkpoints, 2)
        save(checkpoints, 3)
        assert names(tmp_path) == steps
        for name, line in zip(steps[:2], messages.messages, strict=True):  # once each
            problem = "cannot be deleted (Operation not permitted); the next save tries again"
            assert line == f"{tmp_path / name} {problem}"
        messages.clear()
        monkeypatch.undo()
        save(checkpoints, 4)
        assert names(tmp_path) == ["4"]
    assert not messages.messages


def test_a_leftover_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, messages):
    (tmp_path / "9.unfinished").mkdir()
    monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", refuse)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    assert checkpoints.steps() == [2]
    assert [line.split()[0] for line in messages.messages] == [
        str(tmp_path / "9.unfinished"),
        str(tmp_path / "1.deleted"),
    ]


def test_a_step_is_set_aside_over_one_that_cannot_be_deleted(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        (tmp_path / "1.damaged").mkdir()
        monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", refuse)
        checkpoints.set_aside(1)
        assert names(tmp_path) == ["1.damaged", "1.deleted"]
        save(checkpoints, 1)
        monkeypatch.setattr(type(epath.Path(tmp_path)), "rename", refuse)
        with pytest.raises(RunFailed, match=r"1\.damaged cannot be written \(Operation not permitted\)"):
            checkpoints.set_aside(1)


def test_hashing_does_not_hold_up_training_and_nothing_goes_before_it_is_done(tmp_path, monkeypatch):
    seal, may_go_on = step_files.seal, threading.Event()
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        monkeypatch.setattr(step_files, "seal", lambda *args: may_go_on.wait(30) and seal(*args))
        checkpoints.save(2, {"params": tree()}, {}, validation_loss=None)
        checkpoints.check()
        assert checkpoints.steps() == [1]
        may_go_on.set()
        checkpoints.wait()
        assert checkpoints.steps() == [2]


def save_and_raise(directory, error):
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, {"params": tree()}, {}, validation_loss=None)
        raise error


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), RunFailed("not finite")])
def test_an_exception_waits_for_the_save(tmp_path, error, messages):
    with pytest.raises(type(error)) as caught:
        save_and_raise(tmp_path, error)
    assert caught.value is error
    assert names(tmp_path) == ["1"]
    Checkpoints(tmp_path).restore(1, "params", abstract(tree()))
    assert not messages.messages


def fail(*_):
    raise OSError(28, "No space left on device")


def test_an_exception_beside_a_failed_save_is_not_hidden_and_both_are_said(tmp_path, monkeypatch, messages):
    monkeypatch.setattr(step_files, "seal", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        save_and_raise(tmp_path, RuntimeError("a bug"))
    (line,) = messages.messages
    assert line.startswith("step 1 could not be saved in")
    assert "(No space left on device); there is no earlier checkpoint" in line


def check_until_it_raises(checkpoints):
    for _ in range(1000):  # as training does, step by step
        checkpoints.check()
        time.sleep(0.01)


def test_a_save_that_failed_is_noticed_before_the_next(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.check()
        save(checkpoints, 1)
        monkeypatch.setattr(step_files, "seal", fail)
        checkpoints.save(2, {"params": tree()}, {}, validation_loss=None)
        with pytest.raises(RunFailed, match=r"step 2 .* \(No space left on device\); .* is step 1; make room"):
            check_until_it_raises(checkpoints)
        checkpoints.check()  # it is said once
    assert names(tmp_path) == ["1"]


def test_a_directory_that_is_gone_is_not_made_anew(tmp_path):
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        save(checkpoints, 1)
        shutil.rmtree(directory)
        with pytest.raises(RunFailed, match=r"step 2 .* \(the directory is gone\); there is no earlier checkpoint"):
            save(checkpoints, 2)
    assert not directory.exists()


def test_a_directory_that_goes_during_a_save(tmp_path, monkeypatch):
    seal = step_files.seal
    monkeypatch.setattr(step_files, "seal", lambda path, content: (shutil.rmtree(tmp_path), seal(path, content)))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(RunFailed, match=r"step 1 .*\(No such file or directory\)"),
    ):
        save(checkpoints, 1)


TWO_PROCESSES = """
import json, os, sys
from pathlib import Path
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.saved_steps import DamagedCheckpoint

directory, address, index = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, 2, index)
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
value = jax.jit(lambda: jax.numpy.arange(400_000.0), out_shardings=sharding)()
target = {"x": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)}
with Checkpoints(directory) as checkpoints:
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        checkpoints.save(step, {"params": {"x": value * step}}, {}, validation_loss=loss)
    checkpoints.wait()
    steps = checkpoints.steps()
    checkpoints.pin(3)
    ours = [path for path in (directory / "3").rglob(f"*process_{index}/d/*") if path.is_file()]
    if index == 1:  # a file that this process wrote
        path = max(ours, key=lambda path: path.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    multihost_utils.sync_global_devices("damaged")
    try:
        checkpoints.restore(3, "params", target)
        found = ""
    except DamagedCheckpoint as error:
        found = str(error)
    checkpoints.set_aside(3)
    restored = checkpoints.restore(1, "params", target)["x"]
    same = all(np.array_equal(a.data, b.data) for a, b in zip(restored.addressable_shards, value.addressable_shards))
print(json.dumps({"steps": steps, "found": found, "same": same, "left": checkpoints.steps(), "wrote": len(ours)}))
"""


def test_two_processes(tmp_path):
    """Both write, one hashes, each checks a share, and both hear of what one of them found."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(index)], env=environment, **pipes) for index in range(2)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    one, other = (json.loads(out.splitlines()[-1]) for out, _ in ends)  # Gloo prints before
    assert one.pop("wrote") > 0
    assert other.pop("wrote") > 0
    assert one == other
    assert (one["steps"], one["same"], one["left"]) == ([1, 3], True, [1])
    assert "3 is damaged (params/ocdbt.process_1/d/" in one["found"]
    assert one["found"].endswith("is not what was saved (its sha256 differs)); use another step: 1")
    assert names(tmp_path) == ["1", "3.damaged"]
