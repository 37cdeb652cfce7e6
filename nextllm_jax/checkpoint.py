"""Checkpoints of a run: the latest and the best, written in the background by orbax.

Each step is one directory that orbax writes under another name and renames when it is whole (on object
stores: marks when it is whole). In it lies a manifest with the step's validation loss, so which step is the
latest and which the best always follows from the steps that are there; nothing else records it. That is why
retention is ours: orbax's CheckpointManager ranks steps by metrics kept elsewhere, and counts an empty
directory with a number for a name as a step.
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import sys
import types
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from nextllm_jax.errors import InputError, RunFailed

# How tensorstore's errors begin when a file is not what was written, and what that means. Others (no permission, no
# memory) say nothing about the file.
_DAMAGE = {"DATA_LOSS": "damaged", "OUT_OF_RANGE": "cut short", "NOT_FOUND": "missing"}

# Item of a checkpoint and the file that orbax's JSON handler writes for it.
_MANIFEST = "manifest"
_MANIFEST_FILE = f"{_MANIFEST}/metadata"
_DELETED_FILE = f"{_MANIFEST}/deleted"
_UNFINISHED = ".orbax-checkpoint-tmp"


class DamagedCheckpoint(InputError):
    """Files of `step` are missing or are not what was saved; `Checkpoints.set_aside(step)` gets it out of the way."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


def _leaves(tree: Any) -> dict[str, list[Any]]:
    """Path of each leaf, such as "layers/mlp/up/kernel" -> [dtype, shape]."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in leaves
    }


def _mismatch(saved: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> str | None:
    """What is wrong with the first leaf that differs, or None."""
    for path in [*wanted, *saved]:
        if path not in saved:
            return f"{path} is not there"
        if path not in wanted:
            return f"{path} is there but not wanted"
        if saved[path] != wanted[path]:
            (dtype, shape), (wanted_dtype, wanted_shape) = saved[path], wanted[path]
            return f"{path} is {dtype}{shape} there, {wanted_dtype}{wanted_shape} is wanted"
    return None


def _is_damage(error: BaseException) -> bool:
    """True if an error of reading says that files are not what was saved, not only that they are out of reach."""
    missing_or_broken = FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError
    return isinstance(error, missing_or_broken) or str(error).partition(":")[0] in _DAMAGE


def _innermost(error: BaseException) -> BaseException:
    """The exception that an exception was raised from, at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _cause(error: BaseException) -> str:
    """An exception in a few words."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore buries it in a paragraph
    if code:
        return os.strerror(int(code.group(1)))
    status = str(error).partition(":")[0]
    if status in _DAMAGE:
        return f"a file is {_DAMAGE[status]}"
    if isinstance(error, json.JSONDecodeError):
        return "a file is not JSON"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else type(error).__name__


def _is_manifest(content: Any) -> bool:
    """True for a manifest as `Checkpoints.save` writes it."""
    if not isinstance(content, dict) or "validation_loss" not in content:
        return False
    loss_fits = isinstance(content["validation_loss"], int | float | None)
    return loss_fits and all(isinstance(content.get(name), dict) for name in ("items", "record"))


def _finite(loss: float | None) -> float | None:
    return float(loss) if loss is not None and math.isfinite(loss) else None


def _not_a_background_traceback(record: logging.LogRecord) -> bool:
    """False for what orbax's threads and tasks log of an exception, which itself comes out of `wait` or `restore`."""
    of_a_task = record.name == "asyncio" and "orbax" in record.getMessage()
    return not (of_a_task or (record.exc_info and "orbax" in record.pathname))


