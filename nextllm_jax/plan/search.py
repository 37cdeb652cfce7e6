"""Searches for the fastest mesh, remat policy and number of accumulation steps on given devices, in bounded time."""

import dataclasses
import time
import typing
from collections.abc import Iterator

from nextllm_jax.config import Config, MeshConfig
from nextllm_jax.config.model import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import unknown_chip
from nextllm_jax.plan.topology import Target
from nextllm_jax.plan.training import TrainingPlan, estimate_training, plan_training
from nextllm_jax.progress import progress_bar

MOST_COMPILED = 8
_MARGIN = 1.15
"""Variants whose estimated peak is up to this factor over the capacity are kept, since estimates may be too high."""


def search(config: Config, target: Target, minutes: float) -> list[TrainingPlan]:
    """Plans of variants of a config that fit: the compiled ones, then the estimated ones, each group fastest first.

    Variants differ in mesh, remat policy and accumulation steps, so all of them compute the same updates. The variants
    with the best estimates are compiled until `minutes` have passed; the last compilation is not interrupted.
    Raises InputError if no variant fits, and for an unknown chip.
    """
    if target.chip is None:
        raise InputError(f"--search needs the memory and speed of a device, but {unknown_chip(target.device_kind)}")
    began = time.monotonic()
    estimates = sorted(_estimates(config, target, target.chip.hbm_bytes), key=_step_time)
    if not estimates:
        raise InputError(
            f"no mesh, remat policy or number of accumulation steps makes this config fit {target.name}; give more "
            "devices, a shorter --data.sequence-length or a smaller --training.global-batch-size"
        )
    compiled: list[TrainingPlan] = []
    rest = list(estimates)
    most = 0 if target.devices is None else min(MOST_COMPILED, len(estimates))
    for _ in progress_bar(range(most), desc="compiling variants", unit=" variants"):
        if time.monotonic() - began > 60 * minutes:
            break
        compiled.append(plan_training(rest.pop(0).config, target, check=False))
    confirmed = sorted((plan for plan in compiled if plan.fits), key=_step_time)
    return confirmed + [plan for plan in rest if plan.fits]


def _step_time(plan: TrainingPlan) -> tuple[float, float]:
    """The sort key: the lower bound on the step time, then the time without overlap."""
    assert plan.roofline is not None  # the chip is known
    return plan.roofline.seconds, plan.roofline.seconds_without_overlap


def _estimates(config: Config, target: Target, limit_bytes: int) -> Iterator[TrainingPlan]:
    """The plans of all variants that may fit into `limit_bytes` on each device."""
    for variant in progress_bar(list(variants(config, target.num_devices)), desc="estimating", unit=" variants"):
        try:
            plan = estimate_training(variant, target)
        except InputError:
            continue  # the model or the batch is not divisible by this mesh
        if plan.estimated_peak_bytes <= _MARGIN * limit_bytes:
            yield plan


def variants(config: Config, num_devices: int) -> Iterator[Config]:
    """The config with each mesh, remat policy and number of accumulation steps to try."""
    policies = typing.get_args(typing.get_type_hints(ModelConfig)["remat"])
    policies = [policy for policy in policies if policy != "none" or not config.model.remat_offload]
    batch = config.training.global_batch_size
    for mesh in _meshes(config, num_devices):
        parallel = mesh.data * mesh.fsdp * mesh.expert
        for rows in _powers(batch // parallel):
            steps, left = divmod(batch, parallel * rows)
            if not left:
                for policy in policies:
                    yield dataclasses.replace(
                        config,
                        mesh=mesh,
                        model=dataclasses.replace(config.model, remat=policy),
                        training=dataclasses.replace(config.training, accumulation_steps=steps),
                    )


def _meshes(config: Config, num_devices: int) -> Iterator[MeshConfig]:
    """The meshes of all devices that can shard the batch, the heads and the experts. Sequences stay as configured."""
    sequence, experts = max(config.mesh.sequence, 1), config.model.num_experts
    for tensor in _powers(min(8, num_devices // sequence)):
        for expert in _powers(min(max(experts, 1), num_devices // (sequence * tensor))):
            for data in _powers(num_devices // (sequence * tensor * expert)):
                fsdp, left = divmod(num_devices, data * sequence * tensor * expert)
                uneven = left or experts % expert or config.model.num_kv_heads % tensor
                if not uneven and config.training.global_batch_size % (data * fsdp * expert) == 0:
                    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor, "expert": expert}
                    yield dataclasses.replace(config.mesh, **sizes)


def _powers(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`."""
    power = 1
    while power <= most:
        yield power
        power *= 2
