"""The least time that a program can take: each resource's work over its published limit."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from nextllm_jax.hardware import Chip
from nextllm_jax.plan.collectives import Collective, Traffic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds that each resource needs alone; the program takes at least the longest of them."""

    compute: float
    hbm: float
    ici: float
    network: float
    """Between slices of TPUs, or between GPUs."""

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(dataclasses.asdict(self), key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """Of the resource that takes longest: everything else runs beside it."""
        return getattr(self, self.bound)

    @property
    def seconds_in_turn(self) -> float:
        """If nothing ran beside anything else."""
        return sum(dataclasses.asdict(self).values())


def roofline(
    flops: float, hbm_bytes: float, traffic: Mapping[Collective, Traffic], mesh: Mesh | AbstractMesh, chip: Chip
) -> Roofline:
    """The roofline of a program of so many FLOPs on all devices of a mesh, of which each moves and sends so much."""
    seconds = {True: 0.0, False: 0.0}
    for axes in dict.fromkeys(collective.axes for collective in traffic):
        bandwidth, outside = axes_bandwidth(mesh, axes, chip)
        sent = sum(sent.sent_bytes for collective, sent in traffic.items() if collective.axes == axes)
        seconds[outside] += sent / bandwidth if bandwidth else 0
    return Roofline(
        compute=flops / (mesh.size * chip.peak_flops_bf16),
        hbm=hbm_bytes / chip.hbm_bandwidth,
        ici=seconds[False],
        network=seconds[True],
    )


def axes_bandwidth(mesh: Mesh | AbstractMesh, axes: str, chip: Chip) -> tuple[float | None, bool]:
    """(bytes per second that a device sends along a Collective's axes, whether that goes through the network).

    A device of a slice has two links along each dimension of the torus that the axes run through, if it is a ring, and
    one at the end of a line, which is where a line's collectives wait. Where nothing but the number of devices is
    known, they are one ring. None where the limit is not known.
    """
    if isinstance(mesh, AbstractMesh):
        links = 2 * chip.ici_link_bandwidth if chip.ici_link_bandwidth else None
        return links or chip.network_bandwidth, links is None
    if axes == "slices":
        return chip.network_bandwidth, True
    names = [name for name in axes.split("+") if name in mesh.axis_names]
    positions = [mesh.axis_names.index(name) for name in names] or list(range(mesh.devices.ndim))
    if not chip.ici_link_bandwidth:
        return chip.network_bandwidth, True
    members = _along(mesh.devices, positions)
    members = [device for device in members if _slice(device) == _slice(members[0])]
    extents = [len(set(column)) for column in zip(*(device.coords for device in members), strict=True)]
    full = [len(set(column)) for column in zip(*(device.coords for device in mesh.devices.flat), strict=True)]
    links = sum(
        2 if extent == whole and extent % chip.ici_ring_size == 0 else 1
        for extent, whole in zip(extents, full, strict=True)
        if extent > 1
    )
    return (links or 1) * chip.ici_link_bandwidth, False


def _slice(device: Any) -> int | None:
    return getattr(device, "slice_index", None)  # which a topology of one slice does not have


def _along(devices: np.ndarray, positions: list[int]) -> list[Any]:
    """The devices of one group along axes of the mesh."""
    index = tuple(slice(None) if axis in positions else 0 for axis in range(devices.ndim))
    return list(np.asarray(devices[index], dtype=object).ravel())
