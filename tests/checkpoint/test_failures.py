"""A save that fails, wherever it does, ends in RunFailed and leaves no thread that the process would wait for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import Processes

LONGEST_PATH = 4095

PROGRAM = """
import subprocess, sys
from pathlib import Path
import jax.numpy as jnp
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.errors import RunFailed
from tests.checkpoint.tree import tree

ITEMS = {"params": {str(i): jnp.full((64, 64), float(i)) for i in range(10)}, "rest": tree()}

def save(directory):
    try:
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(2, ITEMS, {}, validation_loss=None)
        print("saved")
    except RunFailed as error:
        print(error)
    assert Checkpoints(directory).steps() in ([], [2])
"""

LONG_PATHS = """
from tests.checkpoint.test_failures import long_path
for free in (0, 20, 35, 40, 50, 60, 75, 90, 110, 130):
    save(long_path(Path(sys.argv[1]), free))
"""

FEW_INODES = """
for inodes in (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 36, 60):
    directory = Path(sys.argv[1]) / str(inodes)  # of its own: a thread of orbax may still write when a save has failed
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"nr_inodes={inodes}", "tmpfs", directory], check=True)
    try:
        save(directory)
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
"""


def long_path(top: Path, free: int) -> Path:
    """A path below `top` so long that names of more than `free` characters do not fit below it."""
    path, length = str(top), LONGEST_PATH - free
    while length - len(path) > 250:
        path += "/" + "d" * 199
    return Path(path + "/" + "e" * (length - len(path) - 1))


@pytest.fixture
def mounted(tmp_path):
    """A directory on which file systems can be mounted; skips where that is not permitted."""
    mount = ["mount", "-t", "tmpfs", "tmpfs", tmp_path]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system needs root")
    except FileNotFoundError:
        pytest.skip("there is no mount")
    subprocess.run(["umount", tmp_path], check=True)
    return tmp_path


def outcomes(program: str, directory: Path) -> list[str]:
    """What the saves of a program said; it has to end by itself."""
    command = [sys.executable, "-c", PROGRAM + program, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.splitlines()


def test_a_save_that_fails_at_any_depth(tmp_path):
    """What cannot be made is the step's directory, an item's, a file of orbax's, or a file of an array."""
    *failed, last = outcomes(LONG_PATHS, tmp_path)
    assert last == "saved"
    assert len(failed) == 9
    for line in failed:
        assert re.fullmatch(
            r"step 2 could not be saved in \S+ \(File name too long\); there is no earlier checkpoint; .*", line
        )


def test_a_file_system_without_free_inodes(mounted):
    *failed, last = outcomes(FEW_INODES, mounted)
    assert last == "saved"
    assert all("(No space left on device); there is no earlier checkpoint" in line for line in failed)


@pytest.fixture
def checkpoints_read_only(mounted, trained):
    """A finished run whose checkpoints are on a file system that cannot be written."""
    run = mounted / "run"
    subprocess.run(["cp", "-r", trained.directory / "runs" / "config", run], check=True)
    directory = run / "checkpoints"
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", directory], check=True)
        yield run
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.slow
def test_a_run_whose_checkpoints_cannot_be_written_ends(trained, checkpoints_read_only):
    arguments = ("--workdir", checkpoints_read_only, "--training.steps", "45", "--optimizer.schedule-steps", "40")
    failed = trained.run("train.py", "--config", "config.py", *arguments, exit_code=1)
    *_, error = failed.stderr.splitlines()
    assert re.fullmatch(r"error: step 45 could not be saved in \S+ \(Read-only file system\); .* is step 40; .*", error)


@pytest.mark.slow
@pytest.mark.parametrize("free", [70, 95])
def test_two_processes_end_when_a_save_fails(door, free):
    """Process 0 alone makes directories (70); both write arrays (95)."""
    with Processes(door, 2, "--mesh.fsdp", "2", "--workdir", long_path(door.directory, free)) as two:
        codes, _ = two.end()
        assert codes == [1, 1], two.outputs()
        for number in (0, 1):
            lines = two.output(number).splitlines()
            said = [line for line in lines if "step 15 could not be saved in" in line]
            assert said, two.outputs()
            assert lines[-1] == said[-1]
            assert said[-1].startswith("error: ")
            assert "Traceback" not in two.output(number)
            assert "Terminating process" not in two.output(number)  # by jax
