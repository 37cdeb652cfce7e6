"""What to change when a training does not fit its devices, as flags in the order in which to try them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from nextllm_jax.config import Config
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import readable_bytes


def advice(config: Config, mesh: Mapping[str, int], limit_bytes: float, peak: Callable[[Config], float]) -> list[str]:
    """Sentences with flags, each on top of those before it, those first that cost least, until it would fit.

    `peak` estimates the memory of a config, and raises InputError if its mesh cannot be had.
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
            continue  # heads or sequences that do not divide so
        config, mesh = changed, {name: getattr(changed.mesh, name) for name in mesh}
        sentences.append(f"{flags}: {reason}; about {readable_bytes(needed)} then")
        if needed <= limit_bytes:
            return sentences
    return [*sentences, "more devices: give a larger --topology"]


_Sections = dict[str, dict[str, Any]]
_Proposal = tuple[_Sections, str] | None
"""Fields by their sections, and why they help; None where nothing is to be changed."""


def _changed(config: Config, sections: _Sections) -> tuple[Config, str]:
    """The config with these fields of its sections, and the flags that say so."""
    parts = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    flags = [
        f"--{section}.{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for section, fields in sections.items()
        for name, value in fields.items()
    ]
    return dataclasses.replace(config, **parts), " ".join(flags)


def _fsdp(config: Config, mesh: Mapping[str, int]) -> _Proposal:
    slices = config.mesh.slices  # which data alone may cross
    if mesh["data"] == slices:
        return None
    sizes = {"data": slices, "fsdp": mesh["fsdp"] * mesh["data"] // slices}
    return {"mesh": sizes}, "parameters and moments are divided, of which each device now keeps a copy"


def _smaller_microbatch(config: Config, mesh: Mapping[str, int]) -> _Proposal:
    training = config.training
    rows = training.global_batch_size // (training.accumulation_steps * mesh["data"] * mesh["fsdp"])
    if rows <= 1:
        return None
    steps = {"accumulation_steps": training.accumulation_steps * rows}
    return {"training": steps}, f"a device takes one sequence at a time, not {rows}; the result is the same"


def _full_remat(config: Config, mesh: Mapping[str, int]) -> _Proposal:
    if config.model.remat == "full":
        return None
    return {"model": {"remat": "full"}}, f"keeps only what goes into each layer, where {config.model.remat} keeps more"


def _small_moments(config: Config, mesh: Mapping[str, int]) -> _Proposal:
    if config.optimizer.first_moment_dtype == "bfloat16":
        return None
    return {"optimizer": {"first_moment_dtype": "bfloat16"}}, "AdamW's first moment takes half"


def _offload(config: Config, mesh: Mapping[str, int]) -> _Proposal:
    if config.optimizer.offload_state:
        return None
    return {"optimizer": {"offload_state": True}}, "AdamW's moments wait in the host's memory, and each step is longer"


def _tensor(config: Config, mesh: Mapping[str, int]) -> _Proposal:
    """Two devices for one sequence, where so far it had one."""
    if mesh["fsdp"] % 2:
        return None
    steps = config.training.accumulation_steps * 2
    if config.training.global_batch_size % steps:
        steps = config.training.accumulation_steps
    sizes = {"data": mesh["data"], "fsdp": mesh["fsdp"] // 2, "tensor": 2 * mesh["tensor"]}
    changed = {"mesh": sizes, "training": {"accumulation_steps": steps}}
    return changed, "twice the devices share the heads and the MLP of a sequence"
