"""The devices to plan for: a TPU topology, which libtpu compiles for, or a number of chips of a known kind."""

import importlib.util
import math
import re
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, AxisType, Mesh

from nextllm_jax.config import Config
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import Chip, chip, unknown_chip
from nextllm_jax.sharding import MESH_AXES, make_mesh


class Target(NamedTuple):
    """The devices to plan for."""

    name: str
    device_kind: str
    chip: Chip | None
    """Limits of one device; None if they are unknown, which leaves the memory that a program needs."""
    num_devices: int
    devices: list[Any] | None
    """None if only their number is known; then nothing can be compiled for them."""

    @property
    def num_hosts(self) -> int:
        """Number of hosts; of a kind of devices whose hosts are unknown, one for each 8 devices."""
        if self.devices is None:
            return math.ceil(self.num_devices / 8)
        return len({(getattr(device, "slice_index", 0), device.process_index) for device in self.devices})

    def mesh(self, config: Config) -> Mesh | AbstractMesh:
        """The config's mesh of all devices. Raises InputError if its axes do not multiply to their number."""
        if self.devices is not None:
            return make_mesh(config.mesh, self.devices)
        sizes = config.mesh.sizes(self.num_devices)
        return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def tpu_slices(topology: str, num_slices: int = 1) -> Target:
    """The devices of `num_slices` slices of a topology such as "v5e:4x4".

    Raises InputError if libtpu is not installed or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "compiling for TPUs needs libtpu, which is not installed; pip install '.[tpu]', or estimate with --chip "
            "and --devices, and --fast for nextllm plan"
        )
    if not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        raise InputError(
            f"topology '{topology}' is not GENERATION:SHAPE; give one such as v5e:4x4, v5p:4x4x4, v6e:16x16 or "
            "tpu7x:4x4x4"
        )
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    options = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except JaxRuntimeError as error:
        reason = str(error).partition(": ")[2].replace("\n", " ") or str(error)
        raise InputError(
            f"libtpu knows no topology '{topology}' ({reason}); it knows v4:4x4x4, v5e:4x4, v5p:4x4x4, v6e:16x16, "
            "tpu7x:4x4x4 and other shapes of these"
        ) from error
    name = f"{num_slices} x {topology}" if num_slices > 1 else topology
    kind = devices[0].device_kind
    limits = chip(kind)
    if limits is None:
        raise InputError(unknown_chip(kind))
    if kind == "TPU v4" and any(device.core_on_chip for device in devices):
        limits = _half(limits)  # libtpu lists its two cores separately; a v4 machine shows them as one device
    return Target(name, kind, limits, len(devices), devices)


def devices_of_kind(device_kind: str, num_devices: int) -> Target:
    """`num_devices` devices of a kind, with their limits if `hardware` lists them."""
    if num_devices < 1:
        raise InputError(f"devices is {num_devices}; it must be positive")
    return Target(device_kind, device_kind, chip(device_kind), num_devices, None)


def _half(whole: Chip) -> Chip:
    return whole._replace(
        peak_flops_bf16=whole.peak_flops_bf16 / 2,
        hbm_bytes=whole.hbm_bytes // 2,
        hbm_bandwidth=whole.hbm_bandwidth / 2,
        ici_link_bandwidth=whole.ici_link_bandwidth and whole.ici_link_bandwidth / 2,
    )
