"""Selects the weights to quantize, and converts one weight at a time.

The target is a tree of abstract parameters with a QTensor of abstract arrays in place of each weight to quantize. All
code that loads parameters converts one weight after another, so the whole float model is never in memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError
from nextllm_jax.model.weights import Weight, by_name, is_weight, with_names
from nextllm_jax.ops.quantized import QTensor, dequantize, pack, quantize, unpack
from nextllm_jax.sharding import resized

Observer = Callable[[str, jax.Array | None, QTensor], None]
"""Called with the name of each weight that was quantized, before and after. A stack of layers may come whole, or layer
by layer, without its first axis. Before is None if the quantized values are those of the file."""


def ignore(name: str, before: jax.Array | None, after: QTensor) -> None:
    """The Observer that does nothing."""


def abstract_quantized(boxed: Any, placed: Any, quantization: Quantization | None) -> Any:
    """`placed` with abstract QTensors for the weights that are quantized; `placed` itself for None.

    `boxed` holds the `Weight`s of the same tree, `placed` abstract arrays with shardings. A scale is sharded as its
    matrix; along the inputs it may be whole, where its groups cannot be divided.

    Raises InputError if the group size does not divide the inputs of a matrix.
    """
    if quantization is None:
        return placed
    _require_groups(boxed, quantization)

    def quantized(weight: Weight, leaf: jax.ShapeDtypeStruct) -> Any:
        scheme = quantization.of_kind(weight.kind)
        return leaf if scheme is None else _abstract(weight, leaf, scheme)

    return jax.tree.map(quantized, boxed, placed, is_leaf=is_weight)


def _require_groups(boxed: Any, quantization: Quantization) -> None:
    """Raise InputError, with a group size that fits all matrices, unless that of `quantization` does."""
    sizes, num_inputs = {}, {}
    for name, weight in by_name(boxed).items():
        scheme = quantization.of_kind(weight.kind)
        if scheme is not None and scheme.inputs_per_scale is not None:
            sizes[name] = scheme.inputs_per_scale
            num_inputs[name] = math.prod(weight.value.shape[axis] for axis in weight.contracted_axes)
    fitting = math.gcd(*sizes.values(), *num_inputs.values())
    for name, size in sizes.items():
        if num_inputs[name] % size:
            groups = "" if fitting % 2 else f"nextllm quantize --group-size {fitting}, which fits all matrices, or "
            raise InputError(
                f"group_size {size} does not divide the {num_inputs[name]} inputs of {name}; use {groups}int8 by "
                "output channel"
            )


def _abstract(weight: Weight, leaf: jax.ShapeDtypeStruct, quantization: Quantization) -> QTensor:
    *outer, last = weight.contracted_axes
    group, shape = quantization.inputs_per_scale, list(leaf.shape)
    # Of several input axes, which are heads and their width, the last alone has groups.
    shape[last] = 1 if group is None else shape[last] // math.gcd(shape[last], group)
    for axis in outer if group is None else ():
        shape[axis] = 1
    scale = _like(leaf, shape, jnp.float32 if group is None else jnp.float16)
    minimum = None if quantization.scheme == "int8" or quantization.symmetric else scale
    q: Any = leaf.update(dtype=jnp.dtype(quantization.scheme))
    return QTensor(q, scale, minimum)


def _like(leaf: Any, shape: Any, dtype: Any) -> Any:
    sharding = resized(leaf.sharding, leaf.shape, shape)
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def abstract_packed(tree: Any) -> Any:
    """An abstract tree as files hold it: see `ops.quantized.pack`."""

    def packed(leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        q = jax.eval_shape(pack, leaf).q
        return dataclasses.replace(leaf, q=_like(leaf.q, q.shape, q.dtype))

    return jax.tree.map(packed, tree, is_leaf=is_quantized)


def is_quantized(leaf: Any) -> bool:
    """Whether a node of a tree is a quantized weight."""
    return isinstance(leaf, QTensor)


def convert(leaf: Any, like: Any, *, name: str = "a weight") -> Any:
    """A weight, as it is or as a file holds it, in the form and on the devices of `like`, which is abstract.

    Raises InputError for a weight that is quantized in another way than `like`, since nothing is rounded twice, and,
    with `name`, for one whose scales are not finite when it is quantized.
    """
    if not is_quantized(leaf) and not is_quantized(like):
        return jax.device_put(leaf.astype(like.dtype), like.sharding)
    made = _converter(like, is_quantized(leaf))(leaf)
    if not is_quantized(leaf):
        require_finite(name, made)
    return made


def require_finite(name: str, made: QTensor) -> None:
    """Raise InputError, with the weight's name, unless the scales and minima of a quantized weight are finite."""
    if not _is_finite(made):
        in_groups = made.scale.dtype == jnp.float16
        cause = "exceed the float16 scales of groups, or are" if in_groups else "are"
        advice = "use int8 by output channel" if in_groups else "restore intact weights"
        raise InputError(f"{name} holds values that {cause} not finite; {advice}")


@jax.jit
def _is_finite(x: QTensor) -> jax.Array:
    floats = [part for part in (x.scale, x.minimum) if part is not None]
    return jnp.all(jnp.stack([jnp.isfinite(part).all() for part in floats]))


def regroup(params: Any, like: Any) -> Any:
    """Quantized parameters rounded a second time where `like`, which is abstract, has other types or groups."""
    weights = by_name(params)
    del params  # each weight is freed when it is rounded
    for name, wanted in by_name(like).items():
        if is_quantized(wanted) and _layout(weights[name]) != _layout(wanted):
            weights[name] = convert(dequantize(weights[name], jnp.float32), wanted, name=name)
    return with_names(like, weights)


@functools.lru_cache(maxsize=256)
def _converter(like: Any, from_quantized: bool) -> Callable[[Any], Any]:
    def change(leaf: Any) -> Any:
        if not from_quantized:
            return quantize(leaf, like)
        return _unpacked(leaf, like) if is_quantized(like) else dequantize(unpack(leaf), like.dtype)

    return jax.jit(change, out_shardings=jax.tree.map(lambda part: part.sharding, like))


def _unpacked(leaf: QTensor, like: QTensor) -> QTensor:
    made = unpack(leaf)
    if _layout(made) != _layout(like):
        raise InputError("the weights are already quantized with other settings; leave out --quantize or --lora.frozen")
    return made


def _layout(x: QTensor) -> list[Any]:
    """The shapes and types of a quantized weight's parts."""
    return [(part.shape, part.dtype) for part in jax.tree.leaves(x)]
