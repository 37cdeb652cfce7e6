"""What runs of train.py left behind, compared; and a run that is interrupted at a step of its own."""

import json
import re
from pathlib import Path

import jax
import numpy as np
from orbax import checkpoint as ocp

from nextllm_jax.storage.open_storage import open_storage
from tests.conftest import ROOT

INJECT = Path(__file__).parent / "faults" / "inject.py"
TRAINED_A_STEP = "nextllm_jax.training.writers:MetricsWriter.train"  # called after each step of the test's config


def metrics(directory, split):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def contents(directory):
    """Every file below a directory but locks, by path."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


def fetched(address, directory):
    """A run in a bucket, copied to the directory as if it had been trained there."""
    storage = open_storage(address)
    for name in storage.files():
        file = directory / re.sub(r"^(checkpoints/\d+)/attempt-[0-9a-f]+/", r"\1/", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(storage.read(name))
    return directory


def saved_arrays(run, step):
    """Every array of a checkpoint, by path."""
    items = []
    for name in ("params", "rest"):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            path = run / "checkpoints" / str(step) / name
            tree = checkpointer.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)  # of any processes
            items.append(checkpointer.restore(path, restore_args=as_numpy))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(items)}


def assert_same_end(one, other, step):
    assert [line["loss"] for line in metrics(one, "train")] == [line["loss"] for line in metrics(other, "train")]
    scores = [[(line["step"], line["loss"]) for line in metrics(run, "validation")] for run in (one, other)]
    assert scores[0] == scores[1]
    arrays, others = saved_arrays(one, step), saved_arrays(other, step)
    assert arrays.keys() == others.keys()
    for path in arrays:
        np.testing.assert_array_equal(arrays[path], others[path], err_msg=path)
    assert (one / "samples.txt").read_text() == (other / "samples.txt").read_text()


def interrupt(door, fault, steps, *arguments):
    """Train with a fault of inject.py, such as a signal, after so many steps; exit code and output."""
    process = door.start(INJECT, fault, TRAINED_A_STEP, steps, ROOT / "train.py", "--config", "config.py", *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err
