"""The frozen base weights of a run with adapters. They are saved once, since its checkpoints hold only the adapters."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from nextllm_jax.checkpoint import orbax_errors, step_files
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.manifest import MANIFEST
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.checkpoint.saved_steps import DamagedCheckpoint, SavedSteps
from nextllm_jax.errors import InputError

RECORD = "base"
"""Key in the record of each checkpoint: the `base_id` of the frozen base weights that its adapters were trained on."""


def save_base(run: RunDir, params: Any) -> None:
    """Save a run's frozen base weights, and wait until they are complete. Every process must call it."""
    if jax.process_index() == 0 and (run.base / "0").exists():  # left by an interrupted start
        with orbax_errors.writing(run.base):
            step_files.delete(run.base / "0")
    ocp.utils.sync_global_processes("base")
    with Checkpoints(run.base, guard=run.sync) as checkpoints:
        checkpoints.save(0, {"params": params}, {}, validation_loss=None)


def base_id(run: RunDir) -> str:
    """A hash of the manifest of a run's frozen base weights, which contains the hash of each file.

    Raises InputError if the manifest cannot be read.
    """
    manifest = run.base / "0" / MANIFEST
    try:
        return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(
            f"{manifest} cannot be read ({error.strerror or error}), so the adapters' base weights are missing; "
            f"restore {manifest.parent}"
        ) from error


def restore_base(checkpoints: SavedSteps, step: int, abstract: Any) -> Any:
    """The frozen base weights for the adapters of a step, with the types and shardings of `abstract`.

    Raises InputError if they are damaged, or are not the ones that the adapters were trained on.
    """
    (tree,) = base_parts(checkpoints, step, abstract, [abstract])
    return tree


def base_parts(checkpoints: SavedSteps, step: int, abstract: Any, parts: Iterable[Any]) -> Iterator[Any]:
    """The parts of what `restore_base` returns, one after another; see `SavedSteps.restore_parts`."""
    run = RunDir(checkpoints.directory.parent)
    found, recorded = base_id(run), checkpoints.record(step).get(RECORD)
    if recorded != found:
        raise InputError(
            f"{run.base} holds other base weights ({found}) than the adapters of checkpoint {step} were trained on "
            f"({recorded}); restore the original files"
        )
    try:
        yield from SavedSteps(run.base).restore_parts(0, "params", abstract, parts)
    except DamagedCheckpoint as error:  # raised as InputError, since no checkpoint of the run is damaged
        raise InputError(f"the adapters' frozen base weights are damaged: {error}; restore {run.base}") from error
    except InputError as error:
        raise InputError(f"the adapters' frozen base weights cannot be used: {error}") from error
