"""Opens and locks a run directory for training, and makes sure that no existing run is lost by mistake.

`require_usable` checks the directory twice: in `launch`, before data is prepared, to report errors early; and in
`open_run`, under the run's lock, since another training may change the directory until then.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Collection, Iterator, Sequence

from nextllm_jax.checkpoint import scratch, step_files
from nextllm_jax.checkpoint.run_dir import CONFIG, METRICS, RunDir
from nextllm_jax.config import Config
from nextllm_jax.config.files import workdir_of
from nextllm_jax.distributed.process_group import ProcessGroup
from nextllm_jax.errors import InputError
from nextllm_jax.storage.interface import StorageError
from nextllm_jax.training.resume_guard import Change, require_resumable


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run directory that is locked for this training."""

    dir: RunDir
    set_aside: os.PathLike[str] | None = None
    """The directory with the files of an overwritten run."""
    changes: Sequence[Change] = ()
    """Config fields that changed in a resumed run, and that the user allowed to change."""


@contextlib.contextmanager
def open_run(
    workdir: str | os.PathLike[str],
    config: Config,
    *,
    overwrite: bool = False,
    allow_change: Collection[str] = (),
    group: ProcessGroup | None = None,
) -> Iterator[OpenRun]:
    """The run in `workdir`, new or resumed, locked until the context ends so that no second training uses it.

    For a new run, writes config.json. A resumed run keeps its config.json; the caller replaces it after other checks.
    `overwrite` moves the run's files to overwritten/<n> and does not touch other files. Every process of `group` must
    call this; process 0 does the work. On a file system without locks, nothing is locked.

    Raises InputError as `require_usable` does, and if another process trains in the directory.
    """
    run, group = RunDir(workdir), group or ProcessGroup()
    if group.process_id != 0:
        group.gather(None)
        if not run.exists():
            raise InputError(
                f"process {group.process_id} does not see {run.path / CONFIG}, which process 0 wrote; set --workdir "
                "to a directory that all processes share"
            )
        yield OpenRun(run)
        return
    with contextlib.ExitStack() as stack:
        try:
            run.require_run_or_empty()  # before locking, which would write a file into another program's directory
            stack.enter_context(run.lock())
            opened = _take_over(run, config, overwrite, allow_change)
            run.create_checkpoints()  # from now on, a run without this directory has lost its checkpoints
            if config.checkpoint.scratch is not None:
                scratch.use(run.checkpoints, config.checkpoint.scratch)
        except StorageError:
            raise
        except OSError as error:
            raise InputError(
                f"run directory {run.path} cannot be used ({error.strerror or error}); "
                "choose another --workdir, or make it writable"
            ) from error
        group.gather(None)
        yield opened


def _take_over(run: RunDir, config: Config, overwrite: bool, allow_change: Collection[str]) -> OpenRun:
    """Start or resume the run of `config` in the directory."""
    changes, is_new = require_usable(run, config, overwrite=overwrite, allow_change=allow_change), not run.exists()
    if not (is_new or overwrite):
        return OpenRun(run, changes=changes)
    set_aside = None if is_new else run.set_aside()
    run.write_config(config)
    return OpenRun(run, set_aside)


def require_startable(config: Config, *, overwrite: bool, allow_change: Collection[str]) -> list[Change]:
    """`require_usable` for the config's run directory.

    Also raises InputError if a process trains in it, or if a tracker cannot be used.
    """
    if config.logging.trackers:
        from nextllm_jax.training import trackers  # imports jax, which other runs do not need yet

        trackers.require_usable(config.logging.trackers)
    run = RunDir(workdir_of(config))
    run.require_unlocked()
    return require_usable(run, config, overwrite=overwrite, allow_change=allow_change)


def require_usable(run: RunDir, config: Config, *, overwrite: bool, allow_change: Collection[str]) -> list[Change]:
    """Raise InputError if `config` cannot be trained in a directory, either as a new run or as a resumed one.

    Raises if the directory is neither empty nor a run, if the config differs in a field that may not change, if the
    run is past training.steps, if checkpoints or frozen base weights are missing, or if a file is not writable. Returns
    the changes of a resumed run that `allow_change` permits.
    """
    run.require_run_or_empty()
    scratch.require_usable(run.checkpoints, config.checkpoint.scratch)
    if overwrite or not run.exists():
        return []
    run.require_writable()
    run.require_no_interrupted_overwrite()
    changes = require_resumable(run, config, allow_change)
    saved = step_files.saved_steps(*scratch.directories(run.checkpoints))
    if not saved:
        _require_nothing_lost(run)
    elif max(saved) > config.training.steps:
        raise InputError(
            f"the run in {run.path} is already at step {max(saved)}, beyond training.steps {config.training.steps}; "
            "raise training.steps"
        )
    elif config.lora.rank:
        from nextllm_jax.checkpoint.base import base_id  # imports jax, which other runs do not need yet

        base_id(run)
    return changes


def _require_nothing_lost(run: RunDir) -> None:
    """Raise InputError if there is no checkpoint but metrics.jsonl shows that there must have been one.

    A save is certain to be complete once the next save is due.
    """
    config, last = run.read_config(), None
    for line in run.read(METRICS).splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # an incomplete line of a killed process
            last = int(json.loads(line)["step"])
    first_save = min(config.checkpoint.every_steps, config.training.evaluate_every_steps)
    certain = 0 if config.init_from is not None else 2 * first_save
    if last is not None and (last > certain or not run.checkpoints.exists()):
        raise InputError(
            f"{run.path} has metrics up to step {last}, but no checkpoint in {run.checkpoints}; restore that "
            "directory (is its disk mounted?), or start over with --overwrite"
        )
