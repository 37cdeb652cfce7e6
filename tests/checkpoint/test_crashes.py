"""Wherever a save is killed, what counts as a checkpoint is whole, and the next save cleans up.

One subprocess imports everything and forks a child for each point, which dies there: as abruptly as by kill -9.
"""

import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.verify import check_steps, find_steps
from tests.checkpoint.tree import abstract, names, save, tree

PROGRAM = """
import json, os, sys
from pathlib import Path
import orbax.checkpoint as ocp
from etils import epath
from nextllm_jax.checkpoint import manifest, step_files
from nextllm_jax.checkpoint.manager import Checkpoints
from tests.checkpoint.tree import save, tree

def die_at(owner, name, call, *, after=False):
    original, calls = getattr(owner, name), []
    def replaced(*args, **kwargs):
        calls.append(name)
        if len(calls) < call:
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        os._exit(9)
    setattr(owner, name, replaced)

# A save seals (write_manifest, then sync_directory of the step), renames, and syncs the directory of all steps.
# with_checksum is called by each writing and each reading of a manifest.
POINTS = {
    "arrays under way": lambda: die_at(ocp.AsyncCheckpointer, "save", 2, after=True),
    "arrays written": lambda: die_at(step_files, "seal", 2),
    "files hashed": lambda: die_at(step_files, "write_manifest", 2),
    "manifest begun": lambda: die_at(manifest, "with_checksum", 4),
    "manifest written": lambda: die_at(step_files, "sync_directory", 3),
    "read back": lambda: die_at(step_files, "damaged_files", 2, after=True),
    "renamed": lambda: die_at(step_files, "sync_directory", 4),
    "deleting": lambda: die_at(step_files, "delete", 1),
    "deletion begun": lambda: die_at(type(epath.Path("/")), "rmtree", 1),
    "scoring begun": lambda: die_at(manifest, "with_checksum", 9),
}

def child(point, directory):
    POINTS[point]()
    checkpoints = Checkpoints(directory)
    save(checkpoints, 1, 2.0)
    save(checkpoints, 2, 1.0 if point.startswith("delet") else None)
    checkpoints.add_validation_loss(2, 0.5, {"position": "scored"})
    checkpoints.wait()
    os._exit(0)

if __name__ == "__main__":
    codes = {}
    for point in POINTS:
        pid = os.fork()
        if pid == 0:
            try:
                child(point, Path(sys.argv[1]) / point)
            finally:
                os._exit(1)
        codes[point] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps(codes))
"""

# What is left: the checkpoints that count, and other names.
LEFT = {
    "arrays under way": ([1], None),  # orbax's own names, as far as it got
    "arrays written": ([1], ["2.unfinished"]),
    "files hashed": ([1], ["2.unfinished"]),
    "manifest begun": ([1], ["2.unfinished", "2.unfinished.manifest.new"]),
    "manifest written": ([1], ["2.unfinished"]),
    "read back": ([1], ["2.unfinished"]),
    "renamed": ([1, 2], []),
    "deleting": ([1, 2], []),
    "deletion begun": ([2], ["1.deleted"]),
    "scoring begun": ([1, 2], ["2.manifest.new"]),
}


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("crashed")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(LEFT, 9), done.stderr
    return directory


@pytest.mark.parametrize("point", LEFT)
def test_killed_at(crashed, point):
    directory = crashed / point
    steps, others = LEFT[point]
    checkpoints = Checkpoints(directory)
    assert checkpoints.steps() == steps
    if others is not None:
        assert names(directory) == sorted([*map(str, steps), *others])
    states = {report.path.name: report.state for report in check_steps(find_steps(directory))}
    assert {name for name, state in states.items() if state == "ok"} == set(map(str, steps))
    assert "damaged" not in states.values()
    for step in steps:
        kernel = checkpoints.restore(step, "params", abstract(tree()))["layers"]["kernel"]
        np.testing.assert_array_equal(np.asarray(kernel), np.full((8, 4), step))
        assert checkpoints.record(step) == {"position": step}
    assert checkpoints.latest_step() == steps[-1]
    assert checkpoints.best_step() == (2 if 2 in steps and point.startswith("delet") else 1)
    with checkpoints:
        save(checkpoints, 3, 0.1)
    assert names(directory) == ["3"]


def test_killed_while_saving(tmp_path):
    """Whenever the process is killed, what is there is complete and restorable."""
    script = """
import itertools, sys
import jax.numpy as jnp
from nextllm_jax.checkpoint.manager import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
for step in itertools.count(1):
    checkpoints.save(step, {"params": {"x": jnp.full(300_000, step)}}, {"step": step}, validation_loss=1 / step)
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 3:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    checkpoints = Checkpoints(tmp_path)
    latest = checkpoints.resolve("latest")
    assert latest >= 2
    assert checkpoints.best_step() == latest
    for step in checkpoints.steps():
        target = abstract({"x": jax.ShapeDtypeStruct((300_000,), np.dtype("int32"))})
        restored = checkpoints.restore(step, "params", target)
        assert set(np.asarray(restored["x"]).tolist()) == {step}
        assert checkpoints.record(step) == {"step": step}


def test_a_save_goes_on_to_its_end_after_a_second_interrupt(tmp_path):
    """Ctrl-C while the context waits for the save: the exit code says so, and the interpreter waits for the thread."""
    script = """
import os, signal, sys, threading, time
import jax.numpy as jnp
from nextllm_jax.checkpoint import manifest, step_files
from nextllm_jax.checkpoint.manager import Checkpoints

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a script
seal = step_files.seal
def slow_seal(*args):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)
    seal(*args)
step_files.seal = slow_seal
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, {"params": {"x": jnp.ones(3)}}, {}, validation_loss=None)
    raise KeyboardInterrupt
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT, done.stderr
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    checkpoints.restore(1, "params", abstract({"x": jax.ShapeDtypeStruct((3,), np.dtype("float32"))}))
