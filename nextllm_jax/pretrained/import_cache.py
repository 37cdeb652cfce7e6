"""Imports published models once into the user's cache directory, so they load fast.

<cache directory>/models/<name>-<key>/ is the run directory that `nextllm import` writes. The key depends on the content
of the file and on the version of the importer.
"""

import hashlib
import logging
from pathlib import Path

from nextllm_jax.pretrained.convert import LAYOUT, import_model
from nextllm_jax.process import cache_directory
from nextllm_jax.storage.disk import lock_file

_log = logging.getLogger(__name__)


def imported_run(name: str, file: Path) -> Path:
    """The run directory that `file` is imported into. Imports it on the first call.

    If several processes call this at once, one imports and the others wait. Raises OSError or RunFailed if the cache
    cannot be written, and InputError if the file cannot be imported.
    """
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    run = cache_directory() / "models" / f"{name}-{digest[:16]}-{LAYOUT}"
    if not run.exists():
        run.parent.mkdir(parents=True, exist_ok=True)
        with open(run.with_name(f"{run.name}.lock"), "w") as lock:
            lock_file(lock.fileno(), wait=True)  # on a file system without locks, two imports at once may both fail
            if not run.exists():  # else another process was faster
                _log.info("importing %s into %s (only once)", name, run)
                import_model(str(file), str(run))
    return run
