"""Plans sampling: memory, traffic and time of prefill and a decode step on devices that this machine does not have."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from nextllm_jax.config import Config, ModelConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import Chip
from nextllm_jax.inference.decode import decode
from nextllm_jax.inference.engine import RING_SLACK
from nextllm_jax.inference.load import decoding_model
from nextllm_jax.inference.programs import Network, create, prefill
from nextllm_jax.inference.slot import IDLE, stacked
from nextllm_jax.model.accounting import flops_per_token
from nextllm_jax.model.transformer import Transformer, resolve_dtype
from nextllm_jax.model.weights import path_name
from nextllm_jax.plan.collectives import Collective, Traffic, collectives
from nextllm_jax.plan.compile import Compiled, compile_lowered
from nextllm_jax.plan.roofline import Roofline, roofline
from nextllm_jax.plan.topology import Target
from nextllm_jax.sharding import num_parts, placed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A batch of prompts of equal length."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    quantize_cache: bool = False

    @property
    def cache_length(self) -> int:
        """Cache slots per row."""
        return self.prompt_tokens + self.new_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A compiled program: prefill or a decode step."""

    compiled: Compiled
    traffic: Mapping[Collective, Traffic] | None
    roofline: Roofline | None
    """None if it does not fit."""
    tokens: int
    """Tokens that one run of the program reads or generates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingPlan:
    """Memory, traffic and time of sampling. A decode step is one iteration of the decode loop."""

    topology: str
    device_kind: str
    chip: Chip
    mesh: Mapping[str, int]
    request: Request
    quantization: Quantization | None
    parameter_bytes: int
    """Bytes of the parameters on one device."""
    cache_bytes: int
    """Bytes of the cache of all rows, summed over devices; replicated values count once."""
    prefill: Phase
    decode: Phase | None
    """None if prefill does not fit."""


def plan_decoding(
    config: Config, target: Target, request: Request, quantization: Quantization | None = None
) -> DecodingPlan:
    """The plan of sampling `request` with the config's model, compiled for all devices of `target`.

    Raises InputError if nothing can be compiled for the devices, if mesh, rows and number of devices do not match, or
    if the matrices cannot be quantized as asked.
    """
    mesh = target.mesh(config)
    chip = target.chip
    if isinstance(mesh, AbstractMesh) or chip is None:
        raise InputError(f"cannot compile for {target.name} without such devices; give a --topology")
    _check(config, request, mesh)
    dtype = resolve_dtype(config.model.dtype, mesh.devices.flat[0].platform)
    model, params = decoding_model(config.model, dtype, functools.partial(placed, mesh), quantization)
    parameter_bytes = bytes_on_device(params)
    # Only the rows of the tokens are read from the embedding, unless it is tied to the head.
    read_bytes = parameter_bytes - (0 if config.model.tie_embeddings else bytes_on_device(params["embed"]))
    experts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "/experts/" in path_name(path)]

    def phase(compiled: Compiled, tokens_per_row: int) -> Phase:
        """The phase of a program that processes `tokens_per_row` tokens and reads the matrices and the cache once."""
        tokens = request.batch_size * tokens_per_row
        if not compiled.hlo:
            return Phase(compiled=compiled, traffic=None, roofline=None, tokens=tokens)
        traffic = collectives(compiled.hlo, mesh.shape, config.mesh.slices).traffic
        flops = tokens * flops_per_token(config.model, tokens_per_row) / 3
        unread = bytes_on_device(experts) * unused_experts(config.model, tokens)
        limit = roofline(flops, read_bytes - unread + cache_bytes / mesh.size, traffic, mesh, chip)
        return Phase(compiled=compiled, traffic=traffic, roofline=limit, tokens=tokens)

    with jax.set_mesh(mesh):
        state = _compile_state(model, request)
        cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
        first = _compile_prefill(model, params, state, mesh, request)
        second = _compile_decode(model, params, state, mesh, request) if first.hlo else None
    return DecodingPlan(
        topology=target.name,
        device_kind=target.device_kind,
        chip=chip,
        mesh=dict(mesh.shape),
        request=request,
        quantization=quantization,
        parameter_bytes=parameter_bytes,
        cache_bytes=cache_bytes,
        prefill=phase(first, request.prompt_tokens),
        decode=phase(second, 1) if second else None,
    )


def unused_experts(config: ModelConfig, num_tokens: int) -> float:
    """The expected fraction of a layer's experts that none of so many tokens chooses, if all are equally likely."""
    return (1 - config.experts_per_token / config.num_experts) ** num_tokens if config.num_experts else 0.0


def bytes_on_device(abstract: Any) -> int:
    """Bytes per device of a pytree of abstract arrays with shardings, without the padding of a chip's tiles.

    Two int4 values take one byte.
    """
    leaves = jax.tree.leaves(abstract)
    bits = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bits(leaf.dtype) for leaf in leaves)
    return bits // 8


def _bits(dtype: np.dtype) -> int:
    return 4 if dtype == jnp.int4 else 8 * dtype.itemsize


def _check(config: Config, request: Request, mesh: Mesh) -> None:
    parts = num_parts(mesh, "batch")
    if request.batch_size % parts:
        raise InputError(
            f"batch_size {request.batch_size} is not divisible by mesh.data x fsdp x expert = {parts}; give more rows, "
            f"or another mesh such as --mesh.data 1 --mesh.fsdp 1 --mesh.tensor {mesh.devices.size}"
        )
    if request.cache_length > config.model.context_length:
        raise InputError(
            f"prompt_tokens {request.prompt_tokens} and new_tokens {request.new_tokens} together exceed "
            f"model.context_length {config.model.context_length}"
        )


def _array(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _compile_state(model: Transformer, request: Request) -> Any:
    """The abstract state of slots for the request."""
    size = {"num_slots": request.batch_size, "length": request.cache_length, "ring_slack": RING_SLACK}
    lowered = create.lower(model, None, **size, quantize_cache=request.quantize_cache)
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        lowered.out_info,
        lowered.compile().output_shardings,
    )


def _compile_prefill(model: Transformer, params: Any, state: Any, mesh: Mesh, request: Request) -> Compiled:
    B, T = request.batch_size, request.prompt_tokens
    arguments = _array(mesh, jnp.int32, B), _array(mesh, jnp.int32, B, T), _array(mesh, jnp.int32, B)
    lowered = prefill.lower(Network(model, params), None, state, *arguments, length=request.cache_length)
    return compile_lowered(lowered, "prefill")


def _compile_decode(model: Transformer, params: Any, state: Any, mesh: Mesh, request: Request) -> Compiled:
    """The compiled decode loop. It counts as one iteration, since its trip count is known only at run time."""
    rows = jax.tree.map(lambda x: _array(mesh, x.dtype, *x.shape), stacked([IDLE] * request.batch_size))
    allowed_BW = _array(mesh, jnp.uint32, request.batch_size, -(-model.config.vocab_size // 32))
    limits = _array(mesh, jnp.int32), _array(mesh, jnp.bool_)
    static = {"vocab_size": model.config.vocab_size, "length": request.cache_length}
    lowered = decode.lower(Network(model, params), None, state, rows, allowed_BW, None, *limits, **static)
    return compile_lowered(lowered, "decode step")
