"""The arrays of a saved tree: their entries in the manifest (path, dtype, shape, checksum), and reading them."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from nextllm_jax.ops.checksum import checksum

PLACEHOLDER = ocp.PLACEHOLDER
"""Takes the place of leaves that are not part of a partial tree."""


def leaves_of(tree: Any) -> dict[str, list[Any]]:
    """[dtype, shape] of each leaf, by its path, such as "layers/mlp/up/kernel"."""
    return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in _by_path(tree).items()}


def checksums_of(tree: Any) -> dict[str, jax.Array]:
    """The checksum of each array, by its path. PLACEHOLDER leaves have none. Does not wait for the devices."""
    return {
        path: checksum(leaf, getattr(leaf, "sharding", None))
        for path, leaf in _by_path(tree).items()
        if leaf is not PLACEHOLDER
    }


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


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


def read(path: epath.Path, part: Any) -> Any:
    """The arrays of an abstract tree, which may have PLACEHOLDER leaves. Does not wait for other processes."""
    arguments = ocp.checkpoint_utils.construct_restore_args(part)
    handler = ocp.PyTreeCheckpointHandler()  # an ocp.Checkpointer would wait for a process that has failed
    try:
        return handler.restore(path, args=ocp.args.PyTreeRestore(part, restore_args=arguments))
    finally:
        handler.close()
