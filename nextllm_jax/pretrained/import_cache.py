"""Published models as run directories in the user's cache directory, imported once, so that they load fast.

<cache directory>/models/<name>-<key>/ is what `nextllm import` writes. The key says from which bytes it was made
and by which importer, so that another file or another importer makes another directory.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nextllm_jax.errors import InputError
from nextllm_jax.pretrained.convert import LAYOUT, import_model
from nextllm_jax.process import cache_directory
from nextllm_jax.storage.disk import lock_file

Result = TypeVar("Result")


def use_imported(name: str, file: Path, use: Callable[[Path], Result]) -> Result:
    """What `use` makes of the run directory that `file` was imported into; imports it if that is not there yet.

    A directory that `use` refuses with InputError is made anew, with a line that says so. Any number of processes may
    call this at once: one imports, the others wait. Raises OSError or RunFailed if the cache cannot be written, and
    InputError for a file that cannot be imported.
    """
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    run = cache_directory() / "models" / f"{name}-{digest[:16]}-{LAYOUT}"
    found = _identity(run) or _import(name, file, run, damaged=None)
    try:
        return use(run)
    except InputError as error:
        _say(f"the import of {name} that was kept is damaged and made anew ({error})")
        _import(name, file, run, damaged=found)
        return use(run)


def _import(name: str, file: Path, run: Path, *, damaged: int | None) -> int | None:
    """Make `run`, in the place of the one with the identity `damaged`; the identity of the one that is there then."""
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.with_name(f"{run.name}.lock"), "w") as lock:
        lock_file(lock.fileno(), wait=True)  # on a file system without locks, two imports at once may both fail
        if damaged is not None and _identity(run) == damaged:
            shutil.rmtree(run)
        if _identity(run) is None:  # else another process was faster
            _say(f"importing {name} into {run}, once")
            import_model(str(file), str(run))
        return _identity(run)


def _identity(run: Path) -> int | None:
    """What tells a directory from another that is put in its place; None if there is none."""
    try:
        return os.stat(run).st_ino
    except FileNotFoundError:
        return None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
