"""Suggests flags that make a config fit its devices, in the order in which to try them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from nextllm_jax.config import Config
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import readable_bytes


def advice(config: Config, mesh: Mapping[str, int], limit_bytes: float, peak: Callable[[Config], float]) -> list[str]:
    """Sentences with flags, cheapest first. Each adds to the ones before it; the last makes the config fit.

    `peak` estimates the peak memory of a config in bytes, and raises InputError if its mesh is not possible.
    """
    sentences = []
    for propose in (_fsdp, _smaller_microbatch, _full_remat, _small_moments, _offload, _tensor, _tensor, _tensor):
        if (proposed := propose(config, mesh)) is None:
            continue
        sections, reason = proposed
        changed, flags = _changed(config, sections)
        try:
            needed = peak(changed)
        except InputError:
            continue  # the heads or the sequences are not divisible by this mesh
        config, mesh = changed, {name: getattr(changed.mesh, name) for name in mesh}
        sentences.append(f"{flags}: {reason}; then about {readable_bytes(needed)}")
        if needed <= limit_bytes:
            return sentences
    return [*sentences, "more devices: give a larger --topology"]


_Sections = dict[str, dict[str, Any]]
_Proposal = tuple[_Sections, str] | None
"""The fields to change, by section, and how they help; None if there is nothing to change."""


def _changed(config: Config, sections: _Sections) -> tuple[Config, str]:
    """The config with the fields of `sections` changed, and the command-line flags for it."""
    parts = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    flags = [
        f"--{section}.{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for section, fields in sections.items()
        for name, value in fields.items()
    ]
    return dataclasses.replace(config, **parts), " ".join(flags)


def _fsdp(config: Config, mesh: Mapping[str, int]) -> _Proposal:
    slices = config.mesh.slices  # only the data axis may span slices
    if mesh["data"] == slices:
        return None
    sizes = {"data": slices, "fsdp": mesh["fsdp"] * mesh["data"] // slices}
    return {"mesh": sizes}, "shards parameters and moments; now each device has a copy of them"


def _smaller_microbatch(config: Config, mesh: Mapping[str, int]) -> _Proposal:
    training = config.training
    devices = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    rows = training.global_batch_size // (training.accumulation_steps * devices)
    if rows <= 1:
        return None
    steps = {"accumulation_steps": training.accumulation_steps * rows}
    return {"training": steps}, f"one sequence per microbatch and device instead of {rows}; the result is the same"


def _full_remat(config: Config, mesh: Mapping[str, int]) -> _Proposal:
    if config.model.remat == "full":
        return None
    return {"model": {"remat": "full"}}, f"saves only the input of each layer, unlike {config.model.remat}"


def _small_moments(config: Config, mesh: Mapping[str, int]) -> _Proposal:
    if config.optimizer.first_moment_dtype == "bfloat16":
        return None
    return {"optimizer": {"first_moment_dtype": "bfloat16"}}, "halves the first moment"


def _offload(config: Config, mesh: Mapping[str, int]) -> _Proposal:
    if config.optimizer.offload_state:
        return None
    return {"optimizer": {"offload_state": True}}, "keeps the moments in host memory; steps take longer"


def _tensor(config: Config, mesh: Mapping[str, int]) -> _Proposal:
    """Shard each sequence over twice as many devices."""
    if mesh["fsdp"] % 2:
        return None
    steps = config.training.accumulation_steps * 2
    if config.training.global_batch_size % steps:
        steps = config.training.accumulation_steps
    sizes = {"data": mesh["data"], "fsdp": mesh["fsdp"] // 2, "tensor": 2 * mesh["tensor"]}
    changed = {"mesh": sizes, "training": {"accumulation_steps": steps}}
    return changed, "shards the heads and the MLP over twice as many devices"
