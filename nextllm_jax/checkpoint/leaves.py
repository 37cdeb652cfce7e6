"""The arrays of a saved tree: their entries in the manifest (path, dtype, shape), and reading them in parts."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

PLACEHOLDER = ocp.PLACEHOLDER
"""Takes the place of leaves that are not part of a partial tree."""


def leaves_of(tree: Any) -> dict[str, list[Any]]:
    """[dtype, shape] of each leaf, by its path, such as "layers/mlp/up/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in leaves
    }


def mismatch(saved: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> str | None:
    """A description of the first leaf that differs; None if all leaves are equal."""
    for path in [*wanted, *saved]:
        if path not in saved:
            return f"{path} is missing"
        if path not in wanted:
            return f"{path} is not in the model"
        if saved[path] != wanted[path]:
            (dtype, shape), (wanted_dtype, wanted_shape) = saved[path], wanted[path]
            return f"{path} is {dtype}{shape}, but {wanted_dtype}{wanted_shape} is expected"
    return None


def read_parts(path: epath.Path, parts: Iterable[Any]) -> Iterator[Any]:
    """The arrays of each abstract tree in `parts`, one tree after another. A tree may have PLACEHOLDER leaves."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for part in parts:
            arguments = ocp.checkpoint_utils.construct_restore_args(part)
            yield checkpointer.restore(path, args=ocp.args.PyTreeRestore(part, restore_args=arguments))
