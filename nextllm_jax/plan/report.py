"""A plan as a table for people and as JSON for programs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nextllm_jax.plan.collectives import Collective, Traffic
from nextllm_jax.plan.training import TrainingPlan


def training_json(plan: TrainingPlan) -> dict[str, Any]:
    """The plan as JSON values; bytes are per device, and per step where they are sent."""
    config, roofline = plan.config, plan.roofline
    memory = dataclasses.asdict(plan.memory) if plan.memory else None
    return {
        "topology": plan.topology,
        "device_kind": plan.device_kind,
        "devices": plan.num_devices,
        "mesh": dict(plan.mesh),
        "parameters": plan.parameters,
        "sequence_length": config.data.sequence_length,
        "global_batch_size": config.training.global_batch_size,
        "accumulation_steps": config.training.accumulation_steps,
        "remat": config.model.remat,
        "fits": plan.fits,
        "hbm_bytes": plan.chip.hbm_bytes,
        "memory": memory,
        "out_of_memory": dataclasses.asdict(plan.out_of_memory) if plan.out_of_memory else None,
        "flops_per_step": plan.flops_per_step,
        "collectives": _traffic_json(plan.collectives.traffic) if plan.collectives else None,
        "collectives_minimum": _traffic_json(plan.minimum),
        "roofline": {f"{name}_seconds": value for name, value in dataclasses.asdict(roofline).items()}
        | {"bound": roofline.bound},
        "step_seconds": roofline.seconds,
        "tokens_per_second": plan.tokens_per_second,
        "mfu_bound": plan.mfu_bound,
        "compile_seconds": plan.compile_seconds,
    }


def _traffic_json(traffic: Mapping[Collective, Traffic]) -> list[dict[str, Any]]:
    return [collective._asdict() | sent._asdict() for collective, sent in traffic.items()]
