"""What runs of train.py left behind, compared; and a run that gets a signal."""

import json
import re
import time

import jax
import numpy as np
from orbax import checkpoint as ocp


def metrics(directory, split):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def contents(directory):
    """Every file below a directory but locks, by path."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


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


def interrupt(door, pattern, number, *arguments, times=1):
    """Start training, send the signal once a line of output matches, and return exit code and output."""
    process = door.start("train.py", "--config", "config.py", *arguments)
    seen = ""
    for line in process.stdout:
        seen += line
        if re.search(pattern, line):
            for _ in range(times):
                process.send_signal(number)
                time.sleep(0.02)
            break
    out, err = process.communicate(timeout=120)
    return process.returncode, seen + out + err
