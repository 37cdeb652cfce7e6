"""A lower bound on the time of a program: the work of each resource divided by its published peak rate."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from nextllm_jax.hardware import Chip
from nextllm_jax.plan.collectives import Collective, Traffic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds that each resource is busy. The program takes at least the maximum of them."""

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
        """The time if everything overlaps: that of the resource that takes longest."""
        return getattr(self, self.bound)

    @property
    def seconds_without_overlap(self) -> float:
        """The time if nothing overlaps: the sum over all resources."""
        return sum(dataclasses.asdict(self).values())


def roofline(
    flops: float, hbm_bytes: float, traffic: Mapping[Collective, Traffic], mesh: Mesh | AbstractMesh, chip: Chip
) -> Roofline:
    """The roofline of a program on a mesh. `flops` is for all devices; `hbm_bytes` and `traffic` are per device."""
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
    """(bytes per second that a device can send along a Collective's axes, whether they use the network between slices).

    A TPU has two links along each torus dimension that the axes span if that dimension is a ring. Without a ring it
    counts as one link, since the collectives wait for the devices at the ends. If only the number of devices is known,
    they are assumed to form one ring. The bandwidth is None if it is unknown.
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
    return getattr(device, "slice_index", None)  # a topology of one slice does not have it


def _along(devices: np.ndarray, positions: list[int]) -> list[Any]:
    """The devices of one group along the given axes of the mesh."""
    index = tuple(slice(None) if axis in positions else 0 for axis in range(devices.ndim))
    return list(np.asarray(devices[index], dtype=object).ravel())
