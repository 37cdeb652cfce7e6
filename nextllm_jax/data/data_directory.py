"""The directory of prepared data: locking it, publishing it atomically, and never overwriting other files."""

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nextllm_jax.data.shards import FORMAT, SPLITS, DataPath, files_of, partial_path
from nextllm_jax.errors import InputError, failed_path
from nextllm_jax.storage.disk import lock_file
from nextllm_jax.storage.interface import StorageError

_log = logging.getLogger(__name__)

SETTINGS = "settings.json"
INDEX = "index.json"
_REPLACED = ".replaced-by-nextllm-prepare"
_ANY_FORMAT = FORMAT.rstrip("0123456789")
_POLL_SECONDS, _SILENT_SECONDS = 0.2, 1.0
"""How often a waiting process tries the lock, and after how long it reports that it is waiting."""


def read_settings(directory: DataPath) -> dict[str, Any]:
    """The content of settings.json in `directory`; empty if it is missing or another program's."""
    return _read_ours(directory / SETTINGS)


def is_prepared(directory: DataPath) -> bool:
    """Whether `directory` holds complete prepared data; its files are not checked."""
    try:
        return (directory / INDEX).is_file()
    except PermissionError:  # a directory that may not be searched
        return False


def check_replaceable(output: Path, overwrite: bool) -> None:
    """Raise InputError unless `output` is missing or empty, or holds only prepared data and `overwrite` is true."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    index = _read_ours(output / INDEX)
    if not index:
        raise InputError(f"{output} exists and is not prepared data; name another directory")
    names = _names_of_files(index)
    others = sorted({path.relative_to(output).as_posix() for path in output.rglob("*")} - names)
    ours = ("tokenizer/ranks-", "tokenizer/huggingface-", _REPLACED)
    others = [name for name in others if not name.startswith(ours)]
    if others:
        raise InputError(
            f"{output} holds files other than prepared data ({others[0]}{', ...' if others[1:] else ''}); "
            "move them away, or name another directory"
        )
    if not overwrite:
        raise InputError(f"{output} was prepared with other settings; name another directory, or pass --overwrite")


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """A context in which a failure to create, write or rename the files of `output` becomes an InputError.

    An OSError about any other file is raised unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk of {output} is full; free space and run again (finished parts are kept)"
            raise InputError(message) from error
        if not _concerns(error, output):
            raise
        path = failed_path(error, output)
        raise InputError(
            f"data directory {output} cannot be written ({path}: {error.strerror or error}); make {path} a writable "
            "directory, or prepare elsewhere: nextllm prepare --output DIR, then train with --data.path DIR"
        ) from error


def _concerns(error: OSError, output: Path) -> bool:
    """Whether an error is about a file in `output`, or about a parent directory of `output`."""
    if error.filename is None:  # from writing to an open file
        return error.errno in (errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
    path = Path(os.fsdecode(error.filename))
    ours = (output, partial_path(output))
    return any(path.is_relative_to(each) or each.is_relative_to(path) for each in ours)


@contextlib.contextmanager
def claimed(partial: Path, output: DataPath, *, wait: bool = False) -> Iterator[None]:
    """A context that holds a lock on the partial directory. It creates the directory, and removes it if it is empty.

    If another process holds the lock, this waits until that process finishes or dies, or raises InputError without
    `wait`. The other process may have published `output` in the meantime, so the caller must check it again.
    """
    handle = _claim(partial, output, wait)
    try:
        yield
    finally:
        if _is_at(handle, partial):
            with contextlib.suppress(OSError):
                partial.rmdir()
        os.close(handle)


def _claim(partial: Path, output: DataPath, wait: bool) -> int:
    """An open handle of the partial directory, which is locked until the handle is closed.

    The process that held the lock may have renamed the directory to `output`, so the locked directory may no longer be
    at that path. In that case this starts over.
    """
    started, said = time.monotonic(), False
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        is_locked, is_current = lock_file(handle), _is_at(handle, partial)
        if is_locked and is_current:
            return handle
        os.close(handle)
        if is_current:
            if not wait:
                raise InputError(f"another process is preparing {output}; wait for it")
            if not said and time.monotonic() - started > _SILENT_SECONDS:
                _log.info("waiting for another process, which is preparing %s", output)
                said = True
            time.sleep(_POLL_SECONDS)


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open directory is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def start_or_continue(partial: Path, settings: dict[str, Any]) -> None:
    """Keep the files that a preparation with the same settings left in `partial`; otherwise empty the directory.

    Raises InputError if the directory holds files of another kind.
    """
    found = read_settings(partial)
    if found == settings:
        _log.info("continuing the interrupted preparation in %s", partial)
        return
    temporary = partial / f"{SETTINGS}.tmp"
    entries = [entry for entry in partial.iterdir() if entry != temporary]
    if entries and not found:
        raise InputError(f"{partial} is needed to prepare the data but holds other files; move them away")
    # The settings go last: they mark the directory as ours.
    for entry in sorted(entries, key=lambda entry: entry.name == SETTINGS):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    temporary.write_text(json.dumps(settings, indent=2) + "\n")
    temporary.replace(partial / SETTINGS)


def publish(partial: Path, output: Path) -> None:
    """Rename the finished partial directory to the output.

    Data that it replaces is first moved into the partial directory and deleted last, so a process that is killed at
    any time leaves the old or the new data complete.
    """
    if is_prepared(output):
        output.rename(partial / _REPLACED)
    partial.rename(output)
    remove_replaced(output)


def remove_replaced(output: Path) -> None:
    """Remove replaced data from `output`, which remains there if a process was killed in `publish`."""
    while (output / _REPLACED).is_dir():
        with contextlib.suppress(FileNotFoundError):  # another process may be removing it too
            shutil.rmtree(output / _REPLACED)


def _read_ours(file: DataPath) -> dict[str, Any]:
    """The JSON object in a file of prepared data, in any version of the format; empty for any other file."""
    try:
        content = json.loads(file.read_bytes())
    except StorageError:  # else a bucket that cannot be read would be one without the file
        raise
    except (OSError, ValueError):
        return {}
    ours = isinstance(content, dict) and str(content.get("format")).startswith(_ANY_FORMAT)
    return content if ours else {}


def _names_of_files(index: dict[str, Any]) -> set[str]:
    """The names of all files in a prepared directory, except the file with the tokenizer's vocabulary."""
    names = {INDEX, SETTINGS, "tokenizer", "tokenizer/encoding.json"}
    with contextlib.suppress(KeyError, TypeError):  # a damaged index names less
        splits = [index["splits"][name] for name in SPLITS]
        names |= {entry["file"] for split in splits for entry in files_of(split)}
    return names
