"""Reads the arrays of a saved step and compares them with the checksums in its manifest. All processes agree on errors.

Orbax restores a flipped bit without an error. The files are not read a second time to find it: the checksums are
computed from the restored arrays, on the devices. Only if they differ are the files checked, to name the damaged one.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from nextllm_jax.checkpoint import leaves, orbax_errors, step_files
from nextllm_jax.checkpoint.manifest import CHECKSUMS
from nextllm_jax.progress import progress_bar

_log = logging.getLogger(__name__)
_TEXT_BYTES = 1000  # of a message that processes exchange


class DamagedItem(Exception):
    """An array or a file is not what was saved. The message names it."""


class UnreadableItem(Exception):
    """The files of an item cannot be read, although no damage was found. The message says why."""


def first_found(text: str) -> str:
    """The first nonempty text among those of all processes; every process gets it."""
    if jax.process_count() == 1:
        return text
    mine = np.frombuffer(text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0"), np.uint8)
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(mine)]
    return next(filter(None, texts), "")


def read_item(path: epath.Path, manifest: dict[str, Any], item: str, parts: Iterable[Any]) -> Iterator[Any]:
    """The arrays of each abstract tree in `parts`, one tree after another, as they were saved in a step.

    The trees may have leaves.PLACEHOLDER. Raises DamagedItem or UnreadableItem, the same in every process. Manifests of
    old versions have no checksums of arrays; all files of the item are then read and checked first.
    """
    expected = manifest.get(CHECKSUMS, {}).get(item)
    _check_files(path, manifest, item, skip_arrays=expected is not None)
    for part in parts:
        yield _read_part(path, manifest, item, part, expected)


def _read_part(
    path: epath.Path, manifest: dict[str, Any], item: str, part: Any, expected: dict[str, int] | None
) -> Any:
    wrong = ""
    for _ in range(2):
        tree, failure, wrong = None, "", ""
        try:
            tree = leaves.read(step_files.item_path(path, manifest, item), part)
        except Exception as error:  # orbax wraps what tensorstore raises in kinds of its own
            failure = orbax_errors.cause(error)
        failure = first_found(failure)
        if not failure and expected is not None:
            wrong = first_found(_first_difference(tree, expected))
        if not failure and not wrong:
            return tree
        _check_files(path, manifest, item, array=wrong)
        if failure:
            raise UnreadableItem(failure)
        del tree
        if jax.process_index() == 0:
            _log.warning(f"{path}: {item} {wrong} was altered while it was read; reading it again")
    raise DamagedItem(f"{item} {wrong} is not what was saved, although the files are (its checksum differs)")


def _first_difference(tree: Any, expected: dict[str, int]) -> str:
    """The path of the first array whose checksum is not the expected one; empty if all are."""
    found = leaves.finish_checksums(leaves.start_checksums(tree))
    return next((array for array, checksum in found.items() if checksum != expected.get(array)), "")


def _check_files(
    path: epath.Path, manifest: dict[str, Any], item: str, *, skip_arrays: bool = False, array: str = ""
) -> None:
    """Raise DamagedItem if a file of an item is damaged. Each process reads some files.

    `array` is one that is known to be wrong, for the message.
    """
    index, count = jax.process_index(), jax.process_count()
    names = step_files.files_to_read(manifest, item, skip_arrays=skip_arrays)
    size = sum(manifest["files"][name]["size"] for name in names) // count
    damage, failure = "", ""
    with progress_bar(desc=f"checking step {path.name}", total=size, unit="B", unit_scale=True) as bar:
        try:
            found = step_files.damaged_files(
                path, manifest, item=item, skip_arrays=skip_arrays, share=(index, count), progress=bar.update
            )
            damage = str(next(found, ""))
        except OSError as error:
            failure = orbax_errors.cause(error)
    if damage := first_found(damage):
        raise DamagedItem(f"{damage}; array {array} differs" if array else damage)
    if failure := first_found(failure):
        raise UnreadableItem(failure)
