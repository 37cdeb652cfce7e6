"""Checks whether this machine meets a run's requirements: versions, memory, disk space and a correct clock.

Each function returns a message and its status.
"""

import importlib.metadata
import math
import os
import platform
import time
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nextllm_jax import hardware
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.run_dir import CONFIG, METRICS, RunDir
from nextllm_jax.config import Config
from nextllm_jax.hardware import readable_bytes
from nextllm_jax.model.accounting import frozen_bytes, moment_bytes, parameter_bytes, save_estimate, state_bytes

Status = Literal["ok", "warning", "PROBLEM"]

_NAMED_VERSIONS = ("python", "jax", "flax", "optax", "orbax-checkpoint", "grain")
_CLOCK_TOLERANCE_SECONDS = 2.0


def versions() -> tuple[str, Status]:
    """Compare the installed packages with the requirements of this package."""
    try:
        metadata = importlib.metadata.metadata("nextllm_jax")
    except importlib.metadata.PackageNotFoundError:
        return "nextllm_jax is not installed, so its requirements are unknown; run pip install -e .", "warning"
    installed, wrong = {"python": platform.python_version()}, []
    if installed["python"] not in SpecifierSet(metadata["Requires-Python"]):
        wrong.append(f"python is {installed['python']}, but {metadata['Requires-Python']} is required")
    for requirement in map(Requirement, metadata.get_all("Requires-Dist") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = installed[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, but {requirement.specifier} is required")
    if wrong:
        return f"{'; '.join(wrong)}; run pip install -e .", "PROBLEM"
    named = [f"{name} {installed[name]}" for name in _NAMED_VERSIONS if name in installed]
    return f"{', '.join(named)} and {len(installed) - len(named)} other packages have supported versions", "ok"


def memory(config: Config, mesh: Mesh) -> tuple[str, Status]:
    """Compare the size of parameters, gradients and optimizer state with the memory of the devices and the host.

    Activations are not counted, so this is a lower bound on the memory that training needs.
    """
    device, optimizer = mesh.devices.flat[0], config.optimizer
    parts = math.prod(mesh.shape[axis] for axis in ("fsdp", "tensor", "expert"))
    moments = moment_bytes(config.model, optimizer, config.lora)
    if optimizer.shard_over_data:
        moments /= mesh.shape["data"]
    if optimizer.offload_state and device.platform != "cpu":
        moments = 0
    frozen, trained = frozen_bytes(config.model, config.lora), parameter_bytes(config.model, config.lora)
    copies = 3 if config.training.ema_decay else 2  # gradients are as large as what is trained
    needed = (frozen + copies * trained + moments) / parts
    what = f"parameters, gradients and the optimizer's moments take {readable_bytes(needed)} per device"
    free_host = hardware.available_host_memory()
    if device.platform == "cpu":
        needed *= mesh.devices.size  # simulated devices share it
        return _compare(
            f"{what}, {readable_bytes(needed)} in total" if mesh.devices.size > 1 else what, needed, free_host, "host"
        )
    chip = hardware.chip(device.device_kind)
    limit = (device.memory_stats() or {}).get("bytes_limit", chip.hbm_bytes if chip else None)
    said, status = _compare(what, needed, limit, device.device_kind)
    copy = state_bytes(config) / parts * len(mesh.local_devices)
    if status == "ok" and free_host is not None and copy > free_host:
        free = readable_bytes(free_host)
        return f"{said}; a save copies {readable_bytes(copy)} to the host, which has {free} free", "warning"
    return said, status


def _compare(what: str, needed: float, there: int | None, where: str) -> tuple[str, Status]:
    if there is None:
        return f"{what}; the memory of the {where} is unknown", "ok"
    has = f"{what}; the {where} has {readable_bytes(there)}"
    if needed > there:
        return f"{has}; use a smaller model, or raise mesh.fsdp or mesh.tensor", "PROBLEM"
    return (f"{has}, which leaves little for activations", "warning") if needed > 0.7 * there else (has, "ok")


def save_time(config: Config, mesh: Mesh) -> tuple[str, Status]:
    """The time of a save at the stated bandwidth, compared with training.preemption_seconds."""
    estimate = save_estimate(config, len({device.process_index for device in mesh.devices.flat}))
    limit, said = config.training.preemption_seconds, str(estimate)
    if limit is not None and estimate.seconds > limit:
        return (
            f"{said}; SIGTERM starts no save, since training.preemption_seconds is {limit:g}: lower "
            "checkpoint.every_steps, use more hosts, or state the bandwidth that was measured",
            "warning",
        )
    return said, "ok"


def disk(config: Config, *, data_bytes: int) -> tuple[str, Status]:
    """Compare the size of a run's checkpoints, and `data_bytes` of data to prepare, with the free disk space.

    The disk must hold one checkpoint more than are kept, since a new one is saved before an old one is deleted.
    """
    run = RunDir(config.workdir or ".")
    each = state_bytes(config)
    kept = config.checkpoint.keep_last + 1  # the best
    if every := config.checkpoint.keep_every_steps:
        kept += config.training.steps // every
    there = len(Checkpoints(run.checkpoints).steps())
    needed, free = max(kept + 1 - there, 1) * each, run.free_bytes()
    what = f"up to {kept} checkpoints of {readable_bytes(each)} are kept ({there} exist)"
    if data_bytes:
        what += f", the data takes up to {readable_bytes(data_bytes)}"
    if free is None:
        return f"{what}; the space in {run.path} is not limited", "ok"
    free_for_data = RunDir("data").free_bytes() if data_bytes else free
    said = f"{what}; {readable_bytes(free)} are free at {run.path}"
    if needed > free or data_bytes > (free_for_data or 0):
        return f"{said}; make room, keep fewer checkpoints, or choose another --workdir", "PROBLEM"
    return said, "ok" if needed + data_bytes < 0.8 * free else "warning"


def clock(workdir: str | os.PathLike[str], before: tuple[float, float]) -> tuple[str, Status]:
    """Compare the clock with the monotonic clock, with this program's files, the run's files and where they are stored.

    `before` is (`time.time()`, `time.monotonic()`) at an earlier time.
    """
    now, drift = time.time(), (time.time() - before[0]) - (time.monotonic() - before[1])
    run = RunDir(workdir)
    stamps = [stamp for name in (CONFIG, METRICS) if (stamp := run.modified(name)) is not None]
    offset = run.clock() - now
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    if now < Path(__file__).stat().st_mtime - 86_400:
        return f"the clock says {written}, before this program was installed; set it", "warning"
    if abs(drift) > _CLOCK_TOLERANCE_SECONDS:
        return f"the clock jumped by {drift:+.1f} s during this check; times in the run's files may be wrong", "warning"
    if abs(offset) > _CLOCK_TOLERANCE_SECONDS:
        return f"the clock of the storage of {workdir} is {offset:+.1f} s off the system clock", "warning"
    if stamps and max(stamps) > now + _CLOCK_TOLERANCE_SECONDS:
        return f"the clock was set back: {workdir} was written {max(stamps) - now:,.0f} s in the future", "warning"
    return f"{written}, and the storage of {workdir} agrees", "ok"
