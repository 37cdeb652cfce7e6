"""The plan of sampling: what prefill and a decode step take on a mesh of devices that are not here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from nextllm_jax.config import Config, SamplingConfig
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import Chip
from nextllm_jax.inference.generate import decode, prefill
from nextllm_jax.inference.llm import MAX_UNROLLED_LAYERS
from nextllm_jax.model.accounting import flops_per_token, kv_cache_bytes
from nextllm_jax.model.transformer import Transformer, abstract_params, resolve_dtype
from nextllm_jax.model.weights import cast_matrices
from nextllm_jax.plan.collectives import Collective, Traffic, collectives
from nextllm_jax.plan.compile import Compiled, compile_lowered
from nextllm_jax.plan.roofline import Roofline, communication_seconds
from nextllm_jax.plan.topology import Place, Say
from nextllm_jax.sharding import placed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is sampled at once."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int

    @property
    def cache_length(self) -> int:
        """Slots of the cache of a row."""
        return self.prompt_tokens + self.new_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One of the two programs, compiled."""

    compiled: Compiled
    traffic: Mapping[Collective, Traffic] | None
    roofline: Roofline | None
    """None if it does not fit."""
    tokens: int
    """That it reads or makes in one run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingPlan:
    """What sampling takes. The decode step is the loop's body, run once."""

    topology: str
    device_kind: str
    chip: Chip
    mesh: Mapping[str, int]
    request: Request
    parameter_bytes: int
    """On one device."""
    cache_bytes: int
    """Of all rows, on all devices together, each value once."""
    prefill: Phase
    decode: Phase | None
    """None if prefill does not fit."""


def plan_decoding(config: Config, place: Place, request: Request, say: Say) -> DecodingPlan:
    """Prefill and decoding of `request` with the config's model on all devices of a place, compiled for them.

    Raises InputError if mesh, rows and devices do not go together.
    """
    mesh = place.mesh(config)
    if isinstance(mesh, AbstractMesh):
        raise InputError(f"{place.name} cannot be compiled for without such devices; give a --topology")
    _check(config, request, mesh)
    dtype = resolve_dtype(config.model.dtype, mesh.devices.flat[0].platform)
    scan_layers = config.model.num_layers > MAX_UNROLLED_LAYERS
    model = Transformer(config.model.without_remat(), dtype, scan_layers)
    params = _abstract_params(model, mesh)
    programs = _Programs(model, params, mesh, request, say)
    first, state = programs.prefill()
    second = programs.decode(state) if state is not None else None
    work = _Work(config, place.chip, mesh, request, _shard_bytes(params), dtype.itemsize)
    return DecodingPlan(
        topology=place.name,
        device_kind=place.device_kind,
        chip=place.chip,
        mesh=dict(mesh.shape),
        request=request,
        parameter_bytes=_shard_bytes(params),
        cache_bytes=work.cache_bytes,
        prefill=work.phase(first, request.prompt_tokens),
        decode=work.phase(second, 1) if second else None,
    )


def _check(config: Config, request: Request, mesh: Mesh) -> None:
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if request.batch_size % parts:
        raise InputError(
            f"batch_size {request.batch_size} is not divisible by mesh.data x mesh.fsdp = {parts}; give more rows, or "
            f"another mesh such as --mesh.data 1 --mesh.fsdp 1 --mesh.tensor {mesh.devices.size}"
        )
    if request.cache_length > config.model.context_length:
        raise InputError(
            f"prompt_tokens {request.prompt_tokens} and new_tokens {request.new_tokens} are together over "
            f"model.context_length {config.model.context_length}"
        )


def _abstract_params(model: Transformer, mesh: Mesh) -> Any:
    """Shapes, types and shardings of the parameters as sampling has them: matrices in the type of the products."""
    boxed = abstract_params(model.config, scan_layers=model.scan_layers)
    return cast_matrices(boxed, placed(mesh, boxed), model.dtype)


def _shard_bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int)) * leaf.dtype.itemsize for leaf in leaves)


class _Programs:
    """The two programs of `inference.generate`, compiled for a mesh."""

    def __init__(self, model: Transformer, params: Any, mesh: Mesh, request: Request, say: Say) -> None:
        self._model, self._params, self._mesh, self._request, self._say = model, params, mesh, request, say

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, PartitionSpec()))

    def prefill(self) -> tuple[Compiled, Any]:
        """The program, and the abstract state that it gives; None if it does not fit."""
        request = self._request
        tokens_BT = self._array((request.batch_size, request.prompt_tokens), jnp.int32)
        lengths_B = self._array((request.batch_size,), jnp.int32)
        static = {"cache_length": request.cache_length, "track_seen": False}
        with jax.set_mesh(self._mesh):
            lowered = prefill.lower(self._model, self._params, tokens_BT, lengths_B, **static)
            compiled = compile_lowered(lowered, self._say, "prefill")
        if compiled.output_shardings is None:
            return compiled, None
        return compiled, jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
            lowered.out_info,
            compiled.output_shardings,
        )

    def decode(self, state: Any) -> Compiled:
        """The program; its loop over tokens counts as one step, since its length is known only when it runs."""
        rows = self._request.batch_size
        arguments = (
            self._array((), jnp.int32),
            self._array((rows,), jnp.bool_),
            self._array((), jnp.uint32),
            self._array((rows,), jnp.int32),
            self._array((1,), jnp.int32),
        )
        static = {"sampling": SamplingConfig(), "vocab_size": self._model.config.vocab_size}
        with jax.set_mesh(self._mesh):
            lowered = decode.lower(self._model, self._params, state, *arguments, **static)
            return compile_lowered(lowered, self._say, "decode step")


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a run of a program has to do on one device."""

    config: Config
    chip: Chip
    mesh: Mesh
    request: Request
    parameter_bytes: int
    bytes_per_value: int

    @property
    def cache_bytes(self) -> int:
        request = self.request
        return kv_cache_bytes(
            self.config.model,
            batch_size=request.batch_size,
            length=request.cache_length,
            bytes_per_value=self.bytes_per_value,
        )

    def phase(self, compiled: Compiled, tokens_per_row: int) -> Phase:
        """A compiled program that takes `tokens_per_row` tokens of each row through the model.

        It reads the parameters and writes or reads the whole cache once.
        """
        tokens = self.request.batch_size * tokens_per_row
        if not compiled.hlo:
            return Phase(compiled=compiled, traffic=None, roofline=None, tokens=tokens)
        traffic = collectives(compiled.hlo, self.mesh.shape, self.config.mesh.slices).traffic
        ici, network = communication_seconds(traffic, self.mesh, self.chip)
        devices = self.mesh.devices.size
        flops = tokens * flops_per_token(self.config.model, tokens_per_row) / 3
        through_memory = self.parameter_bytes + self.cache_bytes / devices
        roofline = Roofline(
            compute=flops / (devices * self.chip.peak_flops_bf16),
            hbm=through_memory / self.chip.hbm_bandwidth,
            ici=ici,
            network=network,
        )
        return Phase(compiled=compiled, traffic=traffic, roofline=roofline, tokens=tokens)
