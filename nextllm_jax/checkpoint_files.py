"""The files of a checkpoint as they lie on disk: sealed by a manifest that is written last, and checked against it.

A saved step is a directory named by its number. It gets that name only when everything in it is written, read back
and found right, so a directory of another name is not a checkpoint:

    <step>.unfinished   a save that is under way, or was cut short
    <step>.deleted      a deletion that is under way, or was cut short
    <step>.damaged      set aside, for its files are not what was saved

Nothing here imports jax or orbax: a run can be checked anywhere, and beside a training that holds the devices.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from etils import epath

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


def is_saved(path: epath.Path) -> bool:
    """True for a directory that a save made, whole or damaged, whatever its name is."""
    return any((path / name).exists() for name in (MANIFEST, _ORBAX_METADATA))


def is_step(path: epath.Path) -> bool:
    """True for the directory of a saved step, whole or damaged."""
    return path.name.isdecimal() and str(int(path.name)) == path.name and is_saved(path)


def is_leftover(path: epath.Path) -> bool:
    """True for what a save or a deletion that was cut short left behind."""
    return _LEFTOVER.fullmatch(path.name) is not None


def is_set_aside(path: epath.Path) -> bool:
    """True for what `move_aside` renamed."""
    return path.name.endswith(DAMAGED) and path.name.removesuffix(DAMAGED).isdecimal()


def remove_leftovers(directory: epath.Path) -> None:
    """Remove what interrupted saves and deletions left."""
    for path in list(directory.iterdir()):
        if is_leftover(path):
            path.rmtree() if path.is_dir() else path.unlink()


def delete(path: epath.Path) -> None:
    """Delete a step; a deletion that is cut short leaves nothing that counts as a step."""
    deleted = path.with_suffix(DELETED)
    path.rename(deleted)
    deleted.rmtree()


def move_aside(path: epath.Path) -> epath.Path:
    """Rename a step to <step>.damaged, in the place of an earlier one; returns the new path."""
    aside = path.with_suffix(DAMAGED)
    if aside.exists():
        aside.rmtree()
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
    """Every file below a step but for the manifest and the pin, by its path from there."""
    files, directories = {}, [path]
    while directories:
        for entry in directories.pop().iterdir():
            if entry.is_dir():
                directories.append(entry)
            else:
                files[entry.relative_to(path).as_posix()] = entry
    return {name: files[name] for name in sorted(files.keys() - {MANIFEST, PINNED})}


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
    """The manifest of a step. Raises DamagedFile if a byte of it is not what was written."""
    try:
        content = (path / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise DamagedFile(MANIFEST, "is missing") from error
    body = content.partition(b'"manifest": ')[2][:-2]
    if content != _sealed(body):
        raise DamagedFile(MANIFEST, "is not what was written" if content else "is empty")
    return json.loads(body)


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
    n-th, from the i-th on, is read. A file that was not saved with the step counts as damaged.
    """

    def wanted(name: str) -> bool:
        return item is None or "/" not in name or name.startswith(f"{item}/")

    saved = {name: entry for name, entry in manifest["files"].items() if wanted(name)}
    there = {name: file for name, file in _files(path).items() if wanted(name)}
    sound = []
    for name in sorted(saved.keys() | there.keys()):
        problem = _problem_of_size(saved.get(name), there.get(name))
        if problem:
            yield DamagedFile(name, problem)
        else:
            sound.append(name)

    def problem_of_content(name: str) -> str | None:
        with there[name].open("rb") as file:
            same = _sha256(file, progress) == saved[name]["sha256"]
        return None if same else "is not what was saved (its sha256 differs)"

    mine = sound[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(readers) as pool:
        # One reader is this thread: while the interpreter ends, a save that is under way could start no other.
        problems = map(problem_of_content, mine) if readers == 1 else pool.map(problem_of_content, mine)
        for name, problem in zip(mine, problems, strict=True):
            if problem:
                yield DamagedFile(name, problem)


def _problem_of_size(saved: dict[str, Any] | None, there: epath.Path | None) -> str | None:
    if saved is None:
        return "was not saved with the checkpoint"
    if there is None:
        return "is missing"
    size = there.stat().length
    return None if size == saved["size"] else f"has {size:,} bytes instead of {saved['size']:,}"
