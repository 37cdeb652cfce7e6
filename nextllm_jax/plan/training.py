"""The plan of a training: what its step takes on devices that are not here."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from nextllm_jax.config import Config
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import Chip
from nextllm_jax.model.accounting import flops_per_token, parameter_count
from nextllm_jax.plan.advice import advice
from nextllm_jax.plan.collectives import Collective, Traffic, collectives
from nextllm_jax.plan.compile import Memory, OutOfMemory, compile_train_step, flops_of_two_layers
from nextllm_jax.plan.estimate import (
    argument_bytes,
    memory_traffic_bytes,
    minimum_traffic,
    peak_bytes,
    recomputed_flops_per_token,
)
from nextllm_jax.plan.roofline import Roofline, roofline
from nextllm_jax.plan.topology import Place
from nextllm_jax.training.start import check_divides

_log = logging.getLogger(__name__)


class FlopsCheck(NamedTuple):
    """FLOPs of a step of two layers of the model, counted twice."""

    by_arithmetic: float
    by_compiler: float

    @property
    def relative_difference(self) -> float:
        """How much more the compiler counts: norms, softmax and the optimizer, and scores above the diagonal."""
        return self.by_compiler / self.by_arithmetic - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a train step takes. Bytes are those of one device."""

    config: Config
    topology: str
    device_kind: str
    chip: Chip
    mesh: Mapping[str, int]
    argument_bytes: int
    """The training state and the batch."""
    memory: Memory | None
    """None where the compiler ran out of it, or was not asked."""
    estimated_peak_bytes: int
    out_of_memory: OutOfMemory | None
    traffic: Mapping[Collective, Traffic] | None
    """What the compiled step sends; None where there is none."""
    minimum: Mapping[Collective, Traffic]
    """What it must send at least."""
    unknown_loops: int
    roofline: Roofline
    flops_check: FlopsCheck | None
    compile_seconds: float | None
    """None for an estimate."""
    advice: Sequence[str] = ()
    """What to change if it does not fit."""
    hlo: str = ""
    """The compiled program's text."""

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return int(np.prod(list(self.mesh.values())))

    @property
    def limit_bytes(self) -> int:
        """Memory that a program can have."""
        said = self.out_of_memory.limit_bytes if self.out_of_memory else None
        return said or self.chip.hbm_bytes

    @property
    def needed_bytes(self) -> int | None:
        """Memory that a program needs which the compiler gave up, as far as it says."""
        said = self.out_of_memory
        if said is None:
            return None
        return said.needed_bytes or (said.temporary_bytes and said.temporary_bytes + self.argument_bytes)

    @property
    def fits(self) -> bool:
        """Whether the step's memory is there."""
        if self.out_of_memory:
            return False
        peak = self.memory.peak_bytes if self.memory else self.estimated_peak_bytes
        return peak <= self.chip.hbm_bytes

    @property
    def parameters(self) -> int:
        """Of the model."""
        return parameter_count(self.config.model)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.config.training.global_batch_size * self.config.data.sequence_length

    @property
    def flops_per_step(self) -> float:
        """Of the model, without what remat repeats."""
        return self.tokens_per_step * flops_per_token(self.config.model, self.config.data.sequence_length)

    @property
    def tokens_per_second(self) -> float:
        """At most, of all devices together."""
        return self.tokens_per_step / self.roofline.seconds

    @property
    def mfu_bound(self) -> float:
        """The model's FLOP/s at that rate, as a share of the peak."""
        return self.flops_per_step / (self.roofline.seconds * self.num_devices * self.chip.peak_flops_bf16)


def plan_training(config: Config, place: Place, *, check: bool = True) -> TrainingPlan:
    """The plan of a config on all devices of a place, its train step compiled for them.

    `check`: count the FLOPs of two layers too. Raises InputError if mesh, batch and devices do not go together.
    """
    estimate = estimate_training(config, place)
    mesh = place.mesh(config)
    if isinstance(mesh, AbstractMesh):
        raise InputError(f"{place.name} cannot be compiled for without such devices; estimate with --fast")
    if check:
        _log.info("counting the FLOPs of two layers")
    flops_check = FlopsCheck(*flops_of_two_layers(config)) if check else None
    compiled = compile_train_step(config, mesh)
    found = collectives(compiled.hlo, mesh.shape, config.mesh.slices) if compiled.hlo else None
    traffic = found.traffic if found else None
    plan = dataclasses.replace(
        estimate,
        memory=compiled.memory,
        out_of_memory=compiled.out_of_memory,
        traffic=traffic,
        unknown_loops=found.unknown_loops if found else 0,
        roofline=_roofline(config, mesh, place.chip, traffic or estimate.minimum, estimate.argument_bytes),
        flops_check=flops_check,
        compile_seconds=compiled.seconds,
        advice=(),
        hlo=compiled.hlo,
    )
    return _advised(plan, place)


def estimate_training(config: Config, place: Place) -> TrainingPlan:
    """The plan of a config on all devices of a place by arithmetic: nothing is compiled.

    Raises InputError if mesh, batch and devices do not go together.
    """
    mesh = place.mesh(config)
    check_divides(config, mesh)
    arguments = argument_bytes(config, mesh)
    minimum = minimum_traffic(config, mesh.shape)
    plan = TrainingPlan(
        config=config,
        topology=place.name,
        device_kind=place.device_kind,
        chip=place.chip,
        mesh=dict(mesh.shape),
        argument_bytes=arguments,
        estimated_peak_bytes=peak_bytes(config, mesh.shape, arguments),
        memory=None,
        out_of_memory=None,
        traffic=None,
        minimum=minimum,
        unknown_loops=0,
        roofline=_roofline(config, mesh, place.chip, minimum, arguments),
        flops_check=None,
        compile_seconds=None,
    )
    return _advised(plan, place)


def _advised(plan: TrainingPlan, place: Place) -> TrainingPlan:
    """The plan with advice if it does not fit; estimates are scaled by what the compiler says of the plan itself."""
    if plan.fits:
        return plan
    scale = max(1.0, (plan.needed_bytes or 0) / plan.estimated_peak_bytes)

    def peak(config: Config) -> float:
        mesh = place.mesh(config)
        check_divides(config, mesh)
        return scale * peak_bytes(config, mesh.shape, argument_bytes(config, mesh))

    sentences = advice(plan.config, plan.mesh, plan.limit_bytes, peak)
    return dataclasses.replace(plan, advice=sentences)


def _roofline(
    config: Config, mesh: Mesh | AbstractMesh, chip: Chip, traffic: Mapping[Collective, Traffic], state_bytes: float
) -> Roofline:
    """The roofline of a train step that sends `traffic` and keeps `state_bytes` on each device."""
    length, tokens = config.data.sequence_length, config.training.global_batch_size * config.data.sequence_length
    flops = flops_per_token(config.model, length) + recomputed_flops_per_token(config.model, length)
    through_memory = memory_traffic_bytes(config, mesh.shape, state_bytes)
    return roofline(flops * tokens, through_memory, traffic, mesh, chip)
