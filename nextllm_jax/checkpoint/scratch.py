"""Scratch directories: where a run writes its rolling checkpoints, which a bucket may expire.

`scratch.json`, next to the steps of a run, lists the scratch directories that the run has used, the current one last.
Each is a new directory below checkpoint.scratch, so the steps of two runs never meet there, nor those of a run and of
the one that it overwrote. Nothing here imports jax or orbax.
"""

import json
import uuid

from etils import epath

from nextllm_jax.errors import InputError
from nextllm_jax.storage.open_storage import as_path, open_storage

_FILE = "scratch.json"


def directories(checkpoints: epath.Path) -> dict[epath.Path, bool]:
    """All directories with steps of a run, and whether the run may write there. The first is `checkpoints` itself.

    The others are its scratch directories, the current one last. They need not exist. Those that came with a copy of
    another run are only read.
    """
    owned = {checkpoints: True}
    for entry in _entries(checkpoints):
        owned[as_path(entry["directory"])] = entry["of"] == str(checkpoints)
    return owned


def _entries(checkpoints: epath.Path) -> list[dict[str, str]]:
    storage = open_storage(checkpoints)
    if _FILE not in storage.names():
        return []
    try:
        return [{name: str(each[name]) for name in ("directory", "of")} for each in json.loads(storage.read(_FILE))]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{checkpoints / _FILE} is damaged; restore it, or delete it") from error


def require_usable(checkpoints: epath.Path, scratch: str | None) -> None:
    """Raise InputError if `scratch` is not on a disk as the run is, or not in a bucket as the run is."""
    if scratch is not None and open_storage(scratch).renames != open_storage(checkpoints).renames:
        raise InputError(
            f"checkpoint.scratch {scratch} and the run in {checkpoints.parent} must be both on disk or both in buckets"
        )


def use(checkpoints: epath.Path, scratch: str) -> None:
    """Make a directory below `scratch` the current one of a run: the one that it has used there before, or a new one.

    Raises StorageError if the bucket of `scratch` cannot be used.
    """
    checkpoints, parent = checkpoints.absolute(), as_path(scratch).absolute()
    open_storage(parent).names()
    entries = _entries(checkpoints)
    own = [each for each in entries if each["of"] == str(checkpoints) and as_path(each["directory"]).parent == parent]
    current = own[-1] if own else {"directory": str(parent / uuid.uuid4().hex[:12]), "of": str(checkpoints)}
    wanted = [*(each for each in entries if each != current), current]
    if wanted != entries:
        open_storage(checkpoints).write(_FILE, json.dumps(wanted, indent=2).encode())
