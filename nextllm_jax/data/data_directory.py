"""The directory of prepared data: who may write it, and that nothing else in it is lost."""

import contextlib
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nextllm_jax.data.shards import FORMAT, SPLITS, files_of, partial_path
from nextllm_jax.errors import InputError, failed_place
from nextllm_jax.storage.disk import lock_file

_SETTINGS = "settings.json"
_INDEX = "index.json"
_REPLACED = ".replaced-by-nextllm-prepare"
_ANY_FORMAT = FORMAT.rstrip("0123456789")
_POLL_SECONDS, _SILENT_SECONDS = 0.2, 1.0
"""How often a waiting process tries the lock, and after how long it says that it waits."""


def read_settings(directory: Path) -> dict[str, Any]:
    """What settings.json in `directory` says; empty if it is missing or none of ours."""
    return _read_ours(directory / _SETTINGS)


def is_prepared(directory: Path) -> bool:
    """True if `directory` holds prepared data, whole, by the look of it."""
    return os.path.isfile(directory / _INDEX)  # Path.is_file raises for a directory that may not be searched


def check_replaceable(output: Path, overwrite: bool) -> None:
    """InputError unless `output` is free, or holds prepared data and nothing else, and may be overwritten."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    index = _read_ours(output / _INDEX)
    if not index:
        raise InputError(f"{output} exists and is not prepared data; name another directory")
    names = _names_of_files(index)
    foreign = sorted({path.relative_to(output).as_posix() for path in output.rglob("*")} - names)
    ours = ("tokenizer/ranks-", "tokenizer/huggingface-", _REPLACED)
    foreign = [name for name in foreign if not name.startswith(ours)]
    if foreign:
        raise InputError(
            f"{output} holds more than prepared data ({foreign[0]}{', ...' if foreign[1:] else ''}); "
            "move that away, or name another directory"
        )
    if not overwrite:
        raise InputError(f"{output} was prepared with other settings; name another directory, or pass --overwrite")


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """A context in which a failure to create, write or rename the files of `output` becomes an InputError.

    An OSError of any other file passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk of {output} is full; free space and run again, finished parts are kept"
            raise InputError(message) from error
        if not _concerns(error, output):
            raise
        place = failed_place(error, output)
        raise InputError(
            f"data directory {output} cannot be written ({place}: {error.strerror or error}); make {place} a writable "
            "directory, or prepare elsewhere: nextllm prepare --output DIR, then train with --data.path DIR"
        ) from error


def _concerns(error: OSError, output: Path) -> bool:
    """Whether an error is about a file of `output`, or about a directory that it is in."""
    if error.filename is None:  # from writing to an open file
        return error.errno in (errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
    path = Path(os.fsdecode(error.filename))
    ours = (output, partial_path(output))
    return any(path.is_relative_to(each) or each.is_relative_to(path) for each in ours)


@contextlib.contextmanager
def claimed(partial: Path, output: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock on the partial directory, which is created if need be, and removed if it is empty at the end.

    While another process holds it, `wait` waits for that process to finish or to die; without, raises InputError.
    That process may have published `output` meanwhile, so look at it again.
    """
    handle = _claim(partial, output, wait)
    try:
        yield
    finally:
        if _is_at(handle, partial):
            with contextlib.suppress(OSError):
                partial.rmdir()
        os.close(handle)


def _claim(partial: Path, output: Path, wait: bool) -> int:
    """An open handle of the partial directory with its lock, which goes when the handle is closed.

    The process that held the lock may have renamed the directory to `output`, so what is locked may no longer be at
    that path; then this starts over.
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
                print(f"waiting for another process, which is preparing {output}", file=sys.stderr, flush=True)
                said = True
            time.sleep(_POLL_SECONDS)


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open directory is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def start_or_continue(partial: Path, settings: dict[str, Any]) -> None:
    """Keep what a run with the same settings left in `partial`, or empty it.

    Raises InputError if files lie there that no such run wrote.
    """
    found = read_settings(partial)
    if found == settings:
        print(f"continuing the interrupted preparation in {partial}", flush=True)
        return
    temporary = partial / f"{_SETTINGS}.tmp"
    entries = [entry for entry in partial.iterdir() if entry != temporary]
    if entries and not found:
        raise InputError(f"{partial} is needed for preparing but holds other files; move them away")
    for entry in sorted(entries, key=lambda entry: entry.name == _SETTINGS):  # the settings last: they say it is ours
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    temporary.write_text(json.dumps(settings, indent=2) + "\n")
    temporary.replace(partial / _SETTINGS)


def publish(partial: Path, output: Path) -> None:
    """Turn the finished partial directory into the output.

    Older data travels in it and goes last, so that a process killed at any time leaves one or the other whole.
    """
    if is_prepared(output):
        output.rename(partial / _REPLACED)
    partial.rename(output)
    remove_replaced(output)


def remove_replaced(output: Path) -> None:
    """Remove the older data that a process killed while it published has left in `output`."""
    while (output / _REPLACED).is_dir():
        with contextlib.suppress(FileNotFoundError):  # another process may be removing it too
            shutil.rmtree(output / _REPLACED)


def _read_ours(file: Path) -> dict[str, Any]:
    """The JSON object in a file that preparing wrote, by any version of the format; empty for anything else."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    ours = isinstance(content, dict) and str(content.get("format")).startswith(_ANY_FORMAT)
    return content if ours else {}


def _names_of_files(index: dict[str, Any]) -> set[str]:
    """What lies in a prepared directory, but for the ranks of its tokenizer."""
    names = {_INDEX, _SETTINGS, "tokenizer", "tokenizer/encoding.json"}
    with contextlib.suppress(KeyError, TypeError):  # a damaged index names less
        splits = [index["splits"][name] for name in SPLITS]
        names |= {entry["file"] for split in splits for entry in files_of(split)}
    return names
