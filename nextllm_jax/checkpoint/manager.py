"""Saves and restores the checkpoints of a run in the background, and decides which ones are kept.

Orbax writes the arrays of a step under a temporary name. A thread then commits them: on disk it hashes the files,
writes a manifest with the hashes and the validation loss, reads everything back, and renames the directory to the step;
in a bucket it writes a manifest with the service's checksums (see step_files.py). Older steps are deleted only after
that. Restoring compares the arrays with checksums that were computed before they were written (verified_read.py).

The latest and the best step are determined only from the steps in the directory. Orbax's CheckpointManager ranks steps
by metrics stored elsewhere, and counts an empty directory named by a number as a step.
"""

import concurrent.futures
import contextlib
import errno
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import jax
import orbax.checkpoint as ocp
from etils import epath

from nextllm_jax.checkpoint import orbax_errors, step_files
from nextllm_jax.checkpoint.leaves import finish_checksums, leaves_of, mismatch, start_checksums
from nextllm_jax.checkpoint.manifest import CHECKSUMS, FORMAT, MANIFEST, DamagedFile, UnknownManifest, read_manifest
from nextllm_jax.checkpoint.verified_read import DamagedItem, UnreadableItem, first_found, read_item
from nextllm_jax.errors import InputError, RunFailed
from nextllm_jax.storage.open_storage import as_path

_log = logging.getLogger(__name__)


