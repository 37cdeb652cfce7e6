"""Low-rank adapters on frozen weights (Hu et al. 2021, arXiv:2106.09685): x @ W + alpha / rank * (x @ A) @ B.

A tree of adapters mirrors the parameters and holds {"a", "b"} in place of each adapted kernel; A is random and B zero
at first, so that training begins with the function of the frozen weights. `layers.Linear` adds their product where the
model is applied with a collection "adapters".
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from nextllm_jax.config import LoraConfig
from nextllm_jax.ops.quantized import QTensor, dequantize, quantize


@flax.struct.dataclass
class Frozen:
    """What adapters stand on."""

    params: Any
    """The model's parameters, its kernels perhaps as QTensors."""
    scale: float = flax.struct.field(pytree_node=False)
    """alpha / rank."""


def variables(params: Any, frozen: Frozen | None) -> dict[str, Any]:
    """What to apply the model to: its parameters or, if there are frozen ones, `params` as their adapters."""
    if frozen is None:
        return {"params": params}

    def scaled(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf * frozen.scale if path[-1].key == "a" else leaf

    return {"params": frozen.params, "adapters": jax.tree_util.tree_map_with_path(scaled, params)}


def weights(params: Any, frozen: Frozen | None) -> Any:
    """The model's parameters proper, without adapters."""
    return params if frozen is None else frozen.params


def _input_axes(module: str, names: tuple[str, ...]) -> tuple[int, ...]:
    """The axes of a kernel (the logical names of all are given) that its module sums over."""
    first = int(names[0] == "layers")
    return (first, first + 1) if module == "o" else (first,)


def create(config: LoraConfig, boxed: Any, key: jax.Array) -> Any:
    """Adapters, float32 in Flax's boxes, for a model's parameters, arrays or shapes, in boxes."""

    def pair(box: Any, inputs: tuple[int, ...], key: jax.Array) -> dict[str, Any]:
        shape, names, (first, *_, last) = box.value.shape, box.names, (inputs[0], inputs[-1])
        layers, outputs = slice(0, first), slice(last + 1, None)
        fan_in = math.prod(shape[axis] for axis in inputs)
        a = jax.random.normal(key, (*shape[: last + 1], config.rank)) / math.sqrt(fan_in)
        b = jnp.zeros((*shape[layers], config.rank, *shape[outputs]))
        return {
            "a": box.replace(value=a, names=(*names[: last + 1], "rank")),
            "b": box.replace(value=b, names=(*names[layers], "rank", *names[outputs])),
        }

    def adapted(tree: Any, module: str, key: jax.Array) -> Any:
        if "kernel" in tree:
            box = tree["kernel"]
            return pair(box, _input_axes(module, box.names), key) if module in config.targets else {}
        subtrees = [(name, tree[name]) for name in sorted(tree) if isinstance(tree[name], dict)]
        made = {name: adapted(sub, name, jax.random.fold_in(key, i)) for i, (name, sub) in enumerate(subtrees)}
        return {name: sub for name, sub in made.items() if sub}

    return adapted(boxed, "", key)


def _map_kernels(change: Any, boxed: Any, *trees: Any) -> Any:
    """The last tree, with `change(box, input axes, *leaves)` in place of each kernel; all have the tree of `boxed`."""

    def one(path: Any, box: Any, *leaves: Any) -> Any:
        names = [step.key for step in path]
        if names[-1] != "kernel":
            return (box, *leaves)[-1]
        return change(box, _input_axes(names[-2], box.names), *leaves)

    return jax.tree_util.tree_map_with_path(one, boxed, *trees, is_leaf=lambda leaf: hasattr(leaf, "names"))


def abstract_frozen(config: LoraConfig, boxed: Any) -> Any:
    """The shapes of what `freeze` makes of a model's parameters, whose shapes `boxed` holds; in boxes."""
    if config.frozen == "unquantized":
        return boxed

    def quantized(box: Any, inputs: tuple[int, ...]) -> QTensor:
        shapes = jax.eval_shape(functools.partial(quantize, input_axes=inputs), box.value)
        names = tuple(None if axis in inputs else name for axis, name in enumerate(box.names))
        return QTensor(box.replace(value=shapes.q), box.replace(value=shapes.scale, names=names))

    return _map_kernels(quantized, boxed)


def freeze(config: LoraConfig, boxed: Any, params: Any) -> Any:
    """The parameters as they are kept while adapters are trained; those that are quantized are used up.

    `boxed` holds their shapes. One after the other, so that there is little more than the parameters at any time.
    """
    if config.frozen == "unquantized":
        return params
    quantized = jax.jit(quantize, static_argnums=1)

    def replaced(_: Any, inputs: tuple[int, ...], kernel: jax.Array) -> QTensor:
        made = quantized(kernel, inputs)
        kernel.delete()
        return made

    return _map_kernels(replaced, boxed, params)


def merge(params: Any, frozen: Frozen, dtype: jax.typing.DTypeLike) -> Any:
    """The parameters, in `dtype`, of a model without adapters that computes the same: W + scale * A @ B."""

    def merged(weights: Any, adapters: Any) -> Any:
        if isinstance(weights, dict):
            made = {name: merged(leaf, adapters.get(name, {})) for name, leaf in weights.items() if name != "kernel"}
            if "kernel" in weights:
                made["kernel"] = _merged_kernel(weights["kernel"], adapters, frozen.scale).astype(dtype)
            return made
        return weights

    return merged(frozen.params, params)


def _merged_kernel(kernel: jax.Array | QTensor, adapters: dict[str, jax.Array], scale: float) -> jax.Array:
    dense = dequantize(kernel, jnp.float32) if isinstance(kernel, QTensor) else kernel
    if not adapters:
        return dense
    a, b = adapters["a"], adapters["b"]
    stacked = a.ndim + b.ndim == dense.ndim + 3
    # Products of float32 in full, whatever a platform takes for good enough.
    multiply = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
    delta = (jax.vmap(multiply) if stacked else multiply)(a, b)
    return dense.astype(jnp.float32) + scale * delta
