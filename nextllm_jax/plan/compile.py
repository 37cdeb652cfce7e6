"""Compiles the train step of a config for devices that this machine does not have."""

import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from nextllm_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from nextllm_jax.errors import RunFailed
from nextllm_jax.model.accounting import flops_per_token
from nextllm_jax.model.objective import Batch
from nextllm_jax.progress import progress_bar
from nextllm_jax.sharding import make_mesh, sharding
from nextllm_jax.training.program import build_program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a compiled program in bytes, on one device."""

    argument_bytes: int
    """The training state and the batch."""
    output_bytes: int
    """The new state and the metrics."""
    alias_bytes: int
    """The part of the output that reuses the memory of donated arguments."""
    temporary_bytes: int
    """Activations, gradients, gathered weights and buffers of collectives."""
    code_bytes: int
    """The program itself."""
    peak_bytes: int
    """Peak memory, including the arguments."""
    host_bytes: int
    """Offloaded arrays, in host memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """What the compiler reports about a program that does not fit. Numbers that it does not report are None."""

    needed_bytes: int | None
    """Memory of the whole program."""
    temporary_bytes: int | None
    """Memory of the temporaries alone."""
    limit_bytes: int | None
    """Memory that is available to a program."""
    message: str
    """The first line of the compiler's message."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled program, or the reason why it does not fit."""

    seconds: float
    memory: Memory | None = None
    out_of_memory: OutOfMemory | None = None
    hlo: str = ""
    """The optimized program of one device."""
    output_shardings: Any = None
    """The shardings of the output, as a pytree."""


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """The shapes, types and shardings of a global batch."""
    shape = (config.training.global_batch_size, config.data.sequence_length)
    layout = sharding(mesh, "batch", "seq")
    dtypes = (jnp.int32,) * 4 + (jnp.bool_,)
    return Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for dtype in dtypes))


def compile_train_step(config: Config, mesh: Mesh) -> Compiled:
    """The compiled train step of a config on a mesh.

    Raises RunFailed for a compiler error other than running out of memory.
    """
    return compile_lowered(_lower_train_step(config, mesh), "train step")


def flops_of_two_layers(config: Config) -> tuple[float, float]:
    """FLOPs of a train step with two layers of the model (or one period of its patterns): (formula, compiler).

    The compiler counts the body of a loop once. Therefore this step has a single period of layers, a single chunk in
    the loss, attention without blocks, no recomputation, and AdamW, whose update has no products. In place of experts,
    it has an MLP as wide as those of a token together. It is compiled for the CPU, which does the same products.
    """
    kinds = config.model.period
    kinds = kinds * 2 if len(kinds) == 1 else kinds
    length = min(config.data.sequence_length, 2048)
    plain = {"remat": "none", "remat_offload": False, "attention": "xla", "dtype": "float32"}
    pattern = tuple(kind for kind, _ in kinds)
    model = dataclasses.replace(config.model, num_layers=len(pattern), layer_pattern=pattern, **plain)
    small = dataclasses.replace(
        config,
        model=_without_experts(model),
        optimizer=OptimizerConfig(),
        data=dataclasses.replace(config.data, sequence_length=length),
        training=dataclasses.replace(config.training, global_batch_size=1, accumulation_steps=1),
    )
    mesh = make_mesh(MeshConfig(), jax.devices("cpu")[:1])
    counted = _lower_train_step(small, mesh).compile().cost_analysis()["flops"]
    return flops_per_token(model, length) * length, counted


def _without_experts(model: ModelConfig) -> ModelConfig:
    """The model with dense MLPs, whose products of a token have the same size as those of the experts in sum."""
    if not model.num_experts:
        return model
    sparse = len(model.sparse_layers)
    width = model.experts_per_token * (model.expert_mlp_dim or model.mlp_dim) + model.shared_expert_mlp_dim
    widths = (model.num_layers - sparse) * model.mlp_dim + sparse * width
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    of_experts = ("num_experts", "expert_mlp_dim", "mlp_pattern", "shared_expert_mlp_dim", "shared_expert_gate",
                  "selection_bias", "capacity_factor")  # fmt: skip
    return dataclasses.replace(
        model, mlp_dim=round(widths / model.num_layers), **{name: defaults[name] for name in of_experts}
    )


def _lower_train_step(config: Config, mesh: Mesh) -> Any:
    program = build_program(config, mesh)
    with jax.set_mesh(mesh):
        return program.train_step.lower(program.abstract_state, abstract_batch(config, mesh))  # pyright: ignore


def compile_lowered(lowered: Any, name: str) -> Compiled:
    """The compiled program of a lowered function. The progress bar shows `name`.

    Raises RunFailed for a compiler error other than running out of memory.
    """
    began = time.monotonic()
    try:
        with _elapsed_time(f"compiling the {name} (1 to 3 minutes for billions of parameters)"):
            compiled = lowered.compile()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            first = str(error).splitlines()[0]
            raise RunFailed(f"compilation failed: {first}") from error
        return Compiled(seconds=time.monotonic() - began, out_of_memory=parse_out_of_memory(str(error)))
    return Compiled(
        seconds=time.monotonic() - began,
        memory=memory_of(compiled),
        hlo=compiled.as_text(),
        output_shardings=compiled.output_shardings,
    )


def memory_of(compiled: Any) -> Memory:
    """The memory of a compiled program, from the compiler's analysis."""
    stats = compiled.memory_analysis()
    return Memory(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temporary_bytes=stats.temp_size_in_bytes,
        code_bytes=stats.generated_code_size_in_bytes,
        # The compiler's peak includes outputs in host memory, but a program that fits without them is accepted.
        peak_bytes=stats.peak_memory_in_bytes - stats.host_output_size_in_bytes,
        host_bytes=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
    )


def parse_out_of_memory(message: str) -> OutOfMemory:
    """The numbers in the TPU compiler's out-of-memory message.

    The message says "Used 28.59G of 15.75G hbm" about the whole program. If compilation stops early, it says "the total
    memory required for HLO temporaries (43.40G) exceeds available HBM (15.75G)".
    """
    used = re.search(rf"[Uu]sed {_SIZE} of {_SIZE} hbm", message)
    temporaries = re.search(rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)", message)
    found = used or temporaries
    needed, limit = (_bytes(found[1], found[2]), _bytes(found[3], found[4])) if found else (None, None)
    return OutOfMemory(
        needed_bytes=None if temporaries else needed,
        temporary_bytes=needed if temporaries else None,
        limit_bytes=limit,
        message=message.strip().splitlines()[0],
    )


_SIZE = r"([\d.]+)([KMGT]?)"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


@contextlib.contextmanager
def _elapsed_time(desc: str) -> Iterator[None]:
    """A context whose elapsed time is shown each second, since the compiler reports no progress."""
    done = threading.Event()
    with progress_bar(desc=desc) as bar:

        def tick() -> None:
            while not done.wait(1.0):
                bar.update(0)

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
