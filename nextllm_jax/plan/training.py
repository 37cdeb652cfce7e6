"""The plan of a training: what its step takes on devices that are not here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from nextllm_jax.config import Config
from nextllm_jax.hardware import Chip
from nextllm_jax.model.accounting import flops_per_token, parameter_count
from nextllm_jax.plan.collectives import Collective, Collectives, Traffic, collectives
from nextllm_jax.plan.compile import Memory, OutOfMemory, Say, compile_train_step
from nextllm_jax.plan.estimate import memory_traffic_bytes, minimum_traffic, recomputed_flops_per_token
from nextllm_jax.plan.roofline import Roofline, communication_seconds
from nextllm_jax.sharding import make_mesh
from nextllm_jax.training.checks import check_divides


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a train step takes."""

    config: Config
    topology: str
    device_kind: str
    chip: Chip
    mesh: Mapping[str, int]
    memory: Memory | None
    out_of_memory: OutOfMemory | None
    collectives: Collectives | None
    minimum: Mapping[Collective, Traffic]
    roofline: Roofline
    compile_seconds: float | None

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return int(np.prod(list(self.mesh.values())))

    @property
    def fits(self) -> bool:
        """Whether the step's memory is there."""
        return self.memory is not None and self.memory.peak_bytes <= self.chip.hbm_bytes

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

    @property
    def parameters(self) -> int:
        """Of the model."""
        return parameter_count(self.config.model)


def plan_training(config: Config, devices: list[Any], chip: Chip, topology: str, say: Say) -> TrainingPlan:
    """The plan of a config on all of the given devices, its train step compiled for them.

    Raises InputError if mesh, batch and devices do not go together.
    """
    mesh = make_mesh(config.mesh, devices)
    check_divides(config, mesh)
    compiled = compile_train_step(config, mesh, say)
    found = collectives(compiled.hlo, mesh.shape) if compiled.hlo else None
    minimum = minimum_traffic(config, mesh.shape)
    state_bytes = compiled.memory.argument_bytes if compiled.memory else 0
    return TrainingPlan(
        config=config,
        topology=topology,
        device_kind=devices[0].device_kind,
        chip=chip,
        mesh=dict(mesh.shape),
        memory=compiled.memory,
        out_of_memory=compiled.out_of_memory,
        collectives=found,
        minimum=minimum,
        roofline=roofline_of(config, mesh, chip, found.traffic if found else minimum, state_bytes),
        compile_seconds=compiled.seconds,
    )


def roofline_of(
    config: Config, mesh: Mesh, chip: Chip, traffic: Mapping[Collective, Traffic], state_bytes: float
) -> Roofline:
    """The roofline of a train step that sends `traffic` and keeps `state_bytes` on each device."""
    length, tokens = config.data.sequence_length, config.training.global_batch_size * config.data.sequence_length
    flops = flops_per_token(config.model, length) + recomputed_flops_per_token(config.model, length)
    ici, network = communication_seconds(traffic, mesh, chip)
    return Roofline(
        compute=flops * tokens / (mesh.devices.size * chip.peak_flops_bf16),
        hbm=memory_traffic_bytes(config, mesh.shape, state_bytes) / chip.hbm_bandwidth,
        ici=ici,
        network=network,
    )
