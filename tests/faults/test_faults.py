"""What a run survives: a table of faults and moments, each inflicted on real processes of train.py.

Each row does its harm and says what is promised then: the run ends, bit for bit, where a run without the fault ends
(`recovers`), or it is refused by a sentence that names the thing, with nothing changed (`refuses`).
"""

import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Door
from tests.runs import INJECT, TRAINED_A_STEP, assert_same_end, contents, interrupt

STEPS = 40


@dataclasses.dataclass
class Case:
    """A run that was stopped at about step 30, with checkpoints of step 20 and of then, in a directory to be harmed."""

    door: Door

    @property
    def run(self) -> Path:
        return self.door.directory / "runs" / "config"

    @property
    def data(self) -> Path:
        return (self.door.directory / "data" / "known").resolve()

    @property
    def latest(self) -> Path:
        """The directory of the latest checkpoint."""
        steps = [path for path in (self.run / "checkpoints").iterdir() if path.name.isdigit()]
        return max(steps, key=lambda path: int(path.name))

    def train(self, *arguments, exit_code=0) -> str:
        done = self.door.run("train.py", "--config", "config.py", *arguments, exit_code=exit_code)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    def strike(self, fault: str, place: str, count: int = 1, *arguments) -> subprocess.CompletedProcess:
        """Train with a fault at the count-th call of a function (see inject.py) until it ends in some way."""
        script = ROOT / "train.py"
        process = self.door.start(INJECT, fault, place, count, script, "--config", "config.py", *arguments)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def fresh(self) -> "Case":
        """The same without the run: it starts at step 0."""
        shutil.rmtree(self.run.parent)
        return self


Harm = Callable[[Case], object]


@dataclasses.dataclass(frozen=True)
class Row:
    harm: Harm
    says: str = ""
    """What the training after the harm prints."""
    refuses: bool = False
    """Training is refused with exit code 2, instead of ending as without the fault."""
    slow: bool = False


def killed(place: str, count: int = 1, *, fresh: bool = False) -> Harm:
    def harm(case: Case) -> None:
        ended = (case.fresh() if fresh else case).strike("kill", place, count)
        assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr

    return harm


def killed_at_random(seed: int) -> Harm:
    """kill -9 after a random time, from before the first line to after the last."""

    def harm(case: Case) -> None:
        started = time.monotonic()
        process = case.fresh().door.start("train.py", "--config", "config.py")
        while not any(case.run.glob("checkpoints/*")) and seed % 2 and process.poll() is None:
            time.sleep(0.01)  # half of the seeds wait for the first save, so that not all fall into the start
        time.sleep(random.Random(seed).uniform(0, 1.5 if seed % 2 else 1.0 + time.monotonic() - started + 8))
        process.kill()
        process.communicate()

    return harm


def full_disk(place: str, count: int = 1) -> Harm:
    def harm(case: Case) -> None:
        ended = case.strike("full", place, count)
        assert ended.returncode == 1, ended.stdout + ended.stderr
        assert re.search("^error: .*No space left on device", ended.stderr, re.MULTILINE), ended.stderr
        assert "Traceback" not in ended.stderr, ended.stderr

    return harm


def signalled(number: signal.Signals, place: str, count: int = 1, *, fresh: bool = False) -> Harm:
    def harm(case: Case) -> None:
        ended = (case.fresh() if fresh else case).strike(number.name, place, count)
        assert ended.returncode == 75, f"{ended.returncode}\n{ended.stdout}{ended.stderr}"

    return harm


def signalled_twice(case: Case) -> None:
    """At once, as by a key that bounces, or as `timeout` signals a process and its group: one request."""
    ended = case.strike("SIGINT+SIGINT", TRAINED_A_STEP, 2)
    assert ended.returncode == 75, f"{ended.returncode}\n{ended.stdout}{ended.stderr}"


def files_in(case: Case, pattern: str) -> list[Path]:
    """The files of the latest checkpoint that match, largest first."""
    found = [path for path in case.latest.glob(pattern) if path.is_file()]
    assert found, pattern
    return sorted(found, key=lambda path: path.stat().st_size, reverse=True)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def remove(path: Path) -> None:
    path.unlink()


def checkpoint(damage: Callable[[Path], None], pattern: str) -> Harm:
    return lambda case: damage(files_in(case, pattern)[0])


def shard(damage: Callable[[Path], None], pattern: str) -> Harm:
    return lambda case: damage(next(case.data.glob(pattern)))


def swap_shards(case: Case) -> None:
    train, validation = case.data / "train-00000.bin", case.data / "validation-00000.bin"
    train.rename(case.data / "aside")
    validation.rename(train)
    (case.data / "aside").rename(validation)


def other_tokenizer(case: Case) -> None:
    """The tokenizer of other data, whole in itself."""
    case.door.run("nextllm_jax.cli", "prepare", "--corpus", "corpus", "--vocab-size", "300", "--output", "other")
    shutil.rmtree(case.data / "tokenizer")
    shutil.copytree(case.door.directory / "other" / "tokenizer", case.data / "tokenizer")


