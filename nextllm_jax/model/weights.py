"""Metadata of each weight of a model, and the layout of the layers in a tree of parameters.

A module declares a weight once, with `declare`. Everything else (accounting, weight decay, adapters, quantization,
norms per layer, names in other formats) reads the `Weight` boxes of `transformer.abstract_params`.

Layers of a period of the layer patterns are stacked: the tree has `layers/block_<i>/...` with one leading axis per
period, then `remainder_<i>/...` for each layer after the last whole period. `transformer.py` creates this
layout; other modules use the helpers here.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.ops.quantized import QTensor

Kind = Literal["matrix", "router", "embedding", "norm", "bias", "selection_bias", "adapter"]
"""matrix: of a product in the layers; router: the matrix of a router, used in float32; selection_bias: added to the
scores by which experts are chosen, and not trained by gradients."""

STACK = "layers"
"""Name of the subtree of stacked layers, and the logical axis that they are stacked along."""
EXPERTS = "experts"
"""The logical axis along which the matrices of a layer's experts are stacked."""
_REMAINDER = "remainder_"


class Weight(nn.LogicallyPartitioned):
    """A parameter in its box: `value` and the logical axes `names`, and the kind of parameter."""

    kind: Kind = flax.struct.field(default="matrix", pytree_node=False)
    num_inputs: int = flax.struct.field(default=0, pytree_node=False)
    """Leading axes, after the stacking axes, that a matrix contracts; 0 for other kinds."""

    @property
    def num_stacked(self) -> int:
        """Number of stacking axes, which come first: layers, experts, both or none."""
        return sum(name in (STACK, EXPERTS) for name in self.names[:2])

    @property
    def contracted_axes(self) -> tuple[int, ...]:
        """The axes that a product contracts: the inputs of a matrix, or the last axis of an embedding (as the head)."""
        if self.kind == "embedding":
            return (len(self.names) - 1,)
        return tuple(range(self.num_stacked, self.num_stacked + self.num_inputs))


def declare(
    module: nn.Module,
    name: str,
    kind: Kind,
    init: Callable[..., jax.Array],
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: Any,
    *,
    num_inputs: int = 0,
) -> jax.Array:
    """Create the parameter `name` of a module, and return its value; `axes` are the logical names of its dimensions."""

    def boxed(*args: Any) -> Weight:
        return Weight(init(*args), axes, kind=kind, num_inputs=num_inputs)

    return module.param(name, boxed, shape, dtype)  # pyright: ignore[reportReturnType]


def is_weight(leaf: Any) -> bool:
    """Whether a node of a tree is a boxed weight."""
    return isinstance(leaf, Weight)


def path_name(path: Iterable[Any]) -> str:
    """The name of a leaf from its key path, such as "layers/block_0/mlp/up/kernel", with or without boxes."""
    return "/".join(step.key for step in path if isinstance(step, jax.tree_util.DictKey))


