"""Peak performance and memory of accelerators, by jax's device kind, and the memory of the host."""

from typing import NamedTuple


class Chip(NamedTuple):
    """Published limits of one jax device."""

    peak_flops_bf16: float
    """Dense bfloat16 matmul FLOP/s, no sparsity."""
    hbm_bytes: int
    """Device memory."""
    hbm_bandwidth: float
    """Bytes per second between device memory and the cores."""
    ici_link_bandwidth: float | None = None
    """Bytes per second in one direction over one link of a TPU to a neighbor; None without such links."""
    ici_ring_size: int = 0
    """A dimension of a slice is a ring if its size is a multiple of this many chips; otherwise it is a line."""
    network_bandwidth: float | None = None
    """Bytes per second to other devices: over the data center network for a TPU, over NVLink for a GPU."""


def _chip(
    teraflops: float,
    gibibytes: int,
    gigabytes_per_second: float,
    *,
    ici: tuple[float, int] | None = None,
    network: float | None = None,
) -> Chip:
    """A Chip from TFLOP/s, GiB, GB/s of memory, (GB/s of a link one way, ring size), GB/s of the network one way."""
    link, ring = (ici[0] * 1e9, ici[1]) if ici else (None, 0)
    return Chip(
        teraflops * 1e12,
        gibibytes * 2**30,
        gigabytes_per_second * 1e9,
        link,
        ring,
        network * 1e9 if network else None,
    )


# From vendors' data sheets. A jax device is a whole chip, except for TPU v2, v3 and 7x, whose chips are two devices.
# Links of TPUs: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x} give the bidirectional inter-chip bandwidth of a chip
# (400, 1200, 800 and 1200 GB/s over 4, 6, 4 and 6 links) and the network's (25, 50, 100 and 100 Gbps); Jouppi et al.
# 2023 (arXiv:2304.01433) gives 50 GB/s per link for v4. A dimension of a v5e or v6e slice is a ring if it has 16 chips;
# in generations with cubes of 4x4x4 chips, if it is a multiple of 4. The network of a GPU is its NVLink, one way.
_CHIPS = {
    "TPU v2": _chip(22.5, 8, 350),
    "TPU v3": _chip(61.5, 16, 450),
    "TPU v4": _chip(275, 32, 1228, ici=(50, 4)),
    "TPU v5 lite": _chip(197, 16, 819, ici=(50, 16), network=3.125),  # v5e
    "TPU v5e": _chip(197, 16, 819, ici=(50, 16), network=3.125),
    "TPU v5": _chip(459, 95, 2765, ici=(100, 4), network=6.25),  # v5p
    "TPU v5p": _chip(459, 95, 2765, ici=(100, 4), network=6.25),
    "TPU v6 lite": _chip(918, 32, 1640, ici=(100, 16), network=12.5),  # v6e, Trillium
    "TPU v6e": _chip(918, 32, 1640, ici=(100, 16), network=12.5),
    "TPU7x": _chip(1153.5, 96, 3690, ici=(50, 4), network=6.25),  # Ironwood
    "NVIDIA A10": _chip(125, 24, 600),
    "NVIDIA A10G": _chip(70, 24, 600),
    "NVIDIA A100-PCIE-40GB": _chip(312, 40, 1555),
    "NVIDIA A100-SXM4-40GB": _chip(312, 40, 1555, network=300),
    "NVIDIA A100 80GB PCIe": _chip(312, 80, 1935),
    "NVIDIA A100-SXM4-80GB": _chip(312, 80, 2039, network=300),
    "NVIDIA H100 PCIe": _chip(756, 80, 2000),
    "NVIDIA H100 NVL": _chip(835, 94, 3900),
    "NVIDIA H100 80GB HBM3": _chip(989, 80, 3350, network=450),
    "NVIDIA H200": _chip(989, 141, 4800, network=450),
    "NVIDIA H200 NVL": _chip(835, 141, 4800),
    "NVIDIA GH200 120GB": _chip(989, 96, 4000),
    "NVIDIA GH200 480GB": _chip(989, 96, 4000),
    "NVIDIA B200": _chip(2250, 180, 8000, network=900),
    "NVIDIA GB200": _chip(2500, 186, 8000, network=900),
    "NVIDIA L4": _chip(121, 24, 300),
    "NVIDIA L40S": _chip(362, 48, 864),
    "NVIDIA RTX A6000": _chip(155, 48, 768),
    "NVIDIA RTX 6000 Ada Generation": _chip(364, 48, 960),
    "NVIDIA GeForce RTX 3090": _chip(71, 24, 936),
    "NVIDIA GeForce RTX 4090": _chip(165, 24, 1008),
    "NVIDIA GeForce RTX 5090": _chip(210, 32, 1792),
}


def chip(device_kind: str) -> Chip | None:
    """The limits of a `jax.Device.device_kind`; None for a device that is not in the table (a CPU, a MIG slice).

    The name must match exactly, since a guess from part of the name could silently give a wrong MFU.
    """
    return _CHIPS.get(device_kind)


def available_host_memory() -> int | None:
    """Bytes of memory available to this process, limited by the machine and its control group; None if unknown."""
    candidates = []
    try:
        with open("/proc/meminfo") as file:
            amounts = dict(line.split(":") for line in file)
        candidates.append(int(amounts["MemAvailable"].split()[0]) * 1024)
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            candidates.append(int(limit.read()) - int(used.read()))
    except (OSError, ValueError, KeyError):
        pass  # not Linux, or no limit ("max")
    return min(candidates, default=None)


def cpu_has_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 natively; False if that is unknown."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = file.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def readable_bytes(count: float) -> str:
    """A number of bytes as readable text, such as "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
