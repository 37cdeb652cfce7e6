"""The files of a checkpoint. A manifest, which is written last, seals them; they are verified against it.

A saved step is a directory named by its number. On disk it gets that name only after all its files are written and
verified. Directories with these names are not checkpoints:

    <step>.unfinished   a save that is in progress, or was interrupted
    <step>.deleted      a deletion that is in progress, or was interrupted
    <step>.damaged      a step that was set aside because its files are damaged

In a bucket, where renaming copies, a save writes to <step>/attempt-<id>/. The manifest <step>/manifest.json names that
directory, and is written last and only if it is absent. A step without a manifest does not exist.

Files that were not saved with a step, such as an editor's backup, are ignored; only `unknown_files` lists them.
Nothing here imports jax or orbax, so a run can be checked on any machine, also while a training uses the devices.
"""

import base64
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import itertools
import os
import platform
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from nextllm_jax.checkpoint.manifest import (
    ATTEMPT_FORMAT,
    MANIFEST,
    PREFIX,
    DamagedFile,
    read_manifest,
    sealed,
)
from nextllm_jax.storage.interface import Identity, Storage, StorageError
from nextllm_jax.storage.open_storage import open_storage

PINNED = "pinned"
"""A step with a file of this name is not deleted."""
UNFINISHED, DELETED, DAMAGED = ".unfinished", ".deleted", ".damaged"

ORBAX_METADATA = "_CHECKPOINT_METADATA"
"""The first file in every directory that orbax creates."""
_NEW_MANIFEST = ".manifest.new"
_ATTEMPT = re.compile(r"attempt-[0-9a-f]+")
_LEFTOVER = re.compile(rf"\d+({UNFINISHED}|{DELETED}|({UNFINISHED})?{_NEW_MANIFEST}|.*\.orbax-checkpoint-tmp.*)")
_CHUNK_BYTES = 8 << 20
_METADATA_BYTES = 1 << 20  # larger files in a directory `d` of orbax hold values of arrays
_READERS = min(8, os.cpu_count() or 1)

Progress = Callable[[int], object]
"""Called with the number of bytes after each read."""


def is_saved(path: epath.Path) -> bool:
    """Whether a directory was created by a save, intact or damaged, whatever its name is."""
    return any((path / name).exists() for name in (MANIFEST, ORBAX_METADATA))


def is_step(path: epath.Path) -> bool:
    """Whether a directory is a saved step, intact or damaged."""
    return path.name.isdecimal() and str(int(path.name)) == path.name and is_saved(path)


def saved_steps(*directories: epath.Path) -> dict[int, epath.Path]:
    """The saved steps in directories, some of which may be missing, and their paths, sorted by step.

    Of a step that is in several of them, the path in the first one counts.
    """
    found = {}
    for directory in directories:
        for path in map(directory.joinpath, open_storage(directory).names()):
            if is_step(path):
                found.setdefault(int(path.name), path)
    return dict(sorted(found.items()))


def best(losses: Mapping[int, float | None]) -> int | None:
    """The step with the lowest loss, the earliest one if several are equal; None if no step has a loss."""
    return min(((loss, step) for step, loss in losses.items() if loss is not None), default=(None, None))[1]


def is_leftover(path: epath.Path) -> bool:
    """Whether a path was left behind by an interrupted save or deletion, or is being written or deleted."""
    if not open_storage(path.parent).renames and path.name.isdecimal():
        return not is_saved(path)
    return _LEFTOVER.fullmatch(path.name) is not None


def is_set_aside(path: epath.Path) -> bool:
    """Whether a path was renamed by `move_aside`."""
    return path.name.endswith(DAMAGED) and path.name.removesuffix(DAMAGED).isdecimal()


def clean_up(directories: Iterable[epath.Path], steps: Iterable[epath.Path] = ()) -> dict[epath.Path, OSError]:
    """Delete `steps`, and in directories the remains of interrupted saves and deletions.

    Returns the error for each path that could not be deleted.
    """
    failures = {}
    for step in steps:
        try:
            delete(step)
        except OSError as error:
            failures[step] = error
    for path in itertools.chain.from_iterable(map(_remains, directories)):
        try:
            path.rmtree() if path.is_dir() else path.unlink()
        except OSError as error:
            failures[path] = error
    return failures


