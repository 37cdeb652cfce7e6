"""The files of a checkpoint on disk. A manifest, which is written last, seals them; they are verified against it.

A saved step is a directory named by its number. It gets that name only after all its files are written and verified.
Directories with these names are not checkpoints:

    <step>.unfinished   a save that is in progress, or was interrupted
    <step>.deleted      a deletion that is in progress, or was interrupted
    <step>.damaged      a step that was set aside because its files are damaged

Files that were not saved with a step, such as an editor's backup, are ignored; only `unknown_files` lists them.
Nothing here imports jax or orbax, so a run can be checked on any machine, also while a training uses the devices.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO, Any

from etils import epath

FORMAT = 1
"""Format of new manifests. A manifest without a format has format 1; a reader rejects a higher format than its own."""
MANIFEST = "manifest.json"
"""The file of a step with its metadata, and the size and sha256 of its other files."""
PINNED = "pinned"
"""A step with a file of this name is not deleted."""
UNFINISHED, DELETED, DAMAGED = ".unfinished", ".deleted", ".damaged"

_ORBAX_METADATA = "_CHECKPOINT_METADATA"  # the first file in every directory that orbax creates
_NEW_MANIFEST = ".manifest.new"
_LEFTOVER = re.compile(rf"\d+({UNFINISHED}|{DELETED}|({UNFINISHED})?{_NEW_MANIFEST}|.*\.orbax-checkpoint-tmp.*)")
_CHUNK_BYTES = 8 << 20
_READERS = min(8, os.cpu_count() or 1)

Progress = Callable[[int], object]
"""Called with the number of bytes after each read."""


class DamagedFile(Exception):
    """`file` of a step is damaged; `problem` describes how, such as "is missing"."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file} {problem}")
        self.file, self.problem = file, problem


class UnknownManifest(DamagedFile):
    """The manifest of a step is intact, but this version cannot read it."""

    def __init__(self, problem: str, manifest: Any = None) -> None:
        match manifest:
            case {"versions": dict(versions)} if versions:
                names = ", ".join(f"{name} {version}" for name, version in versions.items())
                written_with = f" (it was written with {names[:200]})"
            case _:
                written_with = ""
        super().__init__(MANIFEST, f"{problem}; another version may have written it{written_with}")


def is_saved(path: epath.Path) -> bool:
    """Whether a directory was created by a save, intact or damaged, whatever its name is."""
    return any((path / name).exists() for name in (MANIFEST, _ORBAX_METADATA))


def is_step(path: epath.Path) -> bool:
    """Whether a directory is a saved step, intact or damaged."""
    return path.name.isdecimal() and str(int(path.name)) == path.name and is_saved(path)


def saved_steps(directory: epath.Path) -> list[int]:
    """The saved steps in a directory, sorted; empty if it is missing."""
    entries = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(path.name) for path in entries if is_step(path))


def best(losses: Mapping[int, float | None]) -> int | None:
    """The step with the lowest loss, the earliest one if several are equal; None if no step has a loss."""
    return min(((loss, step) for step, loss in losses.items() if loss is not None), default=(None, None))[1]


def is_leftover(path: epath.Path) -> bool:
    """Whether a path was left behind by an interrupted save or deletion."""
    return _LEFTOVER.fullmatch(path.name) is not None


def is_set_aside(path: epath.Path) -> bool:
    """Whether a path was renamed by `move_aside`."""
    return path.name.endswith(DAMAGED) and path.name.removesuffix(DAMAGED).isdecimal()


def clean_up(directory: epath.Path, steps: Iterable[epath.Path] = ()) -> dict[epath.Path, OSError]:
    """Delete `steps` and the remains of interrupted saves and deletions.

    Returns the error for each path that could not be deleted.
    """
    failures = {}
    for step in steps:
        try:
            delete(step)
        except OSError as error:
            failures[step] = error
    for path in filter(is_leftover, list(directory.iterdir())):
        try:
            path.rmtree() if path.is_dir() else path.unlink()
        except OSError as error:
            failures[path] = error
    return failures


def delete(path: epath.Path) -> None:
    """Delete a step. Files that cannot be deleted remain under a name that does not count as a step."""
    deleted = path.with_suffix(DELETED)
    if deleted.exists():
        deleted.rmtree()
    path.rename(deleted)
    with contextlib.suppress(OSError):
        deleted.rmtree()


