"""The arrays of a saved tree: as its manifest lists them (path, dtype and shape of each leaf), and read by parts."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

PLACEHOLDER = ocp.PLACEHOLDER
"""Stands in place of the leaves that a part of a saved tree leaves out."""


def leaves_of(tree: Any) -> dict[str, list[Any]]:
    """Path of each leaf, such as "layers/mlp/up/kernel" -> [dtype, shape]."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in leaves
    }


def mismatch(saved: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> str | None:
    """What is wrong with the first leaf that differs, or None."""
    for path in [*wanted, *saved]:
        if path not in saved:
            return f"{path} is not there"
        if path not in wanted:
            return f"{path} is there but not wanted"
        if saved[path] != wanted[path]:
            (dtype, shape), (wanted_dtype, wanted_shape) = saved[path], wanted[path]
            return f"{path} is {dtype}{shape} there, {wanted_dtype}{wanted_shape} is wanted"
    return None


def read_parts(path: epath.Path, parts: Iterable[Any]) -> Iterator[Any]:
    """The arrays of abstract trees, one tree after another; each may leave leaves out, with PLACEHOLDER."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for part in parts:
            arguments = ocp.checkpoint_utils.construct_restore_args(part)
            yield checkpointer.restore(path, args=ocp.args.PyTreeRestore(part, restore_args=arguments))
