"""Who may train in a run directory, and that a training never loses what is there by mistake.

A run directory is checked twice, by `require_usable`. `launch` checks it before data is prepared, to report mistakes
at once. `open_run` checks it again under the run's lock, because until then another training may change it.
"""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator, Sequence

from etils import epath

from nextllm_jax.checkpoint import step_files
from nextllm_jax.checkpoint.run_dir import CONFIG, METRICS, RunDir
from nextllm_jax.config import Config
from nextllm_jax.config.files import local_workdir
from nextllm_jax.distributed.process_group import Group
from nextllm_jax.errors import InputError
from nextllm_jax.training.resume_guard import Change, require_resumable


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run directory that belongs to this training."""

    dir: RunDir
    set_aside: epath.Path | None = None
    """Where the files of an overwritten run went."""
    changes: Sequence[Change] = ()
    """Changed fields of a continued run, which the user allowed."""


@contextlib.contextmanager
def open_run(
    workdir: epath.PathLike,
    config: Config,
    *,
    overwrite: bool = False,
    allow_change: Collection[str] = (),
    group: Group | None = None,
) -> Iterator[OpenRun]:
    """The run in `workdir`, new or continued, locked against a second training until the context ends.

    Writes the config to config.json of a new run; a continued run keeps its own, which the caller replaces once its
    other checks have passed. `overwrite` moves the run's files to overwritten/<n> and leaves other files alone. Every
    process of `group` calls this; process 0 does the work. On a file system without locks nothing is locked.

    Raises InputError as `require_usable` does, and for a run that another process trains.
    """
    run, group = RunDir(workdir), group or Group()
    if group.process_id != 0:
        group.gather(None)
        if not run.exists():
            raise InputError(
                f"process {group.process_id} does not see {run.path / CONFIG}, which process 0 wrote; --workdir must "
                "name a directory that all processes share"
            )
        yield OpenRun(run)
        return
    with contextlib.ExitStack() as stack:
        try:
            run.require_run_or_empty()  # before there is a lock: nothing is written into another program's directory
            stack.enter_context(run.lock())
            opened = _take_over(run, config, overwrite, allow_change)
            run.checkpoints.mkdir(exist_ok=True)  # from here on, a run without it has lost its checkpoints
        except OSError as error:
            raise InputError(
                f"run directory {run.path} cannot be used ({error.strerror or error}); "
                "choose another --workdir, or make it writable"
            ) from error
        group.gather(None)
        yield opened


def _take_over(run: RunDir, config: Config, overwrite: bool, allow_change: Collection[str]) -> OpenRun:
    """Begin or continue the run of `config` in the directory."""
    changes, is_new = require_usable(run, config, overwrite=overwrite, allow_change=allow_change), not run.exists()
    if not (is_new or overwrite):
        return OpenRun(run, changes=changes)
    set_aside = None if is_new else run.set_aside()
    run.write_config(config)
    return OpenRun(run, set_aside)


def require_startable(config: Config, *, overwrite: bool, allow_change: Collection[str]) -> list[Change]:
    """`require_usable` of the config's run directory, where no process may be training."""
    run = RunDir(local_workdir(config))
    run.require_unlocked()
    return require_usable(run, config, overwrite=overwrite, allow_change=allow_change)


def require_usable(run: RunDir, config: Config, *, overwrite: bool, allow_change: Collection[str]) -> list[Change]:
    """Raise InputError if `config` cannot be trained in a directory, as a new run or as one that is continued.

    Raises if the directory is neither empty nor a run, if the config differs in a field that may not change, if the
    run is past training.steps, if checkpoints or base weights are missing, or if a file is not writable. Returns the
    changes of a continued run that `allow_change` permits.
    """
    run.require_run_or_empty()
    if overwrite or not run.exists():
        return []
    run.require_writable()
    run.require_no_interrupted_overwrite()
    changes = require_resumable(run, config, allow_change)
    saved = step_files.saved_steps(run.checkpoints)
    if not saved:
        _require_nothing_lost(run)
    elif max(saved) > config.training.steps:
        raise InputError(f"the run is at step {max(saved)} already, beyond training.steps {config.training.steps}")
    elif config.lora.rank:
        from nextllm_jax.checkpoint.base import base_id  # imports jax, which other runs do not need yet

        base_id(run)
    return changes


def _require_nothing_lost(run: RunDir) -> None:
    """Raise InputError if metrics.jsonl shows that a checkpoint must have existed and none does.

    A save is certain to be complete once the next one was due.
    """
    config, last = run.read_config(), None
    for line in run.read(METRICS).splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line of a process that was killed
            last = int(json.loads(line)["step"])
    first_save = min(config.checkpoint.every_steps, config.training.evaluate_every_steps)
    certain = 0 if config.init_from is not None else 2 * first_save
    if last is not None and (last > certain or not run.checkpoints.exists()):
        raise InputError(
            f"{run.path} has metrics up to step {last}, but no checkpoint in {run.checkpoints}; restore that "
            "directory (is its disk mounted?), or start over with --overwrite"
        )