@functools.cache
def _silence_tracebacks_of_orbax() -> None:
    """Keep quiet, in this process, about what follows a failure to read or write one array.

    Orbax gives up at the first and closes its event loop; each array still under way then ends in a traceback of its
    own from a thread of tensorstore, which asyncio's first frame gives away.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_a_background_traceback)
    print_uncaught, print_unraisable = sys.excepthook, sys.unraisablehook

    def follows(trace: types.TracebackType | None) -> bool:
        return trace is not None and trace.tb_frame.f_code.co_name == "call_soon_threadsafe"

    def uncaught(kind: Any, error: BaseException, trace: types.TracebackType | None) -> None:
        if not follows(trace):
            print_uncaught(kind, error, trace)

    def unraisable(what: Any) -> None:
        if not follows(what.exc_traceback):
            print_unraisable(what)

    sys.excepthook, sys.unraisablehook = uncaught, unraisable


class Checkpoints:
    """The complete checkpoints in a directory, and the way to add one.

    Making one reads and writes nothing, so that a run can be looked at while it trains. With several
    processes each one makes the same calls in the same order, on storage that they share.
    """

    def __init__(self, directory: epath.PathLike) -> None:
        self._directory = epath.Path(directory).absolute() if "://" not in str(directory) else epath.Path(directory)
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._saving: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _path(self, step: int) -> epath.Path:
        return self._directory / str(step)

    def _is_complete(self, step: int) -> bool:
        path = self._path(step)
        return (path / _MANIFEST_FILE).exists() and ocp.utils.is_checkpoint_finalized(path)

    def _numbered(self) -> list[int]:
        """Every step that has a directory, whole or not."""
        if not self._directory.is_dir():
            return []
        names = [path.name for path in self._directory.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name)

    def _manifest(self, step: int) -> dict[str, Any]:
        path = self._path(step) / _MANIFEST_FILE
        try:
            manifest = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise self._unreadable(step, f"{_MANIFEST_FILE}: {_cause(error)}", _is_damage(error)) from error
        if not _is_manifest(manifest):
            raise self._unreadable(step, f"{_MANIFEST_FILE} is not what a run writes", True)
        return manifest

    def _unreadable(self, step: int, cause: str, damaged: bool) -> InputError:
        """The exception for a step whose files cannot be read."""
        others = [str(other) for other in self.steps() if other != step]
        fix = f"use another step of: {', '.join(others)}" if others else "there is no other step"
        if damaged:
            return DamagedCheckpoint(step, f"checkpoint {self._path(step)} is damaged ({cause}); {fix}")
        return InputError(f"checkpoint {self._path(step)} cannot be read ({cause}); {fix}")

    def steps(self) -> list[int]:
        """The complete steps, in order. An unfinished save is none of them."""
        return [step for step in self._numbered() if self._is_complete(step)]

    def latest_step(self) -> int | None:
        """The highest complete step."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step with the lowest finite validation loss (the earlier of equals), None without any."""
        ranked = []
        for step in self.steps():
            try:
                loss = self.validation_loss(step)
            except InputError:
                if self._is_complete(step):
                    raise
                continue  # the run that is training deleted it just now
            if loss is not None:
                ranked.append((loss, step))
        return min(ranked)[1] if ranked else None

    def validation_loss(self, step: int) -> float | None:
        """The validation loss that a step was saved with; None if there was none or it was not finite."""
        return self._manifest(step)["validation_loss"]

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record that a step was saved with."""
        return self._manifest(step)["record"]

    def resolve(self, step: str | int) -> int:
        """The complete step that "latest", "best" or a number means.

        Raises InputError, naming the directory and the steps in it, where there is no such step.
        """
        steps = self.steps()
        if not steps:
            raise InputError(f"{self._directory} holds no complete checkpoint; train first, or check the path")
        there = f"there are: {', '.join(map(str, steps))}"
        if step == "latest":
            return steps[-1]
        if step == "best":
            best = self.best_step()
            if best is None:
                raise InputError(f"no checkpoint in {self._directory} has a validation loss; ask for latest ({there})")
            return best
        number = int(step) if str(step).isdecimal() else None
        if number not in steps:
            raise InputError(f"{self._directory} has no checkpoint '{step}'; ask for latest, best or a step ({there})")
        return number

    def restore(self, step: int, name: str, abstract: Any) -> Any:
        """The tree saved at `step` under `name`, on the devices that `abstract` says.

        `abstract` has the tree's structure, with a ShapeDtypeStruct with a sharding at each leaf. Raises
        InputError, naming the leaf, if structure, dtype or shape are not what was saved, and DamagedCheckpoint
        if files are missing or cut short (a flipped bit is not noticed).
        """
        step = self.resolve(step)
        saved = self._manifest(step)["items"]
        if name not in saved:
            raise InputError(f"checkpoint {self._path(step)} has no {name}; it has {', '.join(saved)}")
        mismatch = _mismatch(saved[name], _leaves(abstract))
        if mismatch:
            raise InputError(
                f"checkpoint {self._path(step)} does not fit, {name}: {mismatch}; use the config that it was saved with"
            )
        _silence_tracebacks_of_orbax()
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                return checkpointer.restore(self._path(step) / name, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # orbax wraps what tensorstore raises in kinds of its own
            inner = _innermost(error)
            raise self._unreadable(step, f"{name}: {_cause(inner)}", _is_damage(inner)) from error

    def save(self, step: int, items: dict[str, Any], record: dict[str, Any], *, validation_loss: float | None) -> None:
        """Start saving a step; returns when the arrays may be donated, before they are on disk.

        `items` are named trees of arrays, `record` is JSON. First waits for the save before, and raises
        RunFailed if that failed. A loss that is not finite never makes a best. Raises ValueError for a step
        that is already saved: replacing it would leave a moment without it.
        """
        self.wait()
        if self._is_complete(step):
            raise ValueError(f"step {step} is already saved in {self._directory}")
        manifest = {
            "validation_loss": _finite(validation_loss),
            "items": {name: _leaves(tree) for name, tree in items.items()},
            "record": record,
        }
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        try:
            if self._checkpointer is None:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._remove_unfinished()
                _silence_tracebacks_of_orbax()
                self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
            self._saving = step
            # force: the half-deleted directory of that name that a killed process may have left is removed.
            self._checkpointer.save(
                self._path(step),
                args=ocp.args.Composite(**trees, **{_MANIFEST: ocp.args.JsonSave(manifest)}),
                force=True,
            )
        except OSError as error:
            self._failed(step, error)

    def wait(self) -> None:
        """Return once the step being saved is committed, then delete all but the latest and the best.

        Raises RunFailed if it could not be saved; the checkpoints before it stand.
        """
        if self._checkpointer is None or self._saving is None:
            return
        step, self._saving = self._saving, None
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:  # tensorstore and asyncio raise many kinds for a full disk
            self._failed(step, error)
        self._delete_superseded()

    def add_validation_loss(self, step: int, validation_loss: float, record: dict[str, Any]) -> None:
        """Give a step that is saved already its validation loss and a new record, in one atomic change.

        Raises InputError without such a step, and RunFailed if it cannot be written; the old record stands.
        """
        self.wait()
        manifest = self._manifest(self.resolve(step))
        manifest |= {"validation_loss": _finite(validation_loss), "record": record}
        path = self._path(step) / _MANIFEST_FILE
        if jax.process_index() == 0:
            try:
                new = path.with_name("new")
                new.write_text(json.dumps(manifest))
                new.replace(path)
            except OSError as error:
                raise RunFailed(
                    f"{path} cannot be written ({_cause(error)}); make room or mend the directory, "
                    "and run the same command again"
                ) from error
        ocp.utils.sync_global_processes(f"added_validation_loss_{step}")
        self._delete_superseded()

    def close(self) -> None:
        """Wait for the step being saved, as `wait` does, and let go of orbax's threads."""
        try:
            self.wait()
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None

    def set_aside(self, step: int) -> epath.Path:
        """Rename a damaged step to <step>.damaged, so that it counts no more; returns the new path."""
        aside = self._directory / f"{step}.damaged"
        if jax.process_index() == 0:
            if aside.exists():
                aside.rmtree()
            self._path(step).rename(aside)
        ocp.utils.sync_global_processes(f"set_aside_{step}")
        return aside

    def _failed(self, step: int, error: Exception) -> None:
        """Free what the failed save took and raise RunFailed."""
        self._saving = None
        # A thread of orbax may still be writing there; what it leaves goes before the next save.
        with contextlib.suppress(OSError):
            self._remove_unfinished()
        latest = self.latest_step()
        raise RunFailed(
            f"step {step} could not be saved in {self._directory} ({_cause(error)}); "
            + (f"step {latest} stands" if latest is not None else "there is no earlier checkpoint")
            + "; make room or mend the directory, and run the same command again"
        ) from error

    def _delete_superseded(self) -> None:
        """Delete all but the latest and the best."""
        if jax.process_index() == 0:
            keep = {self.latest_step(), self.best_step()}
            for step in self.steps():
                if step not in keep:
                    self._delete(step)
        ocp.utils.sync_global_processes("deleted_superseded")

    def _remove_unfinished(self) -> None:
        """Remove what interrupted saves and deletions left."""
        if jax.process_index() != 0 or not self._directory.is_dir():
            return
        for path in list(self._directory.iterdir()):
            if _UNFINISHED in path.name:
                path.rmtree()
        for step in self._numbered():
            if (self._path(step) / _DELETED_FILE).exists():
                self._delete(step)

    def _delete(self, step: int) -> None:
        """Delete a step, so that a deletion cut short counts no more and is finished later.

        The manifest goes first, into a mark, and the mark goes last.
        """
        path = self._path(step)
        if (path / _MANIFEST_FILE).exists():
            (path / _MANIFEST_FILE).rename(path / _DELETED_FILE)
        for item in list(path.iterdir()):
            if item.is_dir() and item.name != _MANIFEST:
                item.rmtree()
        path.rmtree()
