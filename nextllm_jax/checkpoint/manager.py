"""Saves and restores the checkpoints of a run in the background, and decides which ones are kept.

Orbax writes the arrays of a step under a temporary name. A thread then commits them: on disk it hashes the files,
writes a manifest with the hashes and the validation loss, reads everything back, and renames the directory to the step;
in a bucket it writes a manifest with the service's checksums (see step_files.py). Older steps are deleted only after
that. Restoring compares the arrays with checksums that were computed before they were written (verified_read.py).

Whoever saves is blocked only while the arrays are copied to the host. The thread does whatever reads, writes or lists
files, since each request to a bucket takes tens of milliseconds.

The latest and the best step are determined only from the steps in the directory. Orbax's CheckpointManager ranks steps
by metrics stored elsewhere, and counts an empty directory named by a number as a step.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import jax
import orbax.checkpoint as ocp
from etils import epath

from nextllm_jax.checkpoint import orbax_errors, step_files
from nextllm_jax.checkpoint.background import Writer
from nextllm_jax.checkpoint.leaves import compile_checksums, finish_checksums, leaves_of, start_checksums
from nextllm_jax.checkpoint.manifest import CHECKSUMS, FORMAT, MANIFEST
from nextllm_jax.checkpoint.saved_steps import SavedSteps
from nextllm_jax.checkpoint.verified_read import first_found
from nextllm_jax.errors import InputError, RunFailed
from nextllm_jax.storage import costs
from nextllm_jax.storage.costs import Costs

_log = logging.getLogger(__name__)


def _finite(loss: float | None) -> float | None:
    return float(loss) if loss is not None and math.isfinite(loss) else None


class Checkpoints(SavedSteps):
    """The checkpoints in a directory, where this object also saves, deletes and changes them.

    The constructor reads and writes nothing. Multiple processes must all make the same calls in the same order, on
    shared storage.

    The latest `keep_last`, the best, those at multiples of `keep_every_steps` (0: none) and the pinned checkpoints are
    kept. `run` is JSON about the run that is stored in each manifest for people to read. `guard` is called before each
    change, and raises OSError if this process may not change anything, since another one took over the run.

    With `use_scratch`, rolling steps are saved in the current scratch directory (see scratch.py).
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep_last: int = 1,
        keep_every_steps: int = 0,
        use_scratch: bool = False,
        run: dict[str, Any] | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(directory)
        self._guard = guard
        self._keep_last, self._keep_every_steps, self._run = keep_last, keep_every_steps, run or {}
        self._use_scratch = use_scratch
        self._writer: Writer | None = None
        self._known: dict[int, float | None] | None = None
        """The validation loss of each step that was found when saving began or was saved since, also if deleted."""
        self._opening = threading.Lock()
        self._rolling: set[int] = set()
        """Those of these steps that are only in a scratch directory."""
        self.saves, self.spent = 0, Costs()
        """The number of steps that this object has saved, and the requests of this process meanwhile."""
        self.fastest_save_seconds: float | None = None
        """The shortest time from the call of `save` until the step was committed; None before the first."""

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
            return
        # Other processes may not be here, so finish this process's part of the save, and nothing that needs all.
        step, failure = (self._writer and self._writer.take()) or (0, None)
        if failure:
            _log.error(self._sentence(step, failure))  # `error` still propagates
        self._let_go()

    def is_saved(self, step: int) -> bool:
        """Whether a step is saved or being saved. Reads no files if this object has saved or prepared before."""
        return step in self._open()

    def is_rolling(self, step: int) -> bool:
        """Whether a saved step is only in a scratch directory, which may expire."""
        self._open()
        return step in self._rolling

    def is_best(self, loss: float) -> bool:
        """Whether a validation loss is lower than those of all saved steps. Reads no files, as `is_saved`."""
        losses = [each for each in self._open().values() if each is not None]
        return not losses or loss < min(losses)

    def prepare(self, items: dict[str, Any]) -> None:
        """Do in the background what the first `save` of such items would otherwise wait for."""

        def task() -> None:
            with contextlib.suppress(OSError, InputError):  # `save` tries again, and raises it
                self._open()

        for tree in items.values():
            compile_checksums(tree)
        self._started().submit(0, task)

    def save(
        self,
        step: int,
        items: dict[str, Any],
        record: dict[str, Any],
        *,
        validation_loss: float | None,
        rolling: bool = False,
    ) -> None:
        """Start saving a step. Returns once the arrays may be donated, before they are on disk.

        `items` are named trees of arrays; `record` is JSON. First waits for the previous save, and raises RunFailed if
        that failed. A step whose loss is not finite never counts as the best. With `use_scratch`, a `rolling` step is
        written to the scratch directory unless it is a milestone; it can be saved again to be kept. Raises ValueError
        if the step is saved otherwise, since replacing it would not be atomic.
        """
        self.wait()
        start = time.monotonic(), costs.total()
        try:
            known = self._open()
            if step in known and step not in self._rolling:
                raise ValueError(f"step {step} is already saved in {self._directory}")
            directory = self._directory
            if self._use_scratch and rolling and not self._is_milestone(step):
                directory = list(self._directories)[-1]
                directory.mkdir(parents=True, exist_ok=True)  # it may have expired
            attempt = first_found(step_files.begin(directory, step))
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
            writer = self._started()
            writer.write(directory / attempt, items)
        except OSError as error:
            self._failed(step, error)
        known[step] = _finite(validation_loss)
        (self._rolling.discard if directory == self._directory else self._rolling.add)(step)
        writer.submit(step, lambda: self._commit(writer, directory, attempt, step, manifest, start))

    def _open(self) -> dict[int, float | None]:
        """`_known`. At the first call, deletes what interrupted saves left behind, and reads all manifests."""
        with self._opening:  # `prepare` may be at it
            if self._known is None:
                self._directory.mkdir(parents=True, exist_ok=True)
                if jax.process_index() == 0:
                    self._clean_up()
                known = self._losses()
                self._rolling = {step for step in known if self.path(step).parent != self._directory}
                self._known = known
            return self._known

    def _started(self) -> Writer:
        if self._writer is None:
            self._writer = Writer(self._directory)
        return self._writer

    def _commit(
        self,
        writer: Writer,
        directory: epath.Path,
        attempt: str,
        step: int,
        manifest: dict[str, Any],
        start: tuple[float, Costs],
    ) -> None:
        """Wait until all processes have written a step, commit it, and delete steps that are not kept."""
        writer.wait_for_arrays()
        if jax.process_index() == 0:
            self._guard()
            checksums = {name: finish_checksums(parts) for name, parts in manifest[CHECKSUMS].items()}
            step_files.commit(directory, attempt, step, {**manifest, CHECKSUMS: checksums})
        seconds = time.monotonic() - start[0]
        self.fastest_save_seconds = min(seconds, self.fastest_save_seconds or seconds)
        if jax.process_index() == 0:
            self._delete_superseded()
        spent = costs.total().plus(start[1], -1)
        self.saves, self.spent = self.saves + 1, self.spent.plus(spent)
        if spent.requests:
            _log.info(f"saved step {step}: {spent}")

    def check(self) -> None:
        """Raise RunFailed if the current save has already failed. Does not wait."""
        if self._writer and self._writer.failed():
            self.wait()

    def wait(self) -> None:
        """Wait until the current save is complete and verified, and checkpoints that are not kept are deleted.

        Raises RunFailed if the save failed; earlier checkpoints are kept. A checkpoint that cannot be deleted causes a
        warning, and the next save tries again.
        """
        done = self._writer.take() if self._writer else None
        if done is None:
            return
        step, error = done
        if error:
            self._failed(step, error)
        ocp.utils.sync_global_processes("saved")

    def add_validation_loss(self, step: int, validation_loss: float, record: dict[str, Any]) -> None:
        """Atomically set the validation loss and the record of a saved step, in the background.

        Raises InputError if there is no such step. If the manifest cannot be written, `wait` raises RunFailed.
        """
        known = self._open()
        if step not in known:
            self.resolve(step)  # raises InputError
        known[step] = _finite(validation_loss)
        changes = {"validation_loss": known[step], "record": record}
        self._started().submit(step, lambda: self._change(step, changes))

    def _change(self, step: int, changes: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            path = self.path(step)
            with orbax_errors.writing(path / MANIFEST):
                self._guard()
                if not self._directories[path.parent]:  # of another run
                    step_files.copy(path, self._directory)
                    path = self._directory / path.name
                step_files.change_manifest(path, changes)
            self._delete_superseded()

    def pin(self, step: int) -> None:
        """Keep a saved step permanently. Deleting the file `pinned` in its directory undoes that.

        A step that is only in a scratch directory is first copied. Raises InputError if there is no such step, and
        RunFailed if the file cannot be written.
        """
        step = self.resolve(step)
        if jax.process_index() == 0:
            path, kept = self.path(step), self._directory / str(step)
            with orbax_errors.writing(kept / step_files.PINNED):
                self._guard()
                if path != kept:
                    step_files.copy(path, self._directory)
                (kept / step_files.PINNED).touch()
        self._rolling.discard(step)
        ocp.utils.sync_global_processes(f"pinned_{step}")

    def close(self) -> None:
        """Wait for the current save, as `wait` does, and stop the threads."""
        try:
            self.wait()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = self._known = None

    def set_aside(self, step: int) -> epath.Path:
        """Rename a damaged step to <step>.damaged, which does not count as a checkpoint; returns the new path.

        Raises RunFailed if it cannot be renamed.
        """
        aside = self.path(step).with_suffix(step_files.DAMAGED)
        if self._known is not None:
            self._known.pop(step, None)
        ocp.utils.sync_global_processes(f"damaged_{step}")  # all processes must have seen it before it is renamed
        if jax.process_index() == 0:
            with orbax_errors.writing(aside):
                self._guard()
                step_files.move_aside(self.path(step))
        ocp.utils.sync_global_processes(f"set_aside_{step}")
        return aside

    def _failed(self, step: int, error: BaseException) -> NoReturn:
        """Clean up after a failed save, and raise RunFailed."""
        self._let_go()
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                self._guard()  # without its lease, this process may not delete what another one is writing
                step_files.clean_up(self._own_directories())  # the next save deletes the rest
        if isinstance(error, RunFailed):
            raise error
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

    def _own_directories(self) -> list[epath.Path]:
        """The existing directories in which this object may delete."""
        return [directory for directory, own in self._directories.items() if own and directory.is_dir()]

    def _delete_superseded(self) -> None:
        try:
            self._guard()
            self._clean_up(self._superseded())
        except OSError as error:
            self._warn_once(self._directory, f"{self._directory} cannot be read ({orbax_errors.cause(error)})")

    def _is_milestone(self, step: int) -> bool:
        return bool(self._keep_every_steps and step and step % self._keep_every_steps == 0)

    def _superseded(self) -> Iterator[epath.Path]:
        """The steps that need not be kept. A step that cannot be read is kept, since it may be the best."""
        losses = self._losses()
        keep = {*list(losses)[-self._keep_last :], step_files.best(losses), *filter(self._is_milestone, losses)}
        paths = {step: self.path(step) for step in losses}
        keep |= {step for step, path in paths.items() if (path / step_files.PINNED).exists()}
        for directory in self._own_directories():
            for step, path in step_files.saved_steps(directory).items():
                if step in losses and (step not in keep or path != paths[step]):  # or a copy of a step that is kept
                    yield path

    def _clean_up(self, steps: Iterable[epath.Path] = ()) -> None:
        """Delete `steps` and the remains of interrupted saves and deletions. Warns about what cannot be deleted."""
        for path, error in step_files.clean_up(self._own_directories(), steps).items():
            self._warn_once(path, f"{path} cannot be deleted ({orbax_errors.cause(error)}); the next save tries again")
