"""`SavedSteps`: the checkpoints in a directory, as whoever reads a run sees them."""

import functools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from etils import epath

from nextllm_jax.checkpoint import orbax_errors, scratch, step_files
from nextllm_jax.checkpoint.leaves import compile_checksums, leaves_of, mismatch
from nextllm_jax.checkpoint.manifest import MANIFEST, DamagedFile, UnknownManifest, read_manifest
from nextllm_jax.checkpoint.verified_read import DamagedItem, UnreadableItem, read_item
from nextllm_jax.errors import InputError
from nextllm_jax.storage.interface import StorageError
from nextllm_jax.storage.open_storage import as_path

_log = logging.getLogger(__name__)


class DamagedCheckpoint(InputError):
    """Files of `step` are missing or damaged. `Checkpoints.set_aside(step)` moves the checkpoint out of the way."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class SavedSteps:
    """The checkpoints in a directory and in its scratch directories (see scratch.py).

    The constructor reads nothing, and nothing is written, so a run can be inspected while it trains.
    """

    def __init__(self, directory: epath.PathLike) -> None:
        self._directory = as_path(directory).absolute()
        self._warned: set[epath.Path] = set()

    @property
    def directory(self) -> epath.Path:
        """The directory that contains the steps."""
        return self._directory

    @functools.cached_property
    def _directories(self) -> dict[epath.Path, bool]:
        """As `scratch.directories` returns it. A run's scratch directories are known before its first save."""
        return scratch.directories(self._directory)

    def path(self, step: int) -> epath.Path:
        """Where a step is saved, or would be."""
        paths = [directory / str(step) for directory in self._directories]
        return paths[0] if len(paths) == 1 else next(filter(step_files.is_saved, paths), paths[0])

    def steps(self) -> list[int]:
        """The saved steps, sorted, including damaged ones but not unfinished saves."""
        return list(step_files.saved_steps(*self._directories))

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
            except StorageError:  # else several processes would know different steps
                raise
            except InputError as error:
                # No warning if a training process has just deleted it.
                if step_files.is_saved(self.path(step)) and jax.process_index() == 0:
                    self._warn_once(self.path(step), str(error))
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
            return read_manifest(self.path(step))
        except UnknownManifest as error:
            raise InputError(self._unusable(step, f"cannot be read ({error})")) from error
        except DamagedFile as damage:
            raise DamagedCheckpoint(step, self._unusable(step, f"is damaged ({damage})")) from damage
        except StorageError:  # of the bucket, not of this step
            raise
        except OSError as error:
            cause = f"cannot be read ({MANIFEST}: {orbax_errors.cause(error)})"
            raise InputError(self._unusable(step, cause)) from error

    def _unusable(self, step: int, why: str) -> str:
        """The error message for a step that cannot be used."""
        others = ", ".join(str(other) for other in self.steps() if other != step)
        fix = f"use another step: {others}" if others else "there is no other step"
        return f"checkpoint {self.path(step)} {why}; {fix}"

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
            raise InputError(f"checkpoint {self.path(step)} has no {name}; it has {', '.join(saved)}")
        if difference := mismatch(saved[name], leaves_of(abstract)):
            path = f"checkpoint {self.path(step)}"
            raise InputError(f"{path} does not fit ({name}: {difference}); use the config that it was saved with")
        orbax_errors.silence_tracebacks()
        compile_checksums(abstract)
        try:
            yield from read_item(self.path(step), manifest, name, parts)
        except DamagedItem as damage:
            raise DamagedCheckpoint(step, self._unusable(step, f"is damaged ({damage})")) from damage
        except UnreadableItem as error:
            raise InputError(self._unusable(step, f"cannot be read ({name}: {error})")) from error
