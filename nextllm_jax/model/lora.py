"""Low-rank adapters on frozen weights (Hu et al. 2021, arXiv:2106.09685): x @ W + alpha / rank * (x @ A) @ B.

A tree of adapters mirrors the parameters and holds {"a", "b"} in place of each adapted kernel. A is initialized
randomly and B with zeros, so the model first computes the same as without adapters. `layers.Linear` adds their product
if the model is applied with a collection "adapters".
"""

import functools
import math
import zlib
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp

from nextllm_jax.config import LoraConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError
from nextllm_jax.model.quantize import abstract_quantized, is_quantized
from nextllm_jax.model.weights import Weight, by_name, is_weight, of_kind, path_name
from nextllm_jax.ops.quantized import dequantize


@flax.struct.dataclass
class Frozen:
    """The frozen base weights of adapters."""

    params: Any
    """The model's parameters; kernels may be QTensors."""
    scale: float = flax.struct.field(pytree_node=False)
    """alpha / rank."""


def variables(params: Any, frozen: Frozen | None) -> dict[str, Any]:
    """The variables to apply the model with. With `frozen` base weights, `params` are their adapters."""
    if frozen is None:
        return {"params": params}

    def scaled(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf * frozen.scale if path[-1].key == "a" else leaf

    return {"params": frozen.params, "adapters": jax.tree_util.tree_map_with_path(scaled, params)}


def weights(params: Any, frozen: Frozen | None) -> Any:
    """The model's own parameters, without adapters."""
    return params if frozen is None else frozen.params


def adapted(config: LoraConfig, boxed: Any) -> dict[str, Weight]:
    """The matrices that get adapters, by name. `boxed` holds the model's parameters in `Weight` boxes.

    Raises InputError if `config.targets` names no matrix of the model.
    """
    matrices = of_kind(boxed, "matrix")
    known = sorted({_module(name) for name in matrices})
    unknown = [target for target in config.targets if target not in known]
    if unknown:
        raise InputError(
            f"lora.targets has {unknown[0]!r}, which is not a matrix of the model; choose from {' '.join(known)}"
        )
    targets = config.targets or known
    return {name: weight for name, weight in matrices.items() if _module(name) in targets}


def create(config: LoraConfig, boxed: Any, key: jax.Array) -> Any:
    """New adapters, float32 in `Weight` boxes. `boxed` holds the model's parameters or their shapes in boxes.

    The random key of a matrix is derived from its name, so it does not depend on which other matrices are adapted.
    Raises InputError as `adapted` does.
    """
    adapters: dict[str, Weight] = {}
    for name, weight in adapted(config, boxed).items():
        module = name.rpartition("/")[0]
        pair = _pair(weight, config.rank, jax.random.fold_in(key, zlib.crc32(name.encode())))
        adapters[f"{module}/a"], adapters[f"{module}/b"] = pair
    return flax.traverse_util.unflatten_dict(adapters, sep="/")


def _module(name: str) -> str:
    """The name of a weight's module: "q" for "layers/block_0/attention/q/kernel"."""
    return name.split("/")[-2]


def _pair(weight: Weight, rank: int, key: jax.Array) -> tuple[Weight, Weight]:
    """The two factors of a matrix: [..., inputs, R] random, [..., R, outputs] zero."""
    stacked, inputs = weight.num_stacked, weight.num_stacked + weight.num_inputs
    shape, names = weight.value.shape, weight.names
    adapter = weight.replace(kind="adapter", num_inputs=0)
    a = jax.random.normal(key, (*shape[:inputs], rank)) / math.sqrt(math.prod(shape[stacked:inputs]))
    b = jnp.zeros((*shape[:stacked], rank, *shape[inputs:]))
    return (
        adapter.replace(value=a, names=(*names[:inputs], "rank")),
        adapter.replace(value=b, names=(*names[:stacked], "rank", *names[inputs:])),
    )


def abstract_frozen(config: LoraConfig, boxed: Any, placed: Any) -> Any:
    """The frozen parameters as abstract arrays, quantized if `config.frozen` asks for it.

    `placed` holds the model's abstract parameters with shardings, `boxed` the `Weight`s of the same tree.
    """
    quantization = None if config.frozen == "unquantized" else Quantization(scheme=config.frozen)
    return abstract_quantized(boxed, placed, quantization)


def merge(boxed: Any, params: Any, frozen: Frozen, dtype: jax.typing.DTypeLike) -> Any:
    """The parameters with the adapters merged, W + scale * A @ B; matrices in `dtype`.

    `boxed` holds the `Weight`s of the model.
    """
    adapters = by_name(params)

    def merged(path: Any, weight: Weight, leaf: Any) -> Any:
        return merged_weight(path_name(path), weight, leaf, adapters, frozen.scale, dtype)

    return jax.tree_util.tree_map_with_path(merged, boxed, frozen.params, is_leaf=is_weight)


def merged_weight(
    name: str, weight: Weight, leaf: Any, adapters: dict[str, Any], scale: float, dtype: jax.typing.DTypeLike
) -> Any:
    """One parameter of `merge`. `adapters` holds all adapters by name."""
    if weight.kind != "matrix":
        return leaf
    dense = dequantize(leaf, jnp.float32) if is_quantized(leaf) else leaf
    module = name.rpartition("/")[0]
    if f"{module}/a" in adapters:
        delta = _product(adapters[f"{module}/a"], adapters[f"{module}/b"], weight.num_stacked)
        dense = dense.astype(jnp.float32) + scale * delta
    return dense.astype(dtype)


def _product(a: jax.Array, b: jax.Array, num_stacked: int) -> jax.Array:
    """A @ B, in full float32 precision on every platform."""
    multiply = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
    for _ in range(num_stacked):
        multiply = jax.vmap(multiply)
    return multiply(a, b)