def move_aside(path: epath.Path) -> epath.Path:
    """Rename a step to <step>.damaged, replacing an earlier one; returns the new path."""
    aside = path.with_suffix(DAMAGED)
    if aside.exists():
        delete(aside)
    return path.rename(aside)


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect a checkpoint, by name."""
    versions = {"python": platform.python_version()}
    for package in ("nextllm_jax", "jax", "flax", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # when run from a checkout
            versions[package] = importlib.metadata.version(package)
    return versions


def _files(path: epath.Path) -> dict[str, epath.Path]:
    """Every file in a newly written step, by its path relative to the step."""
    files, directories = {}, [path]
    while directories:
        for entry in directories.pop().iterdir():
            if entry.is_dir():
                directories.append(entry)
            else:
                files[entry.relative_to(path).as_posix()] = entry
    return dict(sorted(files.items()))


def unknown_files(path: epath.Path, manifest: dict[str, Any]) -> list[str]:
    """Paths, relative to a step, of files that were not saved with it; `name/` for a whole directory of them."""
    saved = {PurePosixPath(name) for name in (MANIFEST, PINNED, *manifest["files"])}
    directories = {directory for name in saved for directory in name.parents}
    unknown = []
    for directory in directories:
        if (path / directory).is_dir():
            # Not iterdir(), since epath leaves out names that end in "~".
            for entry in sorted({directory / name for name in os.listdir(path / directory)} - saved - directories):
                name = os.fsencode(entry).decode(errors="backslashreplace")
                unknown.append(f"{name}/" if (path / entry).is_dir() else name)
    return sorted(unknown)


def _sha256(file: IO[bytes], progress: Progress | None) -> str:
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(chunk):  # pyright: ignore[reportAttributeAccessIssue]
        digest.update(chunk[:count])  # releases the GIL
        if progress:
            progress(count)
    return digest.hexdigest()


def seal(path: epath.Path, content: dict[str, Any]) -> None:
    """Complete a step in a local directory: hash its files, sync them to disk, and write the manifest last.

    The files are dropped from the page cache, so the next read comes from the disk.
    """
    entries = {}
    for name, file_path in _files(path).items():
        with open(file_path, "rb") as file:
            entries[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": _sha256(file, None)}
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    write_manifest(path, {**content, "files": entries})


def write_manifest(path: epath.Path, content: dict[str, Any]) -> None:
    """Write or replace the manifest of a local step, atomically."""
    new = path.with_name(f"{path.name}{_NEW_MANIFEST}")  # not in the step, where a leftover would be an unknown file
    with open(new, "wb") as file:
        file.write(_sealed(json.dumps(content).encode()))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path / MANIFEST)
    sync_directory(path)


def sync_directory(path: epath.Path) -> None:
    """Sync the entries of a local directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sealed(body: bytes) -> bytes:
    """A JSON object with a manifest and its checksum."""
    return b'{"sha256": "%s",\n"manifest": %s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def read_manifest(path: epath.Path) -> dict[str, Any]:
    """The manifest of a step.

    Raises DamagedFile if it is missing or damaged, and UnknownManifest if it is intact but cannot be read by this
    version.
    """
    try:
        content = (path / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise DamagedFile(MANIFEST, "is missing") from error
    body = content.partition(b'"manifest": ')[2][:-2]
    if content != _sealed(body):
        raise DamagedFile(MANIFEST, "does not match its checksum" if content else "is empty")
    try:
        manifest = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnknownManifest("is not JSON") from error
    problem = _problem_of_manifest(manifest)
    if problem:
        raise UnknownManifest(problem, manifest)
    return manifest


def _problem_of_manifest(manifest: Any) -> str | None:
    """Why this version cannot read an intact manifest; None if it can."""
    if not isinstance(manifest, dict):
        return "is not a JSON object"
    version = manifest.get("format", 1)
    if version not in range(1, FORMAT + 1):
        return f"has format {version}, but this version reads formats up to {FORMAT}"
    missing = [name for name in _FIELDS if name not in manifest]
    if missing:
        return f"lacks {' and '.join(missing)}"
    wrong = [name for name, is_valid in _FIELDS.items() if not is_valid(manifest[name])]
    return f"has invalid values in {' and '.join(wrong)}" if wrong else None


def _is_table(value: Any, is_entry: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_entry, value.values()))


def _is_leaf(value: Any) -> bool:
    match value:
        case [str(), [*shape]]:
            return all(isinstance(size, int) for size in shape)
    return False


def _is_file(value: Any) -> bool:
    match value:
        case {"size": int(), "sha256": str()}:
            return True
    return False


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: isinstance(value, int),
    "validation_loss": lambda value: value is None or (isinstance(value, int | float) and math.isfinite(value)),
    "items": lambda value: _is_table(value, lambda tree: _is_table(tree, _is_leaf)),
    "record": lambda value: isinstance(value, dict),
    "files": lambda value: _is_table(value, _is_file),
}
"""The fields of a manifest that are read, with a check of their values. Other fields are for people only."""


def damaged_files(
    path: epath.Path,
    manifest: dict[str, Any],
    *,
    item: str | None = None,
    share: tuple[int, int] = (0, 1),
    readers: int = _READERS,
    progress: Progress | None = None,
) -> Iterator[DamagedFile]:
    """The damaged files of a step. All sizes are checked first, then each sha256.

    With `item`, only the files of that item and those directly in the step are checked. With `share` (i, n), only every
    n-th file is read, starting at the i-th.
    """
    saved = {
        name: entry
        for name, entry in sorted(manifest["files"].items())
        if item is None or "/" not in name or name.startswith(f"{item}/")
    }
    sound = []
    for name, entry in saved.items():
        problem = _problem_of_size(path / name, entry["size"])
        if problem:
            yield DamagedFile(name, problem)
        else:
            sound.append(name)

    def problem_of_content(name: str) -> str | None:
        with (path / name).open("rb") as file:
            same = _sha256(file, progress) == saved[name]["sha256"]
        return None if same else "is not what was saved (its sha256 differs)"

    mine = sound[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(readers) as pool:
        # With one reader, read in this thread: while the interpreter exits, a save in progress cannot start threads.
        problems = map(problem_of_content, mine) if readers == 1 else pool.map(problem_of_content, mine)
        for name, problem in zip(mine, problems, strict=True):
            if problem:
                yield DamagedFile(name, problem)


def _problem_of_size(file: epath.Path, saved: int) -> str | None:
    if not file.exists() or file.is_dir():
        return "is missing"
    size = os.stat(file).st_size  # epath's stat fails if the owner has no user name, as in some containers
    return None if size == saved else f"has {size:,} bytes instead of {saved:,}"
