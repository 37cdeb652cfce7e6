"""The files of a checkpoint as they lie on disk: sealed by a manifest that is written last, and checked against it.

A saved step is a directory named by its number. It gets that name only when everything in it is written, read back
and found right, so a directory of another name is not a checkpoint:

    <step>.unfinished   a save that is under way, or was interrupted
    <step>.deleted      a deletion that is under way, or was interrupted
    <step>.damaged      set aside, for its files are not what was saved

Files that no save made (a file browser's, an editor's backup) may lie anywhere: only `unknown_files` looks for them.
Nothing here imports jax or orbax: a run can be checked anywhere, and beside a training that holds the devices.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from etils import epath

FORMAT = 1
"""Format of the manifests written; one without a format has the first. A reader refuses a higher one."""
MANIFEST = "manifest.json"
"""File of a step with what is known of it and size and sha256 of its other files."""
PINNED = "pinned"
"""File whose presence in a step keeps the step from being deleted."""
UNFINISHED, DELETED, DAMAGED = ".unfinished", ".deleted", ".damaged"

_ORBAX_METADATA = "_CHECKPOINT_METADATA"  # the first file in every directory that orbax makes
_NEW_MANIFEST = ".manifest.new"
_LEFTOVER = re.compile(rf"\d+({UNFINISHED}|{DELETED}|({UNFINISHED})?{_NEW_MANIFEST}|.*\.orbax-checkpoint-tmp.*)")
_CHUNK_BYTES = 8 << 20
_READERS = min(8, os.cpu_count() or 1)

Progress = Callable[[int], object]
"""Called with each number of bytes that was read."""


class DamagedFile(Exception):
    """`file` of a step is not what was saved: `problem` says how, as in "is missing"."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file} {problem}")
        self.file, self.problem = file, problem


class UnknownManifest(DamagedFile):
    """The manifest of a step is what was written, but not what this version reads."""

    def __init__(self, problem: str, manifest: Any = None) -> None:
        match manifest:
            case {"versions": dict(versions)} if versions:
                names = ", ".join(f"{name} {version}" for name, version in versions.items())
                written_with = f" (it was written with {names[:200]})"
            case _:
                written_with = ""
        super().__init__(MANIFEST, f"{problem}; another version may have written it{written_with}")


def is_saved(path: epath.Path) -> bool:
    """True for a directory that a save made, whole or damaged, whatever its name is."""
    return any((path / name).exists() for name in (MANIFEST, _ORBAX_METADATA))


def is_step(path: epath.Path) -> bool:
    """True for the directory of a saved step, whole or damaged."""
    return path.name.isdecimal() and str(int(path.name)) == path.name and is_saved(path)


def saved_steps(directory: epath.Path) -> list[int]:
    """The steps in a directory, in order; none if it is missing."""
    entries = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(path.name) for path in entries if is_step(path))


def is_leftover(path: epath.Path) -> bool:
    """True for what a save or a deletion that was cut short left behind."""
    return _LEFTOVER.fullmatch(path.name) is not None


def is_set_aside(path: epath.Path) -> bool:
    """True for what `move_aside` renamed."""
    return path.name.endswith(DAMAGED) and path.name.removesuffix(DAMAGED).isdecimal()


def clean_up(directory: epath.Path, steps: Iterable[epath.Path] = ()) -> dict[epath.Path, OSError]:
    """Delete some steps, and what interrupted saves and deletions left; returns what cannot be deleted, and why."""
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
    """Delete a step; what cannot be deleted is left under a name that does not count as a step."""
    deleted = path.with_suffix(DELETED)
    if deleted.exists():
        deleted.rmtree()
    path.rename(deleted)
    with contextlib.suppress(OSError):
        deleted.rmtree()


