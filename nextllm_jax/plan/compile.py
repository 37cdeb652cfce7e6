"""The real train step of a config, compiled for devices that are not here."""

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

from nextllm_jax.config import Config, MeshConfig
from nextllm_jax.errors import RunFailed
from nextllm_jax.model.accounting import flops_per_token
from nextllm_jax.model.objective import Batch
from nextllm_jax.progress import progress_bar
from nextllm_jax.sharding import make_mesh, sharding
from nextllm_jax.training.program import build_program


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
    host_bytes: int
    """In the host's memory: what is offloaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """What the compiler says of a program that does not fit; None where it does not say."""

    needed_bytes: int | None
    """Of the whole program."""
    temporary_bytes: int | None
    """Of its temporaries alone."""
    limit_bytes: int | None
    """What a program can have."""
    message: str
    """The first line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled program, or why there is none."""

    seconds: float
    memory: Memory | None = None
    out_of_memory: OutOfMemory | None = None
    hlo: str = ""
    """The optimized program of one device."""
    output_shardings: Any = None
    """A tree of them."""


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """The shapes, types and shardings of a global batch."""
    shape = (config.training.global_batch_size, config.data.sequence_length)
    layout = sharding(mesh, "batch", "seq")
    dtypes = (jnp.int32,) * 4 + (jnp.bool_,)
    return Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for dtype in dtypes))


def compile_train_step(config: Config, mesh: Mesh) -> Compiled:
    """The train step of `training.program` on a mesh, compiled.

    Raises RunFailed for an error of the compiler other than a lack of memory.
    """
    return compile_lowered(_lower_train_step(config, mesh), "train step")


def flops_of_two_layers(config: Config) -> tuple[float, float]:
    """(by arithmetic, by the compiler's count) FLOPs of a train step with two layers of the model, or one of each kind.

    The compiler counts the bodies of loops once, so the layers are a single period here, the loss is a single chunk,
    attention goes over no blocks, and nothing is recomputed. It is compiled for this machine's processor: what is
    multiplied is the same.
    """
    pattern = config.model.layer_pattern
    pattern = pattern * 2 if len(pattern) == 1 else pattern
    length = min(config.data.sequence_length, 2048)
    plain = {"remat": "none", "remat_offload": False, "attention": "xla", "dtype": "float32"}
    model = dataclasses.replace(config.model, num_layers=len(pattern), layer_pattern=pattern, **plain)
    small = dataclasses.replace(
        config,
        model=model,
        optimizer=dataclasses.replace(config.optimizer, offload_state=False),
        data=dataclasses.replace(config.data, sequence_length=length),
        training=dataclasses.replace(config.training, global_batch_size=1, accumulation_steps=1),
    )
    mesh = make_mesh(MeshConfig(), jax.devices("cpu")[:1])
    counted = _lower_train_step(small, mesh).compile().cost_analysis()["flops"]
    return flops_per_token(model, length) * length, counted


def _lower_train_step(config: Config, mesh: Mesh) -> Any:
    program = build_program(config, mesh)
    with jax.set_mesh(mesh):
        return program.train_step.lower(program.abstract_state, abstract_batch(config, mesh))  # pyright: ignore


def compile_lowered(lowered: Any, name: str) -> Compiled:
    """A lowered jitted function, compiled; `name` is what the progress bar calls it.

    Raises RunFailed for an error of the compiler other than a lack of memory.
    """
    began = time.monotonic()
    try:
        with _elapsed_time(f"compiling the {name} (1 to 3 minutes for billions of parameters)"):
            compiled = lowered.compile()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            first = str(error).splitlines()[0]
            raise RunFailed(f"the compiler gave up: {first}") from error
        return Compiled(seconds=time.monotonic() - began, out_of_memory=parse_out_of_memory(str(error)))
    return Compiled(
        seconds=time.monotonic() - began,
        memory=memory_of(compiled),
        hlo=compiled.as_text(),
        output_shardings=compiled.output_shardings,
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
        # The compiler counts outputs in the host's memory too, though it takes programs that fit without them.
        peak_bytes=stats.peak_memory_in_bytes - stats.host_output_size_in_bytes,
        host_bytes=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
    )


def parse_out_of_memory(message: str) -> OutOfMemory:
    """The numbers in the TPU compiler's message.

    It says "Used 28.59G of 15.75G hbm" of a whole program, or, when it gives up early, "the total memory required for
    HLO temporaries (43.40G) exceeds available HBM (15.75G)".
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
