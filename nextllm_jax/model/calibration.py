"""GPTQ calibration: int4 weights chosen to compensate for rounding errors on a sample text."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nextllm_jax.config import ModelConfig
from nextllm_jax.errors import InputError, RunFailed
from nextllm_jax.model.attention_kernel import AttentionKernel
from nextllm_jax.model.layers import INPUTS
from nextllm_jax.model.quantize import Observer, convert, ignore, is_quantized, require_finite
from nextllm_jax.model.transformer import Block, Transformer, ropes
from nextllm_jax.model.weights import by_name, layer_paths, path_name, with_names
from nextllm_jax.ops.gptq import quantize_for_inputs

_NUM_WINDOWS = 128
_WINDOW = 512
_BATCH_SIZE = 8
"""Windows that a layer reads together."""


def calibration_windows(document: Sequence[int], context_length: int) -> np.ndarray:
    """At most 128 windows, int32 [B, T], spread evenly over a document; T is 512, or the context length if shorter.

    Raises InputError if the document does not fill one.
    """
    T = min(context_length, _WINDOW)
    count = len(document) // T
    if count == 0:
        raise InputError(f"the calibration text has {len(document)} tokens; at least {T} are needed")
    windows_BT = np.asarray(document[: count * T], np.int32).reshape(count, T)
    return windows_BT[np.linspace(0, count - 1, min(count, _NUM_WINDOWS)).astype(int)]


def calibrate(
    config: ModelConfig, params: Any, like: Any, windows_BT: np.ndarray, *, observe: Observer = ignore
) -> Any:
    """The parameters quantized as `like` says. A layer is calibrated on the output of the quantized layers before it.

    `params` and `like`, which is abstract, are those of a Transformer without scan_layers. The embedding and the head
    are rounded without calibration. The first local device needs memory for the embedding, a layer, float32
    [inputs, inputs] for each of its matrices, and twice the residual stream of all windows, float32 [B, T, D]; `params`
    may be elsewhere. Call it under `jax.default_matmul_precision("highest")`.

    Raises RunFailed if an activation of the model is not finite.
    """
    device = jax.local_devices()[0]
    paths = [path for path, _ in layer_paths(config, stacked=False)]
    new = {name: _quantized(name, params[name], like[name], {}, observe) for name in params if name not in paths}
    model = Transformer(config.for_inference(), jnp.float32, scan_layers=False)
    embed = jax.jit(functools.partial(model.apply, method="embedded"))
    embedding = {"params": jax.device_put({"embed": new["embed"]}, device)}
    starts = range(0, len(windows_BT), _BATCH_SIZE)
    batches = [embed(embedding, windows_BT[start : start + _BATCH_SIZE]) for start in starts]
    for i, path in enumerate(paths):
        block = Block(model.config, *config.period[i % len(config.period)], model.dtype, AttentionKernel())
        layer = jax.device_put(params[path], device)
        sums = (_sums_of_squares(block, layer, x_BTD) for x_BTD in batches)
        hessians = functools.reduce(functools.partial(jax.tree.map, jnp.add), sums)
        new[path] = _quantized(path, layer, like[path], hessians, observe)
        layer = jax.device_put(new[path], device)
        batches = [_output(block, layer, x_BTD) for x_BTD in batches]
    return new


def _quantized(prefix: str, tree: Any, like: Any, hessians: dict[str, jax.Array], observe: Observer) -> Any:
    """A subtree in the form and on the devices of `like`, calibrated where there is a Hessian."""
    floats, new = by_name(tree), {}
    for name, wanted in by_name(like).items():
        hessian_II = hessians.get(name.removesuffix("/kernel"))
        if hessian_II is None or not is_quantized(wanted):
            new[name] = convert(floats[name], wanted, name=f"{prefix}/{name}")
        elif not jnp.isfinite(hessian_II).all():
            raise RunFailed(f"the inputs of {prefix}/{name} are not finite on the calibration text; check the model")
        else:
            rounded = quantize_for_inputs(floats[name], hessian_II, wanted)
            require_finite(f"{prefix}/{name}", rounded)
            new[name] = jax.tree.map(lambda part, like: jax.device_put(part, like.sharding), rounded, wanted)
        if is_quantized(wanted):
            observe(f"{prefix}/{name}", floats[name], new[name])
    return with_names(like, new)


@functools.partial(jax.jit, static_argnums=0)
def _sums_of_squares(block: Block, layer: Any, x_BTD: jax.Array) -> dict[str, jax.Array]:
    """x^T x, float32 [inputs, inputs], of what each module of a layer multiplies with its kernel, by its path."""
    _, recorded = _run(block, layer, x_BTD)
    inputs = jax.tree_util.tree_leaves_with_path(recorded[INPUTS])
    flat = {path_name(path[:-2]): x.reshape(-1, math.prod(x.shape[2:])) for path, x in inputs}
    return {name: x.T @ x for name, x in flat.items()}


@functools.partial(jax.jit, static_argnums=0)
def _output(block: Block, layer: Any, x_BTD: jax.Array) -> jax.Array:
    return _run(block, layer, x_BTD)[0]


def _run(block: Block, layer: Any, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
    """The layer's output, and the variables that it recorded."""
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
    context = (ropes(block.config, positions_BT), positions_BT, None, None, 0)
    (y_BTD, _), recorded = block.apply({"params": layer}, x_BTD, *context, mutable=[INPUTS])
    return y_BTD, recorded
