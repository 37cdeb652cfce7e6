"""The frozen weights of a run with adapters: saved once, beside its checkpoints, which hold the adapters alone."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from nextllm_jax.checkpoint import orbax_errors, step_files
from nextllm_jax.checkpoint.manager import Checkpoints, DamagedCheckpoint
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.errors import InputError

RECORD = "base"
"""Name, in the record of each checkpoint, of the identity of the base that its adapters belong to."""


def save_base(run: RunDir, params: Any) -> None:
    """Write a run's base; returns when it is whole. Every process calls it."""
    if jax.process_index() == 0 and (run.base / "0").exists():  # of a start that was interrupted
        with orbax_errors.writing(run.base):
            step_files.delete(run.base / "0")
    ocp.utils.sync_global_processes("base")
    with Checkpoints(run.base) as checkpoints:
        checkpoints.save(0, {"params": params}, {}, validation_loss=None)


def base_id(run: RunDir) -> str:
    """A hash of the manifest of a run's frozen base weights, which holds the hash of each file. Raises InputError."""
    manifest = run.base / "0" / step_files.MANIFEST
    try:
        return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(
            f"{manifest} cannot be read ({error.strerror or error}), so the adapters' base weights are missing; "
            f"restore {manifest.parent}"
        ) from error


def restore_base(checkpoints: Checkpoints, step: int, abstract: Any) -> Any:
    """The frozen weights below the adapters of a step, in the types and places of `abstract`.

    Raises InputError if they are damaged, or not those that the adapters were trained on.
    """
    (tree,) = base_parts(checkpoints, step, abstract, [abstract])
    return tree


def base_parts(checkpoints: Checkpoints, step: int, abstract: Any, parts: Iterable[Any]) -> Iterator[Any]:
    """As `restore_base`, in parts: see `Checkpoints.restore_parts`."""
    run = RunDir(checkpoints.directory.parent)
    found, recorded = base_id(run), checkpoints.record(step).get(RECORD)
    if recorded != found:
        raise InputError(
            f"{run.base} holds other weights ({found}) than the adapters of checkpoint {step} were trained on "
            f"({recorded}); restore the run's own"
        )
    try:
        yield from Checkpoints(run.base).restore_parts(0, "params", abstract, parts)
    except DamagedCheckpoint as error:  # no longer of that kind: no checkpoint of the run is to blame
        raise InputError(f"the frozen weights below the adapters are lost: {error}; restore {run.base}") from error
    except InputError as error:
        raise InputError(f"the frozen weights below the adapters cannot be used: {error}") from error