def killed_prepare(place: str, count: int = 1) -> Harm:
    """Preparing anew is killed; its files are to be those of the data that was not interrupted."""

    def harm(case: Case) -> None:
        data, before = case.data, case.door.directory / "before"
        data.rename(before)
        ended = case.fresh().strike("kill", place, count)
        assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr
        assert not (data / "index.json").exists()
        case.door.run("nextllm_jax.cli", "prepare", "--config", "config.py")
        names = sorted(path.relative_to(before) for path in before.rglob("*") if path.is_file())
        assert names == sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
        for name in names:
            assert (data / name).read_bytes() == (before / name).read_bytes(), name

    return harm


def tiny_disk(case: Case) -> None:
    """A file system of 4 MiB under the checkpoints, all but full, with room again for the next training."""
    checkpoints, latest = case.run / "checkpoints", case.latest.name
    kept = case.door.directory / "kept"
    checkpoints.rename(kept)
    checkpoints.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", checkpoints]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        shutil.copytree(kept / latest, checkpoints / latest)
        (checkpoints / "filler").write_bytes(bytes(shutil.disk_usage(checkpoints).free - 65_536))
        output = case.train(exit_code=1)
        assert re.search("error: step 40 could not be saved .*No space left on device.*; step \\d+ stands", output), (
            output
        )
    finally:
        subprocess.run(["umount", checkpoints], check=True)
    checkpoints.rmdir()
    kept.rename(checkpoints)


def removed(case: Case, directory: str, steps: int, says: str) -> None:
    """A directory is removed under a training, all at once, which ends with the sentence."""
    ended = case.strike(f"gone {directory}", TRAINED_A_STEP, steps)
    assert ended.returncode == 1, ended.stderr
    assert re.search(says, ended.stderr, re.MULTILINE), ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr


def checkpoints_removed(case: Case) -> None:
    """Once some are saved; the next training is refused, and loses nothing more."""
    removed(case.fresh(), "runs/config/checkpoints", 32, "^error: .*could not be saved")


def run_removed(case: Case) -> None:
    removed(case, "runs/config", 2, "^error: ")


def files_of_tomorrow(case: Case) -> None:
    """As after the clock was set back: everything was written a day from now."""
    for path in [*case.run.rglob("*"), *case.data.rglob("*")]:
        os.utime(path, (time.time() + 86_400,) * 2)


def clock_set_back(case: Case) -> None:
    ended = case.strike("clock", "nextllm_jax.training.writers:MetricsWriter.train", 3)
    assert ended.returncode == 0, ended.stderr