def by_name(tree: Any) -> dict[str, Any]:
    """The weights of a parameter tree (boxed, quantized or plain) by name."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_whole)
    return {path_name(path): leaf for path, leaf in flat}


def with_names(tree: Any, weights: dict[str, Any]) -> Any:
    """The tree with its weights replaced by `weights`, which is keyed as in `by_name`."""
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_is_whole), [weights[name] for name in by_name(tree)])


def _is_whole(leaf: Any) -> bool:
    return isinstance(leaf, Weight | QTensor)


def of_kind(boxed: Any, *kinds: Kind) -> dict[str, Weight]:
    """The weights of these kinds, by name."""
    return {name: weight for name, weight in by_name(boxed).items() if weight.kind in kinds}


def map_weights(change: Callable[..., Any], boxed: Any, *trees: Any) -> Any:
    """A tree of `change(weight, *leaves)`, where `leaves` are the leaves of `trees` that correspond to the weight."""
    return jax.tree.map(change, boxed, *trees, is_leaf=is_weight)


def layer_paths(config: ModelConfig, *, stacked: bool = True) -> list[tuple[str, int | None]]:
    """(name of the subtree, index in the stack) of each layer; the index is None for a layer that is not stacked."""
    size = len(config.period)
    num_scanned = config.num_layers // size * size if stacked else 0
    return [
        (f"{STACK}/block_{layer % size}", layer // size)
        if layer < num_scanned
        else (f"{_REMAINDER}{layer - num_scanned}", None)
        for layer in range(config.num_layers)
    ]


def is_stacked(path: Iterable[Any]) -> bool:
    """Whether a leaf at this key path, of a tree that contains parameters, is stacked over layers."""
    return any(getattr(step, "key", None) == STACK for step in path)


def unstack_layers(config: ModelConfig, params: Any) -> Any:
    """The parameters for a Transformer without scan_layers, a subtree for each layer: arrays, or abstract in boxes.

    Copies the layers; delete the stacked tree to free its memory.
    """
    unstacked = {name: tree for name, tree in params.items() if name != STACK and not name.startswith(_REMAINDER)}
    for layer, (name, index) in enumerate(layer_paths(config)):
        one = functools.partial(_of_layer, index=index)
        unstacked[f"{_REMAINDER}{layer}"] = jax.tree.map(one, subtree(params, name), is_leaf=is_weight)
    return unstacked


def _of_layer(leaf: Any, index: int | None) -> Any:
    """The part of a weight that belongs to a layer, given its index in the stack."""
    if index is None:
        return leaf
    if not is_weight(leaf):
        return leaf[index]
    abstract = jax.ShapeDtypeStruct(leaf.value.shape[1:], leaf.value.dtype)
    return leaf.replace(value=abstract, names=leaf.names[1:])


def stack_layers(config: ModelConfig, params: Any) -> Any:
    """The inverse of `unstack_layers`: the parameters with layers stacked for a scan."""
    stacked = {name: tree for name, tree in params.items() if not name.startswith(_REMAINDER)}
    groups: dict[str, list[Any]] = {}
    for layer, (name, _) in enumerate(layer_paths(config)):
        groups.setdefault(name, []).append(params[f"{_REMAINDER}{layer}"])
    for name, layers in groups.items():
        if name.startswith(_REMAINDER):
            (stacked[name],) = layers
        else:
            block = name.removeprefix(f"{STACK}/")
            stacked.setdefault(STACK, {})[block] = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    return stacked


def unstacked_names(config: ModelConfig, name: str) -> list[tuple[str, int | None]]:
    """(name after `unstack_layers`, index in the stack or None if not stacked) for each layer of a weight."""
    layers = [
        (f"{_REMAINDER}{layer}{name.removeprefix(prefix)}", index)
        for layer, (prefix, index) in enumerate(layer_paths(config))
        if name.startswith(f"{prefix}/")
    ]
    return layers or [(name, None)]


def in_layer_order(config: ModelConfig, tree: Any, value: Callable[[Any, int], jax.Array]) -> jax.Array:
    """`value` of each layer's subtree, stacked along a new first axis: [L, ...].

    `value(subtree, n)` reduces all but the first n axes of its leaves: 1 for a stack of layers, 0 for a single layer.
    """
    size = len(config.period)
    num_periods, num_rest = divmod(config.num_layers, size) if STACK in tree else (0, config.num_layers)
    parts = [value(tree.get(f"{_REMAINDER}{i}", {}), 0)[None] for i in range(num_rest)]
    if num_periods:
        stacks = jnp.stack([value(subtree(tree, f"{STACK}/block_{i}"), 1) for i in range(size)], axis=1)
        parts.insert(0, stacks.reshape(-1, *stacks.shape[2:]))
    return jnp.concatenate(parts)


def subtree(tree: Any, name: str) -> Any:
    """The subtree with this name; {} if there is none, as in a tree of adapters."""
    for step in name.split("/"):
        tree = tree.get(step, {})
    return tree


def cast_matrices(boxed: Any, params: Any, dtype: np.dtype) -> Any:
    """The parameters (or abstract arrays) in `dtype`, as the model would cast them: not those of norms and routers.

    `boxed` is the `abstract_params` of the same tree.
    """

    def cast(weight: Weight, leaf: Any) -> Any:
        if weight.kind in ("norm", "router", "selection_bias"):
            return leaf
        return leaf.astype(dtype) if isinstance(leaf, jax.Array) else leaf.update(dtype=dtype)

    return map_weights(cast, boxed, params)
