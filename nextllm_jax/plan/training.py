"""Plans training: memory, traffic and time of a train step on devices that this machine does not have."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from nextllm_jax.config import Config
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import Chip
from nextllm_jax.model.accounting import (
    SaveEstimate,
    active_parameter_count,
    flops_per_token,
    parameter_count,
    save_estimate,
)
from nextllm_jax.plan.advice import advice
from nextllm_jax.plan.collectives import Collective, Traffic, collectives
from nextllm_jax.plan.compile import Memory, OutOfMemory, compile_train_step, flops_of_two_layers
from nextllm_jax.plan.estimate import (
    argument_bytes,
    memory_traffic_bytes,
    minimum_traffic,
    peak_bytes,
    recomputed_flops_per_token,
    update_flops_of_a_device,
)
from nextllm_jax.plan.roofline import Roofline, roofline
from nextllm_jax.plan.topology import Target
from nextllm_jax.training.start import check_divides

_log = logging.getLogger(__name__)


class FlopsCheck(NamedTuple):
    """FLOPs of a train step with two layers, by formula and by the compiler."""

    by_arithmetic: float
    by_compiler: float

    @property
    def relative_difference(self) -> float:
        """By how much the compiler counts more: norms, softmax, the optimizer, and attention above the diagonal."""
        return self.by_compiler / self.by_arithmetic - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Memory, traffic and time of a train step. Bytes are per device."""

    config: Config
    topology: str
    device_kind: str
    chip: Chip | None
    """Limits of a device; None if they are unknown."""
    mesh: Mapping[str, int]
    save: SaveEstimate
    argument_bytes: int
    """The training state and the batch."""
    memory: Memory | None
    """Memory of the compiled step; None if it does not fit, or for an estimate."""
    estimated_peak_bytes: int
    out_of_memory: OutOfMemory | None
    traffic: Mapping[Collective, Traffic] | None
    """What the compiled step sends; None without a compiled step."""
    minimum: Mapping[Collective, Traffic]
    """A lower bound on what a step sends."""
    unknown_loops: int
    """Loops with collectives whose trip count is unknown; they count as one iteration."""
    roofline: Roofline | None
    """None for an unknown chip."""
    flops_check: FlopsCheck | None
    compile_seconds: float | None
    """None for an estimate."""
    advice: Sequence[str] = ()
    """Changes that make it fit, in the order in which to try them; empty if it fits."""
    hlo: str = ""
    """The text of the compiled program; empty without one."""

    @property
    def num_devices(self) -> int:
        """Number of devices in the mesh."""
        return int(np.prod(list(self.mesh.values())))

    @property
    def limit_bytes(self) -> int | None:
        """Memory that is available to a program; None for an unknown chip."""
        reported = self.out_of_memory.limit_bytes if self.out_of_memory else None
        return reported or (self.chip and self.chip.hbm_bytes)

    @property
    def needed_bytes(self) -> int | None:
        """Memory that a program that does not fit needs, if the compiler reports it."""
        report = self.out_of_memory
        if report is None:
            return None
        return report.needed_bytes or (report.temporary_bytes and report.temporary_bytes + self.argument_bytes)

    @property
    def fits(self) -> bool | None:
        """Whether the step fits into the memory of a device; None for an unknown chip."""
        if self.out_of_memory:
            return False
        if self.chip is None:
            return None
        peak = self.memory.peak_bytes if self.memory else self.estimated_peak_bytes
        return peak <= self.chip.hbm_bytes

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return parameter_count(self.config.model)

    @property
    def active_parameters(self) -> int:
        """Number of parameters that process a token."""
        return active_parameter_count(self.config.model)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.config.training.global_batch_size * self.config.data.sequence_length

    @property
    def flops_per_step(self) -> float:
        """FLOPs of the model, without recomputation."""
        return self.tokens_per_step * flops_per_token(self.config.model, self.config.data.sequence_length)

    @property
    def tokens_per_second(self) -> float | None:
        """Upper bound on the throughput of all devices together; None for an unknown chip."""
        return self.roofline and self.tokens_per_step / self.roofline.seconds

    @property
    def mfu_bound(self) -> float | None:
        """Upper bound on the model FLOPs utilization; None for an unknown chip."""
        if self.roofline is None or self.chip is None:
            return None
        return self.flops_per_step / (self.roofline.seconds * self.num_devices * self.chip.peak_flops_bf16)


def plan_training(config: Config, target: Target, *, check: bool = True) -> TrainingPlan:
    """The plan of a config whose train step is compiled for all devices of `target`.

    `check` compares the FLOPs of two layers with the compiler's count. Raises InputError if nothing can be compiled for
    the devices, or if mesh, batch and number of devices do not match.
    """
    estimate = estimate_training(config, target)
    mesh = target.mesh(config)
    if isinstance(mesh, AbstractMesh):
        raise InputError(f"cannot compile for {target.name} without such devices; estimate with --fast")
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
        roofline=_roofline(config, mesh, target.chip, traffic or estimate.minimum, estimate.argument_bytes),
        flops_check=flops_check,
        compile_seconds=compiled.seconds,
        advice=(),
        hlo=compiled.hlo,
    )
    return _advised(plan, target)


def estimate_training(config: Config, target: Target) -> TrainingPlan:
    """The estimated plan of a config on all devices of `target`. Nothing is compiled.

    Raises InputError if mesh, batch and number of devices do not match.
    """
    mesh = target.mesh(config)
    check_divides(config, mesh)
    arguments = argument_bytes(config, mesh)
    minimum = minimum_traffic(config, mesh.shape)
    plan = TrainingPlan(
        config=config,
        topology=target.name,
        device_kind=target.device_kind,
        chip=target.chip,
        mesh=dict(mesh.shape),
        save=save_estimate(config, target.num_hosts),
        argument_bytes=arguments,
        estimated_peak_bytes=peak_bytes(config, mesh.shape, arguments),
        memory=None,
        out_of_memory=None,
        traffic=None,
        minimum=minimum,
        unknown_loops=0,
        roofline=_roofline(config, mesh, target.chip, minimum, arguments),
        flops_check=None,
        compile_seconds=None,
    )
    return _advised(plan, target)


def _advised(plan: TrainingPlan, target: Target) -> TrainingPlan:
    """The plan, with advice if it does not fit. Estimates in it are scaled to match what the compiler reported."""
    limit = plan.limit_bytes
    if plan.fits or limit is None:
        return plan
    scale = max(1.0, (plan.needed_bytes or 0) / plan.estimated_peak_bytes)

    def peak(config: Config) -> float:
        mesh = target.mesh(config)
        check_divides(config, mesh)
        return scale * peak_bytes(config, mesh.shape, argument_bytes(config, mesh))

    sentences = advice(plan.config, plan.mesh, limit, peak)
    return dataclasses.replace(plan, advice=sentences)


def _roofline(
    config: Config,
    mesh: Mesh | AbstractMesh,
    chip: Chip | None,
    traffic: Mapping[Collective, Traffic],
    state_bytes: float,
) -> Roofline | None:
    """The roofline of a train step that sends `traffic` and holds `state_bytes` on each device.

    None for an unknown chip.
    """
    if chip is None:
        return None
    length, tokens = config.data.sequence_length, config.training.global_batch_size * config.data.sequence_length
    flops = flops_per_token(config.model, length) + recomputed_flops_per_token(config.model, length)
    through_memory = memory_traffic_bytes(config, mesh.shape, state_bytes)
    update = update_flops_of_a_device(config, mesh.shape) * mesh.size
    return roofline(flops * tokens + update, through_memory, traffic, mesh, chip)