def half_a_line(case: Case) -> None:
    with (case.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "spl')


EVALUATE = "nextllm_jax.training.validation:evaluate"
FILES = "nextllm_jax.checkpoint.step_files"
SAVE = "orbax.checkpoint:AsyncCheckpointer.save"
PREPARE = "nextllm_jax.data.prepare"

ROWS = {
    # kill -9
    **{f"kill -9 at random, seed {seed}": Row(killed_at_random(seed), slow=True) for seed in range(20)},
    "kill -9 before the first step": Row(killed("nextllm_jax.data.loader:TrainLoader.batches", fresh=True), slow=True),
    "kill -9 in an evaluation": Row(killed(EVALUATE), slow=True),
    "kill -9 before the arrays are written": Row(killed(SAVE), slow=True),
    "kill -9 before a manifest": Row(killed(f"{FILES}:write_manifest")),
    "kill -9 before the first manifest": Row(killed(f"{FILES}:write_manifest", fresh=True), slow=True),
    "kill -9 between manifest and name": Row(killed(f"{FILES}:damaged_files", 3), slow=True),
    "kill -9 before an old checkpoint goes": Row(killed(f"{FILES}:delete"), slow=True),
    "kill -9 before config.json": Row(killed("nextllm_jax.training.setup:open_run", fresh=True), slow=True),
    "kill -9 while samples are written": Row(killed("nextllm_jax.training.samples:Samples.write"), slow=True),
    "kill -9 while loss.png is drawn": Row(killed("nextllm_jax.training.pictures:draw_losses"), slow=True),
    "kill -9 before the index of the data": Row(killed_prepare(f"{PREPARE}:write_index"), slow=True),
    "kill -9 before the data is published": Row(killed_prepare(f"{PREPARE}:publish"), slow=True),
    "kill -9 before the second split": Row(killed_prepare(f"{PREPARE}:write_split", 2), slow=True),
    # signals
    "SIGTERM in the first step": Row(
        signalled(signal.SIGTERM, "nextllm_jax.data.loader:TrainLoader.batches", fresh=True), slow=True
    ),
    "SIGTERM in a step": Row(
        signalled(signal.SIGTERM, "nextllm_jax.training.writers:MetricsWriter.train", 4), slow=True
    ),
    "SIGINT in a step": Row(signalled(signal.SIGINT, "nextllm_jax.training.writers:MetricsWriter.train", 5), slow=True),
    "SIGTERM in an evaluation": Row(signalled(signal.SIGTERM, EVALUATE), slow=True),
    "SIGINT in an evaluation": Row(signalled(signal.SIGINT, EVALUATE, fresh=True), slow=True),
    "SIGTERM while saving": Row(signalled(signal.SIGTERM, f"{FILES}:seal", fresh=True), slow=True),
    "SIGINT while saving": Row(signalled(signal.SIGINT, SAVE, fresh=True), slow=True),
    "Ctrl-C twice": Row(signalled_twice, slow=True),
    # disks
    "a small disk": Row(tiny_disk, slow=True),
    "full disk at the arrays": Row(full_disk(SAVE), slow=True),
    "full disk at a manifest": Row(full_disk(f"{FILES}:write_manifest"), slow=True),
    "full disk at metrics.jsonl": Row(full_disk("nextllm_jax.storage.disk:Disk.append", 3), slow=True),
    "checkpoints removed while training": Row(checkpoints_removed, "no checkpoint in", refuses=True, slow=True),
    "run removed while training": Row(run_removed, slow=True),
    # damage to the latest checkpoint
    "bit flipped in an array": Row(checkpoint(flip, "params/d/*"), "damaged \\(params/d/"),
    "bit flipped in the optimizer's state": Row(checkpoint(flip, "rest/d/*"), "damaged \\(rest/d/", slow=True),
    "bit flipped in orbax's metadata": Row(checkpoint(flip, "params/_METADATA"), "params/_METADATA", slow=True),
    "bit flipped in the array index": Row(checkpoint(flip, "params/manifest.ocdbt"), "manifest.ocdbt", slow=True),
    "bit flipped in the manifest": Row(checkpoint(flip, "manifest.json"), "manifest.json", slow=True),
    "an array file cut short": Row(checkpoint(truncate, "params/d/*"), "params/d/", slow=True),
    "an array file emptied": Row(checkpoint(empty, "rest/d/*"), "rest/d/", slow=True),
    "an array file removed": Row(checkpoint(remove, "params/d/*"), "params/d/.* is missing", slow=True),
    "the manifest emptied": Row(checkpoint(empty, "manifest.json"), "manifest.json is empty", slow=True),
    "the manifest removed": Row(checkpoint(remove, "manifest.json"), "manifest.json is missing", slow=True),
    # damage to the run's other files
    "half a line in metrics.jsonl": Row(half_a_line, slow=True),
    "the run's tokenizer emptied": Row(lambda case: empty(case.run / "tokenizer" / "encoding.json"), slow=True),
    "config.json emptied": Row(lambda case: empty(case.run / "config.json"), "config.json", refuses=True),
    "config.json removed": Row(lambda case: remove(case.run / "config.json"), "not a run", refuses=True, slow=True),
    # damage to the data
    "bit flipped in a shard": Row(shard(flip, "train-*.bin"), "train-00000.bin", refuses=True),
    "a shard cut short": Row(shard(truncate, "train-*.bin"), "train-00000.bin", refuses=True, slow=True),
    "a shard emptied": Row(shard(empty, "validation-*.bin"), "validation-00000.bin", refuses=True, slow=True),
    "a shard removed": Row(shard(remove, "train-*.bin"), "train-00000.bin", refuses=True, slow=True),
    "shards swapped": Row(swap_shards, "(train|validation)-00000.bin", refuses=True, slow=True),
    "bit flipped in the document index": Row(
        shard(flip, "train-documents.npy"), "train-documents.npy", refuses=True, slow=True
    ),
    "the index cut short": Row(shard(truncate, "index.json"), "index.json", refuses=True, slow=True),
    "bit flipped in the data's tokenizer": Row(shard(flip, "tokenizer/ranks-*"), "ranks-", refuses=True, slow=True),
    "another tokenizer in the data": Row(other_tokenizer, "tokenizer", refuses=True),
    # the clock
    "the clock is set back while training": Row(clock_set_back, slow=True),
    "files from tomorrow": Row(files_of_tomorrow, slow=True),
}


@pytest.fixture(scope="session")
def stopped(trained, tmp_path_factory) -> Path:
    """The run directory of a training that a signal stopped at about step 30."""
    directory = tmp_path_factory.mktemp("stopped")
    code, output = interrupt(trained.beside(directory), "SIGTERM", 30)
    assert code == 75, output
    return directory / "runs" / "config"


@pytest.fixture
def case(trained, stopped, tmp_path) -> Case:
    door = trained.beside(tmp_path)
    (tmp_path / "data").unlink()
    shutil.copytree(trained.directory / "data", tmp_path / "data", symlinks=True)
    shutil.copytree(stopped, tmp_path / "runs" / "config")
    return Case(door)


def named(slow: bool) -> list:
    return [name for name, row in ROWS.items() if row.slow == slow]


@pytest.mark.parametrize("name", [*named(False), *(pytest.param(name, marks=pytest.mark.slow) for name in named(True))])
def test_fault(trained, case, name):
    row = ROWS[name]
    row.harm(case)
    if row.refuses:
        before = contents(case.door.directory)
        output = case.train(exit_code=2)
        assert contents(case.door.directory) == before
    else:
        output = case.train()
        assert_same_end(case.run, trained.directory / "runs" / "config", STEPS)
    assert re.search(row.says, output), output