def _remains(directory: epath.Path) -> list[epath.Path]:
    """What interrupted saves and deletions have left behind in a directory."""
    if open_storage(directory).renames:
        return [*filter(is_leftover, directory.iterdir())]
    saved = saved_steps(directory)
    others = set(map(directory.joinpath, open_storage(directory).names())) - set(saved.values())
    remains = [*filter(is_leftover, others)]
    for step in saved.values():  # attempts that came to nothing
        attempts = [path for path in step.iterdir() if _ATTEMPT.fullmatch(path.name)]
        if len(attempts) > 1:
            with contextlib.suppress(DamagedFile):
                used = read_manifest(step).get(PREFIX)
                remains += [path for path in attempts if path.name != used]
    return remains


def delete(path: epath.Path) -> None:
    """Delete a step. Files that cannot be deleted remain under a name that does not count as a step."""
    if not open_storage(path).renames:
        (path / MANIFEST).unlink(missing_ok=True)
        path.rmtree()
        return
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
    top = PurePosixPath(manifest.get(PREFIX, ""))
    saved = {PurePosixPath(MANIFEST), PurePosixPath(PINNED), *(top / name for name in manifest["files"])}
    directories = {directory for name in saved for directory in name.parents}
    unknown = set()
    for name in open_storage(path).files():
        file = PurePosixPath(name)
        if file not in saved:
            outermost = next((each for each in reversed(file.parents) if each not in directories), None)
            unknown.add(os.fsencode(f"{outermost}/" if outermost else file).decode(errors="backslashreplace"))
    return sorted(unknown)


def item_path(path: epath.Path, manifest: dict[str, Any], item: str) -> epath.Path:
    """The directory of an item in a saved step."""
    return path / manifest.get(PREFIX, "") / item


def begin(directory: epath.Path, step: int) -> str:
    """The name, relative to the directory of all steps, of the directory in which a new step is to be written.

    Raises FileNotFoundError if the directory of all steps has vanished. Sends no request.
    """
    if open_storage(directory).renames:
        if not directory.is_dir():  # orbax would create it, and the lost steps would go unnoticed
            raise FileNotFoundError(errno.ENOENT, "the directory is gone")
        return f"{step}{UNFINISHED}"
    return f"{step}/attempt-{uuid.uuid4().hex[:12]}"


def commit(directory: epath.Path, attempt: str, step: int, content: dict[str, Any]) -> None:
    """Make what was written in `attempt` the saved step. `content` is its manifest without the files.

    Raises OSError or DamagedFile; nothing is saved then.
    """
    path, written, storage = directory / str(step), directory / attempt, open_storage(directory)
    if storage.renames:
        seal(written, content)
        damage = next(damaged_files(written, read_manifest(written), readers=1), None)
        if damage:
            raise damage
        if path.exists():
            move_aside(path)
        written.rename(path)
        sync_directory(directory)
        return
    files = {name: {"size": size, "crc32c": crc} for name, (size, _, crc) in storage.files(attempt).items()}
    content = {**content, "format": ATTEMPT_FORMAT, PREFIX: written.name, "files": files}
    if storage.create(f"{step}/{MANIFEST}", sealed(content)) is None:
        raise StorageError(f"another process has saved step {step}")


def copy(path: epath.Path, directory: epath.Path) -> None:
    """Copy a saved step into another directory of steps, where it appears once all its files are there."""
    renames = open_storage(directory).renames
    target = directory / (f"{path.name}{UNFINISHED}" if renames else path.name)
    for name in sorted(open_storage(path).files(), key=lambda name: name == MANIFEST):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).copy(target / name, overwrite=True)
    if renames:
        target.rename(directory / path.name)


def change_manifest(path: epath.Path, changes: dict[str, Any]) -> None:
    """Change entries of a saved step's manifest, atomically. Raises OSError, or as `read_manifest` does."""
    storage = open_storage(path)
    found = storage.identity(MANIFEST)
    content = read_manifest(path) | changes
    if storage.renames:
        write_manifest(path, content)
    elif found is None or storage.replace(MANIFEST, sealed(content), found) is None:
        raise StorageError(f"{path / MANIFEST} was changed by another process")