class DamagedCheckpoint(InputError):
    """Files of `step` are missing or damaged. `Checkpoints.set_aside(step)` moves the checkpoint out of the way."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


def _finite(loss: float | None) -> float | None:
    return float(loss) if loss is not None and math.isfinite(loss) else None


class Checkpoints:
    """The checkpoints in a directory.

    The constructor reads and writes nothing, so a run can be inspected while it trains. Multiple processes must all
    make the same calls in the same order, on shared storage.

    The latest `keep_last`, the best, those at multiples of `keep_every_steps` (0: none) and the pinned checkpoints are
    kept. `run` is JSON about the run that is stored in each manifest for people to read. `guard` is called before each
    change, and raises OSError if this process may not change anything, since another one took over the run.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep_last: int = 1,
        keep_every_steps: int = 0,
        run: dict[str, Any] | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory, self._guard = as_path(directory).absolute(), guard
        self._keep_last, self._keep_every_steps, self._run = keep_last, keep_every_steps, run or {}
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._background: concurrent.futures.ThreadPoolExecutor | None = None
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        self._warned: set[epath.Path] = set()
        self.fastest_save_seconds: float | None = None
        """The shortest time from the call of `save` until the step was committed; None before the first."""

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
            return
        # Other processes may not be here, so finish this process's part of the save, and nothing that needs all.
        step, saved = self._saving or (0, None)
        if saved and (failure := saved.exception()):
            _log.error(self._sentence(step, failure))  # `error` still propagates
        self._saving = None
        self._let_go()

    @property
    def directory(self) -> epath.Path:
        """The directory that contains the steps."""
        return self._directory

    def _path(self, step: int) -> epath.Path:
        return self._directory / str(step)

    def steps(self) -> list[int]:
        """The saved steps, sorted, including damaged ones but not unfinished saves."""
        return step_files.saved_steps(self._directory)

    def latest_step(self) -> int | None:
        """The highest step."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the lowest finite validation loss, the earliest one if several are equal; None without any.

        A step whose manifest cannot be read is left out, with a warning.
        """
        return step_files.best(self._losses())

    def _losses(self) -> dict[int, float | None]:
        """The validation loss of each step with a readable manifest, in the order of the steps."""
        losses = {}
        for step in self.steps():
            try:
                losses[step] = self.validation_loss(step)
            except InputError as error:
                # No warning if a training process has just deleted it.
                if self._path(step).exists() and jax.process_index() == 0:
                    self._warn_once(self._path(step), str(error))
        return losses

    def _warn_once(self, path: epath.Path, message: str) -> None:
        if path not in self._warned:
            self._warned.add(path)
            _log.warning(message)

    def validation_loss(self, step: int) -> float | None:
        """The validation loss that a step was saved with; None if there was none or it was not finite."""
        return self._manifest(step)["validation_loss"]

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record that a step was saved with."""
        return self._manifest(step)["record"]

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            return read_manifest(self._path(step))
        except UnknownManifest as error:
            raise InputError(self._unusable(step, f"cannot be read ({error})")) from error
        except DamagedFile as damage:
            raise DamagedCheckpoint(step, self._unusable(step, f"is damaged ({damage})")) from damage
        except OSError as error:
            cause = f"cannot be read ({MANIFEST}: {orbax_errors.cause(error)})"
            raise InputError(self._unusable(step, cause)) from error

    def _unusable(self, step: int, why: str) -> str:
        """The error message for a step that cannot be used."""
        others = ", ".join(str(other) for other in self.steps() if other != step)
        fix = f"use another step: {others}" if others else "there is no other step"
        return f"checkpoint {self._path(step)} {why}; {fix}"

    def resolve(self, step: str | int | None) -> int:
        """The step that "latest", "best" or a number names. None: the best, or the latest if none has a loss.

        Raises InputError, which names the directory and its steps, if there is no such step. Raises DamagedCheckpoint
        if the best step is unknown because the manifest of a step is damaged.
        """
        steps = self.steps()
        if not steps:
            raise InputError(f"{self._directory} holds no complete checkpoint; train first, or check the path")
        there = f"its steps are {', '.join(map(str, steps))}"
        if step is None:
            step = "latest" if self.best_step() is None else "best"
        if step == "latest":
            return steps[-1]
        if step == "best":
            losses = self._losses()
            for unknown in sorted(set(self.steps()) - losses.keys()):
                self._manifest(unknown)
            if (best := step_files.best(losses)) is None:
                raise InputError(f"no checkpoint in {self._directory} has a validation loss; use latest ({there})")
            return best
        number = int(step) if str(step).isdecimal() else None
        if number not in steps:
            raise InputError(f"{self._directory} has no checkpoint '{step}'; use latest, best or a step ({there})")
        return number

    def restore(self, step: int, name: str, abstract: Any) -> Any:
        """The tree saved at `step` under `name`, with the shardings of `abstract`.

        `abstract` is the tree with a sharded ShapeDtypeStruct at each leaf. Raises InputError, which names the leaf, if
        its structure, dtypes or shapes differ from the saved ones. Raises DamagedCheckpoint, which names the file or
        the array, if what is restored is not what was saved.
        """
        (tree,) = self.restore_parts(step, name, abstract, [abstract])
        return tree

    def restore_parts(self, step: int, name: str, abstract: Any, parts: Iterable[Any]) -> Iterator[Any]:
        """Parts of that tree, one after another. Each of `parts` is `abstract` with leaves.PLACEHOLDER elsewhere."""
        step = self.resolve(step)
        manifest = self._manifest(step)
        if name not in (saved := manifest["items"]):
            raise InputError(f"checkpoint {self._path(step)} has no {name}; it has {', '.join(saved)}")
        if difference := mismatch(saved[name], leaves_of(abstract)):
            path = f"checkpoint {self._path(step)}"
            raise InputError(f"{path} does not fit ({name}: {difference}); use the config that it was saved with")
        orbax_errors.silence_tracebacks()
        try:
            yield from read_item(self._path(step), manifest, name, parts)
        except DamagedItem as damage:
            raise DamagedCheckpoint(step, self._unusable(step, f"is damaged ({damage})")) from damage
        except UnreadableItem as error:
            raise InputError(self._unusable(step, f"cannot be read ({name}: {error})")) from error

    def save(self, step: int, items: dict[str, Any], record: dict[str, Any], *, validation_loss: float | None) -> None:
        """Start saving a step. Returns once the arrays may be donated, before they are on disk.

        `items` are named trees of arrays; `record` is JSON. First waits for the previous save, and raises RunFailed if
        that failed. A step whose loss is not finite never counts as the best. Raises ValueError if the step is already
        saved, since replacing it would not be atomic.
        """
        self.wait()
        started = time.monotonic()
        if step in self.steps():
            raise ValueError(f"step {step} is already saved in {self._directory}")
        manifest = {
            "format": FORMAT,
            "step": step,
            "validation_loss": _finite(validation_loss),
            "items": {name: leaves_of(tree) for name, tree in items.items()},
            CHECKSUMS: {name: start_checksums(tree) for name, tree in items.items()},
            "record": record,
            "run": self._run,
            "versions": step_files.versions(),
        }
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        attempt = first_found(step_files.begin(self._directory, step) if jax.process_index() == 0 else "")
        try:
            checkpointer, background = self._open()
            checkpointer.save(self._directory / attempt, args=ocp.args.Composite(**trees), force=True)
        except OSError as error:
            self._failed(step, error)
        self._saving = step, background.submit(self._commit, step, checkpointer, attempt, manifest, started)

    def _open(self) -> tuple[ocp.AsyncCheckpointer, concurrent.futures.ThreadPoolExecutor]:
        """The objects that save, created at the first call. Raises FileNotFoundError if the directory has vanished."""
        if self._checkpointer is None or self._background is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                self._clean_up()
            orbax_errors.silence_tracebacks()
            # Orbax by default creates directories in threads; if that fails, other threads wait for them forever.
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            items = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=options))
            self._checkpointer = ocp.AsyncCheckpointer(items, async_options=options)
            self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        elif not self._directory.is_dir():  # orbax would create it, and the lost steps would go unnoticed
            raise FileNotFoundError(errno.ENOENT, "the directory is gone")
        return self._checkpointer, self._background

    def _commit(
        self, step: int, checkpointer: ocp.AsyncCheckpointer, attempt: str, manifest: dict[str, Any], started: float
    ) -> None:
        """Wait until all processes have written a step, then commit it. Runs in a thread."""
        checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            self._guard()
            checksums = {name: finish_checksums(parts) for name, parts in manifest[CHECKSUMS].items()}
            step_files.commit(self._directory, attempt, step, {**manifest, CHECKSUMS: checksums})
        seconds = time.monotonic() - started
        self.fastest_save_seconds = min(seconds, self.fastest_save_seconds or seconds)

    def check(self) -> None:
        """Raise RunFailed if the current save has already failed. Does not wait."""
        if self._saving and self._saving[1].done() and self._saving[1].exception():
            self.wait()

    def wait(self) -> None:
        """Wait until the current save is complete and verified, then delete checkpoints that are not kept.

        Raises RunFailed if the save failed; earlier checkpoints are kept. A checkpoint that cannot be deleted causes a
        warning, and the next save tries again.
        """
        if self._saving is None:
            return
        step, saved = self._saving
        error = saved.exception()  # for a full disk, tensorstore and asyncio raise many types of exceptions
        self._saving = None
        if error:
            self._failed(step, error)
        self._delete_superseded()

    def add_validation_loss(self, step: int, validation_loss: float, record: dict[str, Any]) -> None:
        """Atomically set the validation loss and the record of a saved step.

        Raises InputError if there is no such step, and RunFailed if the manifest cannot be written.
        """
        self.wait()
        self._manifest(self.resolve(step))  # raises InputError in every process
        if jax.process_index() == 0:
            with orbax_errors.writing(self._path(step) / MANIFEST):
                self._guard()
                changes = {"validation_loss": _finite(validation_loss), "record": record}
                step_files.change_manifest(self._path(step), changes)
        ocp.utils.sync_global_processes(f"added_validation_loss_{step}")
        self._delete_superseded()

    def pin(self, step: int) -> None:
        """Keep a saved step permanently. Deleting the file `pinned` in its directory undoes that.

        Raises InputError if there is no such step, and RunFailed if the file cannot be written.
        """
        step = self.resolve(step)
        if jax.process_index() == 0:
            with orbax_errors.writing(self._path(step) / step_files.PINNED):
                self._guard()
                (self._path(step) / step_files.PINNED).touch()
        ocp.utils.sync_global_processes(f"pinned_{step}")

    def close(self) -> None:
        """Wait for the current save, as `wait` does, and stop the threads."""
        try:
            self.wait()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._checkpointer is not None and self._background is not None:
            self._background.shutdown()
            with contextlib.suppress(Exception):  # after a failed save, whose error was already raised
                self._checkpointer.close()
            self._checkpointer = self._background = None

    def set_aside(self, step: int) -> epath.Path:
        """Rename a damaged step to <step>.damaged, which does not count as a checkpoint; returns the new path.

        Raises RunFailed if it cannot be renamed.
        """
        aside = self._path(step).with_suffix(step_files.DAMAGED)
        ocp.utils.sync_global_processes(f"damaged_{step}")  # all processes must have seen it before it is renamed
        if jax.process_index() == 0:
            with orbax_errors.writing(aside):
                self._guard()
                step_files.move_aside(self._path(step))
        ocp.utils.sync_global_processes(f"set_aside_{step}")
        return aside

    def _failed(self, step: int, error: BaseException) -> NoReturn:
        """Clean up after a failed save, and raise RunFailed."""
        self._let_go()
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                self._guard()  # without its lease, this process may not delete what another one is writing
                step_files.clean_up(self._directory)  # the next save deletes the rest
        raise RunFailed(self._sentence(step, error)) from error

    def _sentence(self, step: int, error: BaseException) -> str:
        try:
            latest = self.latest_step()
            state = f"the last checkpoint is step {latest}" if latest is not None else "there is no earlier checkpoint"
        except OSError:
            state = "the directory cannot be read either"
        return (
            f"step {step} could not be saved in {self._directory} ({orbax_errors.cause(error)}); {state}; "
            "make room or fix the directory, and run the same command again"
        )

    def _delete_superseded(self) -> None:
        if jax.process_index() == 0:
            try:
                self._guard()
                self._clean_up(self._superseded())
            except OSError as error:
                self._warn_once(self._directory, f"{self._directory} cannot be read ({orbax_errors.cause(error)})")
        ocp.utils.sync_global_processes("deleted_superseded")

    def _superseded(self) -> list[int]:
        """The steps that need not be kept. A step that cannot be read is kept, since it may be the best."""
        losses, every = self._losses(), self._keep_every_steps
        keep = {*list(losses)[-self._keep_last :], step_files.best(losses)}
        keep |= {step for step in losses if every and step and step % every == 0}
        keep |= {step for step in losses if (self._path(step) / step_files.PINNED).exists()}
        return [step for step in losses if step not in keep]

    def _clean_up(self, steps: Iterable[int] = ()) -> None:
        """Delete `steps` and the remains of interrupted saves and deletions. Warns about what cannot be deleted."""
        for path, error in step_files.clean_up(self._directory, map(self._path, steps)).items():
            self._warn_once(path, f"{path} cannot be deleted ({orbax_errors.cause(error)}); the next save tries again")
