"""Proves on this machine that an interrupted training gives the same result as an uninterrupted one, bit for bit.

Both are real processes of `nextllm train`. One is killed in the middle with SIGKILL, and then resumed.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.run_dir import METRICS, SAMPLES, RunDir
from nextllm_jax.config import Config, EvaluationConfig, LoggingConfig
from nextllm_jax.data.prepare import ensure_prepared
from nextllm_jax.data.shards import DataPath
from nextllm_jax.data.sources import source_paths, with_source_paths
from nextllm_jax.errors import InputError, RunFailed
from nextllm_jax.sharding import make_mesh
from nextllm_jax.training.program import build_program, to_save
from nextllm_jax.training.vocabulary import with_vocab_size

_log = logging.getLogger(__name__)

FEWEST_STEPS = 8
_CONFIG_FILE = """from nextllm_jax.config.files import read_config


def get_config():
    return read_config(__file__.removesuffix(".py") + ".json")
"""
_COMPARED = ("step", "split", "loss", "learning_rate", "grad_norm", "tokens_seen")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The hashes of one result of both trainings."""

    name: str
    uninterrupted: str
    interrupted: str
    remark: str = ""

    @property
    def equal(self) -> bool:
        """Whether the two hashes are equal."""
        return self.uninterrupted == self.interrupted

    def __str__(self) -> str:
        verdict = "equal" if self.equal else f"NOT EQUAL{self.remark}"
        return f"{self.name:18} {self.uninterrupted:18} {self.interrupted:18} {verdict}"


def prove(config: Config, *, steps: int) -> list[Comparison]:
    """Train `config` for `steps` steps twice, once with a kill in the middle, and compare the results.

    If the data is not prepared, it is prepared where `train.py` would do it; everything else is written to a temporary
    directory. Raises InputError for too few steps, and RunFailed if a training fails by itself.
    """
    if steps < FEWEST_STEPS:
        raise InputError(f"--steps is {steps}; it must be at least {FEWEST_STEPS}, for a kill in the middle")
    data = [path.absolute() for path in source_paths(config.data, ensure_prepared)]
    config = with_vocab_size(_shortened(config, steps, data), data[0], overwrite=True)
    with tempfile.TemporaryDirectory(prefix="nextllm-resume-proof-") as name:
        directory = Path(name)
        (directory / "proof.py").write_text(_CONFIG_FILE)
        (directory / "proof.json").write_text(config.to_json())
        straight, broken = RunDir(directory / "uninterrupted"), RunDir(directory / "interrupted")
        _log.info("training %d steps", steps)
        _train(directory, straight)
        _log.info("training %d steps again, with kill -9 in the middle", steps)
        step = _last_step(_train(directory, broken, kill_after=max(2 * steps // 5, config.checkpoint.every_steps + 1)))
        saved = Checkpoints(broken.checkpoints).latest_step()
        _log.info("killed at step %d; the last checkpoint is step %d; running it again", step, saved)
        if f"continuing from step {saved} of" not in _train(directory, broken):
            raise RunFailed(f"the training did not continue from its checkpoint of step {saved}")
        return compare(config, straight, broken)


def _shortened(config: Config, steps: int, data: Sequence[DataPath]) -> Config:
    """The config with only `steps` steps of its schedule, all logged, one evaluation and a few checkpoints."""
    length = config.optimizer.schedule_length(config.training.steps)
    training = dataclasses.replace(config.training, steps=steps, log_every_steps=1, evaluate_every_steps=steps)
    return dataclasses.replace(
        config,
        workdir=None,
        data=with_source_paths(config.data, [str(path) for path in data]),
        optimizer=dataclasses.replace(config.optimizer, schedule_steps=length),
        training=training,
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=steps // 4, scratch=None),
        evaluation=EvaluationConfig(),
        logging=LoggingConfig(),
    )


def _train(directory: Path, run: RunDir, *, kill_after: int | None = None) -> str:
    """Run `nextllm train` and return its output. With `kill_after`, kill it once it has passed that step and has saved.

    Raises RunFailed if it exits in any other way.
    """
    root = Path(__file__).resolve().parent.parent.parent
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    output = ""
    with subprocess.Popen(
        [sys.executable, "-m", "nextllm_jax.cli", "train", "--config", directory / "proof.py", "--workdir", run.path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                output += line
                passed = kill_after is not None and _last_step(line) >= kill_after
                if passed and Checkpoints(run.checkpoints).steps():
                    process.kill()
        except BaseException:  # also for Ctrl-C, so no training process is left behind
            process.kill()
            raise
    if kill_after is not None and process.returncode == 0:
        raise RunFailed("the training ended before it had saved a checkpoint and could be killed; raise --steps")
    if process.returncode != (0 if kill_after is None else -signal.SIGKILL):
        last = "".join(output.splitlines(keepends=True)[-3:]).strip()
        raise RunFailed(f"the training in {run.path} ended with exit code {process.returncode}: {last}")
    return output


def _last_step(output: str) -> int:
    """The last step that training reported; 0 if none."""
    return max(map(int, re.findall(r"^step (\d+)/", output, re.MULTILINE)), default=0)


def compare(config: Config, straight: RunDir, broken: RunDir) -> list[Comparison]:
    """Compare the results of two runs of `config`: losses, parameters, optimizer state and samples."""
    lines = [list(_losses(run)) for run in (straight, broken)]
    first = next((a[0] for a, b in zip(*lines, strict=False) if a != b), min(map(len, lines)) + 1)
    hashes = [_hash(json.dumps(each).encode()) for each in lines]
    comparisons = [Comparison("per-step losses", hashes[0], hashes[1], f", first at step {first}")]
    program = build_program(config, make_mesh(config.mesh))
    items, _ = to_save(program.abstract_state)
    for name, item in (("parameters", "params"), ("optimizer state", "rest")):
        trees = [
            Checkpoints(run.checkpoints).restore(config.training.steps, item, items[item]) for run in (straight, broken)
        ]
        comparisons.append(Comparison(name, *map(hash_of_arrays, trees)))
    samples = [run.read(SAMPLES) for run in (straight, broken)]
    comparisons.append(Comparison("sampled text", *(_hash(text) if text else "none" for text in samples)))
    return comparisons


def _losses(run: RunDir) -> Iterator[list[Any]]:
    """The values of each step in metrics.jsonl that do not depend on time, beginning with the step."""
    for line in run.read(METRICS).splitlines():
        record = json.loads(line)
        yield [record[name] for name in _COMPARED]


def hash_of_arrays(tree: Any) -> str:
    """A hash of the names, types, shapes and bits of all arrays of a tree. It does not depend on their sharding."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