def move_aside(path: epath.Path) -> epath.Path:
    """Rename a step to <step>.damaged, in the place of an earlier one; returns the new path."""
    aside = path.with_suffix(DAMAGED)
    if aside.exists():
        delete(aside)
    return path.rename(aside)


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what a checkpoint is made with, by the name of the package."""
    versions = {"python": platform.python_version()}
    for package in ("nextllm_jax", "jax", "flax", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a checkout
            versions[package] = importlib.metadata.version(package)
    return versions


def _files(path: epath.Path) -> dict[str, epath.Path]:
    """Every file below a step that was just written, by its path from there."""
    files, directories = {}, [path]
    while directories:
        for entry in directories.pop().iterdir():
            if entry.is_dir():
                directories.append(entry)
            else:
                files[entry.relative_to(path).as_posix()] = entry
    return dict(sorted(files.items()))


def unknown_files(path: epath.Path, manifest: dict[str, Any]) -> list[str]:
    """What lies in a step but was not saved with it, by its path from there; a whole directory as `name/`."""
    saved = {PurePosixPath(name) for name in (MANIFEST, PINNED, *manifest["files"])}
    directories = {directory for name in saved for directory in name.parents}
    unknown = []
    for directory in directories:
        if (path / directory).is_dir():
            # Not iterdir(): epath leaves out names that end in "~".
            for entry in sorted({directory / name for name in os.listdir(path / directory)} - saved - directories):
                name = os.fsencode(entry).decode(errors="backslashreplace")
                unknown.append(f"{name}/" if (path / entry).is_dir() else name)
    return sorted(unknown)


def _sha256(file: IO[bytes], progress: Progress | None) -> str:
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(chunk):  # pyright: ignore[reportAttributeAccessIssue]
        digest.update(chunk[:count])  # lets other threads run meanwhile
        if progress:
            progress(count)
    return digest.hexdigest()


def seal(path: epath.Path, content: dict[str, Any]) -> None:
    """Make a local directory a whole step: hash its files, get them onto the disk, and write the manifest last.

    The system is told to forget what it keeps of them in memory, so that the next to read them reads the disk.
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
    """Write or replace the manifest of a local step, whole or not at all."""
    new = path.with_name(f"{path.name}{_NEW_MANIFEST}")  # beside the step: in it, a leftover would be a foreign file
    with open(new, "wb") as file:
        file.write(_sealed(json.dumps(content).encode()))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path / MANIFEST)
    sync_directory(path)


def sync_directory(path: epath.Path) -> None:
    """Get the names in a local directory onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sealed(body: bytes) -> bytes:
    """A JSON object of a manifest and its checksum."""
    return b'{"sha256": "%s",\n"manifest": %s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def read_manifest(path: epath.Path) -> dict[str, Any]:
    """The manifest of a step.

    Raises DamagedFile if a byte of it is not what was written, UnknownManifest if this version cannot read it.
    """
    try:
        content = (path / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise DamagedFile(MANIFEST, "is missing") from error
    body = content.partition(b'"manifest": ')[2][:-2]
    if content != _sealed(body):
        raise DamagedFile(MANIFEST, "is not what was written" if content else "is empty")
    try:
        manifest = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnknownManifest("is not JSON") from error
    problem = _problem_of_manifest(manifest)
    if problem:
        raise UnknownManifest(problem, manifest)
    return manifest


def _problem_of_manifest(manifest: Any) -> str | None:
    """Why this version cannot read a manifest that is what was written, or None."""
    if not isinstance(manifest, dict):
        return "is no JSON object"
    version = manifest.get("format", 1)
    if version not in range(1, FORMAT + 1):
        return f"has format {version}, this version reads up to {FORMAT}"
    missing = [name for name in _FIELDS if name not in manifest]
    if missing:
        return f"has no {' and no '.join(missing)}"
    wrong = [name for name, is_valid in _FIELDS.items() if not is_valid(manifest[name])]
    return f"has values of another kind in {' and '.join(wrong)}" if wrong else None


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
"""What is read of a manifest, and whether a value is of its kind; the rest is for people."""


def damaged_files(
    path: epath.Path,
    manifest: dict[str, Any],
    *,
    item: str | None = None,
    share: tuple[int, int] = (0, 1),
    readers: int = _READERS,
    progress: Progress | None = None,
) -> Iterator[DamagedFile]:
    """What is wrong with the files of a step: first those that a look at their sizes gives away, then by sha256.

    With `item` only the files of that item and of the step as a whole are looked at; of `share` (i, n) only every
    n-th, from the i-th on, is read.
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
        # One reader is this thread: while the interpreter ends, a save that is under way could start no other.
        problems = map(problem_of_content, mine) if readers == 1 else pool.map(problem_of_content, mine)
        for name, problem in zip(mine, problems, strict=True):
            if problem:
                yield DamagedFile(name, problem)


def _problem_of_size(file: epath.Path, saved: int) -> str | None:
    if not file.exists() or file.is_dir():
        return "is missing"
    size = os.stat(file).st_size  # epath's own stat fails if the owner has no name, as in a container
    return None if size == saved else f"has {size:,} bytes instead of {saved:,}"
