"""The arrays of a saved tree: their entries in the manifest (path, dtype, shape, checksum), and reading them."""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from nextllm_jax.ops.checksum import partial_checksums

PLACEHOLDER = ocp.PLACEHOLDER
"""Takes the place of leaves that are not part of a partial tree."""


def leaves_of(tree: Any) -> dict[str, list[Any]]:
    """[dtype, shape] of each leaf, by its path, such as "layers/mlp/up/kernel"."""
    return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in _by_path(tree).items()}


def start_checksums(tree: Any) -> dict[str, jax.Array]:
    """What `finish_checksums` needs of each array, by its path, except PLACEHOLDER leaves.

    The arrays may be donated afterwards. Every process must call it. Several processes wait for the result, a single
    one does not.
    """
    compile_checksums(tree)
    parts = {path: _programs[_kind(leaf)].result()(leaf) for path, leaf in _arrays_of(tree).items()}
    # Of these programs only the sums communicate. On CPUs, programs that communicate must not be in flight together
    # with others that do: processes may run them in different orders, and then wait for each other forever.
    shared = {path: part for path, part in parts.items() if not part.is_fully_addressable}
    return parts | jax.block_until_ready(_sums(shared))


def compile_checksums(tree: Any) -> None:
    """Start compiling the programs that `start_checksums` runs, in threads. `tree` may be abstract."""
    for kind in dict.fromkeys(map(_kind, _arrays_of(tree).values())):
        if kind not in _programs:  # two threads may both compile it, which does no harm
            _programs[kind] = _threads.submit(_compiled, kind)


def _arrays_of(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, except PLACEHOLDER."""
    return {path: leaf for path, leaf in _by_path(tree).items() if leaf is not PLACEHOLDER}


def _kind(leaf: Any) -> "_Kind":
    return leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)


def finish_checksums(parts: dict[str, jax.Array]) -> dict[str, int]:
    """The checksum of each array."""
    return {path: int(np.sum(part, dtype=np.uint32)) for path, part in jax.device_get(parts).items()}


_Kind = tuple[tuple[int, ...], Any, jax.sharding.Sharding | None]
_threads = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="checksums")
_programs: dict[_Kind, concurrent.futures.Future[Callable[[Any], jax.Array]]] = {}


def _compiled(kind: _Kind) -> Callable[[Any], jax.Array]:
    """The program for arrays with a shape, dtype and sharding."""
    shape, dtype, sharding = kind
    return partial_checksums.lower(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding), sharding).compile()


@jax.jit
def _sums(parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The sum of each array over all processes, as a replicated uint32 scalar."""
    return {path: jnp.sum(part, dtype=jnp.uint32) for path, part in parts.items()}


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
