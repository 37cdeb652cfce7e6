"""Verifies the checkpoints of a run against their manifests. Importing this module does not import jax."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from etils import epath

from nextllm_jax.checkpoint import scratch, step_files
from nextllm_jax.checkpoint.manifest import DamagedFile, UnknownManifest, read_manifest
from nextllm_jax.checkpoint.run_dir import BASE, CHECKPOINTS, RunDir
from nextllm_jax.errors import InputError


def _bytes(manifest: dict[str, Any]) -> int:
    """The total size of a step's files."""
    return sum(entry["size"] for entry in manifest.get("files", {}).values())


@dataclasses.dataclass(frozen=True)
class StepReport:
    """The result of checking one directory."""

    path: epath.Path
    state: Literal["ok", "damaged", "unreadable", "unfinished", "set aside"]
    """unreadable: intact, but this version cannot read it."""
    manifest: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The step's manifest; empty if it cannot be read or was not read."""
    damages: tuple[DamagedFile, ...] = ()
    unknown: tuple[str, ...] = ()
    """Paths in the step that were not saved with it. They do no harm."""
    marks: tuple[str, ...] = ()
    """Why retention keeps the step: best, latest or pinned."""

    @property
    def failed(self) -> bool:
        """Whether this is a checkpoint that cannot be used."""
        return self.state in ("damaged", "unreadable")

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "checkpoint": str(self.path),
            "state": self.state,
            "files": len(self.manifest.get("files", {})),
            "bytes": _bytes(self.manifest),
            "validation_loss": self.manifest.get("validation_loss"),
            "marks": list(self.marks),
            "damaged": [{"file": damage.file, "problem": damage.problem} for damage in self.damages],
            "unknown": list(self.unknown),
        }

    def __str__(self) -> str:
        unknown = f"; ignored files that were not saved with it: {', '.join(self.unknown)}" if self.unknown else ""
        if self.state == "ok":
            loss = self.manifest["validation_loss"]
            scored = "" if loss is None else f", validation loss {loss:.4f}"
            size = f"{len(self.manifest['files'])} files, {_bytes(self.manifest):,} bytes"
            marks = f" ({', '.join(self.marks)})" if self.marks else ""
            return f"{self.path}: ok, {size}{scored}{marks}{unknown}"
        if self.failed:
            return f"{self.path}: {self.state}: {'; '.join(map(str, self.damages))}{unknown}"
        why = {
            "unfinished": "a save or deletion in progress, or interrupted; not a checkpoint",
            "set aside": "found to be damaged; not a checkpoint",
        }
        return f"{self.path}: {self.state} ({why[self.state]})"


def find_steps(path: epath.PathLike) -> list[epath.Path]:
    """The directories to check, sorted. `path` is a run, a directory of checkpoints, or a single checkpoint.

    Raises InputError if `path` is none of these.
    """
    run = RunDir(path)
    path = run.path
    if path.is_dir() and step_files.is_saved(path):
        return [path]
    of_a_run = run.exists() or run.checkpoints.exists()
    kinds = step_files.is_step, step_files.is_leftover, step_files.is_set_aside
    directories = [*scratch.directories(run.checkpoints), run.base] if of_a_run else scratch.directories(path)
    entries = [entry for directory in directories if directory.is_dir() for entry in directory.iterdir()]
    ours = [entry for entry in entries if entry.is_dir() and any(is_kind(entry) for is_kind in kinds)]
    if not (ours or of_a_run or (path.name == CHECKPOINTS and path.is_dir())):
        raise InputError(f"{path} is not a run; give a run directory such as runs/tiny, its checkpoints or one of them")
    return sorted(ours, key=lambda entry: (int(entry.name.partition(".")[0]), entry.name))


def describe_retention(path: epath.PathLike) -> str | None:
    """A sentence on why there are no other checkpoints in a run; None if `path` is not a run."""
    try:
        kept = RunDir(path).read_config().checkpoint
    except InputError:
        return None
    every = kept.keep_every_steps
    milestones = f", multiples of checkpoint.keep_every_steps {every}" if every else ""
    fix = "" if every else "; --checkpoint.keep-every-steps keeps milestones"
    return (
        f"training keeps the best checkpoint, the latest (checkpoint.keep_last {kept.keep_last}){milestones} and "
        f"pinned ones, and deletes the others after each save{fix}"
    )


def count_bytes(paths: Iterable[epath.Path]) -> int:
    """The number of bytes that `check_steps` will read, from the manifests; for a progress bar."""
    count = 0
    for path in filter(step_files.is_step, paths):
        with contextlib.suppress(OSError, DamagedFile):
            count += _bytes(read_manifest(path))
    return count


def check_steps(paths: Iterable[epath.Path], progress: step_files.Progress | None = None) -> Iterator[StepReport]:
    """The report of each directory from `find_steps`, except those that a training run deletes in the meantime."""
    paths = list(paths)
    marks = _marks(dict.fromkeys(path.parent for path in paths if path.parent.name != BASE))
    for path in paths:
        if step_files.is_leftover(path):
            yield StepReport(path, "unfinished")
        elif step_files.is_set_aside(path):
            yield StepReport(path, "set aside")
        elif (report := _check_step(path, progress)) and step_files.is_saved(path):
            yield dataclasses.replace(report, marks=marks.get(path, ()))


def _marks(directories: Iterable[epath.Path]) -> dict[epath.Path, tuple[str, ...]]:
    """The marks of each step in directories of a run, and in the scratch directories that belong to them."""
    steps = step_files.saved_steps(*dict.fromkeys(each for path in directories for each in scratch.directories(path)))
    losses: dict[int, float | None] = dict.fromkeys(steps)
    for step, path in steps.items():
        with contextlib.suppress(OSError, DamagedFile):
            losses[step] = read_manifest(path)["validation_loss"]
    best, latest = step_files.best(losses), max(losses, default=None)
    return {
        path: (
            *(["best"] if step == best else []),
            *(["latest"] if step == latest else []),
            *(["pinned"] if (path / step_files.PINNED).exists() else []),
        )
        for step, path in steps.items()
    }


def _check_step(path: epath.Path, progress: step_files.Progress | None) -> StepReport:
    manifest, unknown = {}, []
    try:
        manifest = read_manifest(path)
        damages = tuple(step_files.damaged_files(path, manifest, progress=progress))
        unknown = step_files.unknown_files(path, manifest)
    except UnknownManifest as error:
        return StepReport(path, "unreadable", damages=(error,))
    except DamagedFile as damage:
        damages = (damage,)
    except OSError as error:
        file = epath.Path(error.filename).relative_to(path).as_posix() if error.filename else "a file"
        damages = (DamagedFile(file, f"cannot be read ({error.strerror or error})"),)
    return StepReport(path, "damaged" if damages else "ok", manifest, damages, tuple(unknown))
