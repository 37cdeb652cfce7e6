"""The real train step of a config, compiled for devices that are not here."""

import dataclasses
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from nextllm_jax.config import Config
from nextllm_jax.data.packing import Batch
from nextllm_jax.errors import RunFailed
from nextllm_jax.sharding import sharding
from nextllm_jax.training.program import build_program

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, as the compiler lays them out."""

    argument_bytes: int
    """The training state and the batch."""
    output_bytes: int
    """The new state and the metrics."""
    alias_bytes: int
    """Of the output, what takes the place of donated arguments."""
    temporary_bytes: int
    """Activations, gradients, gathered weights and buffers of collectives."""
    code_bytes: int
    """The program itself."""
    peak_bytes: int
    """The most that is alive at once, arguments included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """What the compiler says of a program that does not fit; None where it does not say."""

    needed_bytes: int | None
    limit_bytes: int | None
    message: str
    """Its first lines."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled program, or why there is none."""

    seconds: float
    memory: Memory | None = None
    out_of_memory: OutOfMemory | None = None
    hlo: str = ""
    """The optimized program of one device."""
    flops: float | None = None
    """What the compiler counts, the bodies of loops once."""


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """The shapes, types and shardings of a global batch."""
    shape = (config.training.global_batch_size, config.data.sequence_length)
    layout = sharding(mesh, "batch", "seq")
    layout.shard_shape(shape)  # raises ValueError where the mesh does not divide it
    dtypes = (jnp.int32,) * 4 + (jnp.bool_,)
    return Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for dtype in dtypes))


def compile_train_step(config: Config, mesh: Mesh, say: Say) -> Compiled:
    """The train step of `training.program` on a mesh, compiled; `say` hears of the progress.

    Raises RunFailed for an error of the compiler other than a lack of memory.
    """
    program = build_program(config, mesh)
    with jax.set_mesh(mesh):
        lowered = program.train_step.lower(program.abstract_state, abstract_batch(config, mesh))  # pyright: ignore
    return compile_lowered(lowered, say)


def compile_lowered(lowered: Any, say: Say) -> Compiled:
    """A lowered jitted function, compiled."""
    began = time.monotonic()
    try:
        with _Clock(say):
            compiled = lowered.compile()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            first = str(error).splitlines()[0]
            raise RunFailed(f"the compiler gave up: {first}") from error
        return Compiled(seconds=time.monotonic() - began, out_of_memory=parse_out_of_memory(str(error)))
    cost = compiled.cost_analysis() or {}
    return Compiled(
        seconds=time.monotonic() - began,
        memory=memory_of(compiled),
        hlo=compiled.as_text(),
        flops=cost.get("flops"),
    )


def memory_of(compiled: Any) -> Memory:
    """The memory of one device, from the compiler's own table."""
    stats = compiled.memory_analysis()
    return Memory(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temporary_bytes=stats.temp_size_in_bytes,
        code_bytes=stats.generated_code_size_in_bytes,
        peak_bytes=stats.peak_memory_in_bytes,
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def parse_out_of_memory(message: str) -> OutOfMemory:
    """The numbers in the TPU compiler's message, such as "Used 28.59G of 15.75G hbm"."""
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return OutOfMemory(
        needed_bytes=_bytes(used[1], used[2]) if used else None,
        limit_bytes=_bytes(used[3], used[4]) if used else None,
        message="\n".join(lines[:12]),
    )


class _Clock:
    """Says every few seconds how long the compiler has been at work, which says nothing itself."""

    def __init__(self, say: Say, every_seconds: float = 1.0) -> None:
        self._say = say
        self._every_seconds = every_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def _tick(self) -> None:
        began = time.monotonic()
        while not self._done.wait(self._every_seconds):
            self._say(f"compiling, {time.monotonic() - began:.0f} s; models of billions take 1 to 3 minutes")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