def _checksum(storage: Storage, name: str, kind: str, progress: Progress | None) -> str:
    """The checksum of a file, of the kind sha256 or crc32c, as manifests have it."""
    if kind == "crc32c":
        import google_crc32c  # needed only for steps that were saved in a bucket

        digest = google_crc32c.Checksum()
    else:
        digest = hashlib.sha256()
    start, chunk = 0, b""
    while start == 0 or len(chunk) == _CHUNK_BYTES:
        chunk = storage.read_range(name, start, _CHUNK_BYTES)
        digest.update(chunk)  # releases the GIL
        start += _CHUNK_BYTES
        if progress:
            progress(len(chunk))
    return base64.b64encode(digest.digest()).decode() if kind == "crc32c" else digest.digest().hex()


def seal(path: epath.Path, content: dict[str, Any]) -> None:
    """Complete a step in a local directory: hash its files, sync them to disk, and write the manifest last.

    The files are dropped from the page cache, so the next read comes from the disk.
    """
    entries, storage = {}, open_storage(path)
    for name, file_path in _files(path).items():
        with open(file_path, "rb") as file:
            sha256 = _checksum(storage, name, "sha256", None)
            entries[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": sha256}
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    write_manifest(path, {**content, "files": entries})


def write_manifest(path: epath.Path, content: dict[str, Any]) -> None:
    """Write or replace the manifest of a local step, atomically."""
    new = path.with_name(f"{path.name}{_NEW_MANIFEST}")  # not in the step, where a leftover would be an unknown file
    with open(new, "wb") as file:
        file.write(sealed(content))
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


def files_to_read(manifest: dict[str, Any], item: str | None, *, skip_arrays: bool) -> list[str]:
    """The files whose content `damaged_files` reads, sorted."""

    def holds_arrays(name: str) -> bool:
        return PurePosixPath(name).parent.name == "d" and manifest["files"][name]["size"] > _METADATA_BYTES

    return [name for name in _files_of(manifest, item) if not (skip_arrays and holds_arrays(name))]


def _files_of(manifest: dict[str, Any], item: str | None) -> list[str]:
    """The files of an item and those directly in the step, or with None all files, sorted."""
    return [
        name for name in sorted(manifest["files"]) if item is None or "/" not in name or name.startswith(f"{item}/")
    ]


def damaged_files(
    path: epath.Path,
    manifest: dict[str, Any],
    *,
    item: str | None = None,
    skip_arrays: bool = False,
    share: tuple[int, int] = (0, 1),
    readers: int = _READERS,
    progress: Progress | None = None,
) -> Iterator[DamagedFile]:
    """The damaged files of a step. All sizes are checked first, then each sha256.

    With `item`, only the files of that item and those directly in the step are checked. With `skip_arrays`, large files
    with values of arrays are not read. With `share` (i, n), only every n-th file is read, starting at the i-th.
    """
    saved, to_read = manifest["files"], set(files_to_read(manifest, item, skip_arrays=skip_arrays))
    storage = open_storage(path / manifest.get(PREFIX, ""))
    there, sound = storage.files(), []
    for name in _files_of(manifest, item):
        problem = _problem_of_identity(there.get(name), saved[name])
        if problem:
            yield DamagedFile(name, problem)
        elif name in to_read:
            sound.append(name)

    def problem_of_content(name: str) -> str | None:
        kind = "sha256" if "sha256" in saved[name] else "crc32c"
        same = _checksum(storage, name, kind, progress) == saved[name][kind]
        return None if same else f"is not what was saved (its {kind} differs)"

    mine = sound[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(readers) as pool:
        # With one reader, read in this thread: while the interpreter exits, a save in progress cannot start threads.
        problems = map(problem_of_content, mine) if readers == 1 else pool.map(problem_of_content, mine)
        for name, problem in zip(mine, problems, strict=True):
            if problem:
                yield DamagedFile(name, problem)


def _problem_of_identity(found: Identity | None, saved: dict[str, Any]) -> str | None:
    if found is None:
        return "is missing"
    if found.size != saved["size"]:
        return f"has {found.size:,} bytes instead of {saved['size']:,}"
    known = found.crc32c is not None and "crc32c" in saved
    return "is not what was saved (the service's crc32c differs)" if known and found.crc32c != saved["crc32c"] else None
