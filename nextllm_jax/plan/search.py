"""Searches for the fastest mesh, remat policy and number of accumulation steps on given devices, in bounded time."""

import dataclasses
import time
import typing
from collections.abc import Iterator

from nextllm_jax.config import Config
from nextllm_jax.config.model import ModelConfig
from nextllm_jax.errors import InputError
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
    Raises InputError if no variant fits.
    """
    began = time.monotonic()
    estimates = sorted(_estimates(config, target), key=_step_time)
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
    return plan.roofline.seconds, plan.roofline.seconds_without_overlap


def _estimates(config: Config, target: Target) -> Iterator[TrainingPlan]:
    """The plans of all variants that may fit."""
    for variant in progress_bar(list(variants(config, target.num_devices)), desc="estimating", unit=" variants"):
        try:
            plan = estimate_training(variant, target)
        except InputError:
            continue  # the model or the batch is not divisible by this mesh
        if plan.estimated_peak_bytes <= _MARGIN * target.chip.hbm_bytes:
            yield plan


def variants(config: Config, num_devices: int) -> Iterator[Config]:
    """The config with each mesh, remat policy and number of accumulation steps to try."""
    policies = typing.get_args(typing.get_type_hints(ModelConfig)["remat"])
    policies = [policy for policy in policies if policy != "none" or not config.model.remat_offload]
    batch = config.training.global_batch_size
    sequence = max(config.mesh.sequence, 1)
    for tensor in _powers(min(8, num_devices // sequence)):
        for data in _powers(num_devices // (sequence * tensor)):
            fsdp, left = divmod(num_devices, data * sequence * tensor)
            if left or batch % (data * fsdp) or config.model.num_kv_heads % tensor:
                continue
            mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
            for rows in _powers(batch // (data * fsdp)):
                steps, left = divmod(batch, data * fsdp * rows)
                if left:
                    continue
                for policy in policies:
                    yield dataclasses.replace(
                        config,
                        mesh=mesh,
                        model=dataclasses.replace(config.model, remat=policy),
                        training=dataclasses.replace(config.training, accumulation_steps=steps),
                    )


def _powers(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`."""
    power = 1
    while power <= most:
        yield power
        power *= 2
