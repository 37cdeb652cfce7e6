"""The best way to train a model on given devices: mesh, remat policy and microbatches, tried in a bounded time."""

import dataclasses
import time
import typing
from collections.abc import Iterator

from nextllm_jax.config import Config
from nextllm_jax.config.model import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.plan.topology import Place
from nextllm_jax.plan.training import TrainingPlan, estimate_training, plan_training
from nextllm_jax.progress import progress_bar

MOST_COMPILED = 8
_MARGIN = 1.15
"""An estimate of so much more memory than there is may still fit."""


def search(config: Config, place: Place, minutes: float) -> list[TrainingPlan]:
    """Plans of variants of a config that fit, fastest first: those that were compiled, then those only estimated.

    A variant differs in its mesh, remat policy and accumulation steps, so that all train the same. The best by
    arithmetic are compiled, as long as the time lasts; one that is being compiled is waited for.
    """
    began = time.monotonic()
    estimates = sorted(_estimates(config, place), key=_slowness)
    if not estimates:
        raise InputError(
            f"no mesh, remat policy or accumulation steps make this config fit {place.name}, by arithmetic; give more "
            "devices, a shorter --data.sequence-length or a smaller --training.global-batch-size"
        )
    compiled: list[TrainingPlan] = []
    rest = list(estimates)
    most = 0 if place.devices is None else min(MOST_COMPILED, len(estimates))
    for _ in progress_bar(range(most), desc="compiling variants", unit=" variants"):
        if time.monotonic() - began > 60 * minutes:
            break
        compiled.append(plan_training(rest.pop(0).config, place, check=False))
    confirmed = sorted((plan for plan in compiled if plan.fits), key=_slowness)
    return confirmed + [plan for plan in rest if plan.fits]


def _slowness(plan: TrainingPlan) -> tuple[float, float]:
    """The least time of a step; among equals, that of all its work in turn."""
    return plan.roofline.seconds, plan.roofline.seconds_in_turn


def _estimates(config: Config, place: Place) -> Iterator[TrainingPlan]:
    """Of all variants that may fit."""
    for variant in progress_bar(list(variants(config, place.num_devices)), desc="estimating", unit=" variants"):
        try:
            plan = estimate_training(variant, place)
        except InputError:
            continue  # a mesh that does not divide the model or the batch
        if plan.estimated_peak_bytes <= _MARGIN * place.chip.hbm_bytes:
            yield plan


def variants(config: Config, num_devices: int) -> Iterator[Config]:
    """The config with other meshes, remat policies and accumulation steps."""
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
