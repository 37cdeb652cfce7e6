"""Whether this machine has what a run asks for: versions, memory, disk and a sane clock.

Each function gives a sentence and how bad it is.
"""

import importlib.metadata
import platform
import shutil
import tempfile
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
from nextllm_jax.model.accounting import frozen_bytes, moment_bytes, parameter_bytes

Status = Literal["ok", "warning", "PROBLEM"]

_NAMED_VERSIONS = ("python", "jax", "flax", "optax", "orbax-checkpoint", "grain")
_CLOCK_TOLERANCE_SECONDS = 2.0


def versions() -> tuple[str, Status]:
    """Compare what is installed with what this package asks for."""
    try:
        metadata = importlib.metadata.metadata("nextllm_jax")
    except importlib.metadata.PackageNotFoundError:
        return "nextllm_jax is not installed, so that nothing says which versions it needs; pip install -e .", "warning"
    installed, wrong = {"python": platform.python_version()}, []
    if installed["python"] not in SpecifierSet(metadata["Requires-Python"]):
        wrong.append(f"python is {installed['python']}, {metadata['Requires-Python']} is needed")
    for requirement in map(Requirement, metadata.get_all("Requires-Dist") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = installed[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, {requirement.specifier} is needed")
    if wrong:
        return f"{'; '.join(wrong)}; pip install -e . brings them", "PROBLEM"
    named = [f"{name} {installed[name]}" for name in _NAMED_VERSIONS if name in installed]
    return f"{', '.join(named)}, and {len(installed) - len(named)} others are in the ranges that are supported", "ok"


def state_bytes(config: Config) -> int:
    """Bytes of the parameters and the optimizer's moments: those of a checkpoint."""
    model, lora = config.model, config.lora
    return parameter_bytes(model, lora) + moment_bytes(model, config.optimizer.first_moment_dtype, lora)


def memory(config: Config, mesh: Mesh) -> tuple[str, Status]:
    """Compare parameters, gradients and optimizer state with the memory of the devices, and of the host.

    Activations are not counted: less than this cannot be enough, more may still not be.
    """
    device, parts, optimizer = mesh.devices.flat[0], mesh.shape["fsdp"] * mesh.shape["tensor"], config.optimizer
    moments = moment_bytes(config.model, optimizer.first_moment_dtype, config.lora)
    if optimizer.shard_over_data:
        moments /= mesh.shape["data"]
    if optimizer.offload_state and device.platform != "cpu":
        moments = 0
    frozen, trained = frozen_bytes(config.model, config.lora), parameter_bytes(config.model, config.lora)
    needed = (frozen + 2 * trained + moments) / parts  # gradients are as large as what is trained
    what = f"parameters, gradients and AdamW's moments take {readable_bytes(needed)} a device"
    free_host = hardware.available_host_memory()
    if device.platform == "cpu":
        needed *= mesh.devices.size  # simulated devices share it
        return _compare(
            f"{what}, {readable_bytes(needed)} in all" if mesh.devices.size > 1 else what, needed, free_host, "host"
        )
    chip = hardware.chip(device.device_kind)
    limit = (device.memory_stats() or {}).get("bytes_limit", chip.hbm_bytes if chip else None)
    said, status = _compare(what, needed, limit, device.device_kind)
    copy = state_bytes(config) / parts * len(mesh.local_devices)
    if status == "ok" and free_host is not None and copy > free_host:
        there = readable_bytes(free_host)
        return f"{said}; a save copies {readable_bytes(copy)} to the host, which has {there} free", "warning"
    return said, status


def _compare(what: str, needed: float, there: int | None, where: str) -> tuple[str, Status]:
    if there is None:
        return f"{what}; how much the {where} has is not known", "ok"
    has = f"{what}; the {where} has {readable_bytes(there)}"
    if needed > there:
        return f"{has}: a smaller model, or more of mesh.fsdp and mesh.tensor", "PROBLEM"
    return (f"{has}, which leaves little for activations", "warning") if needed > 0.7 * there else (has, "ok")


def disk(config: Config, *, data_bytes: int) -> tuple[str, Status]:
    """Compare the checkpoints that a run keeps, and `data_bytes` of data to be prepared, with the disk.

    At the most there are those that are kept, and the next one before an old one goes.
    """
    workdir = Path(config.workdir or ".")
    each = state_bytes(config)
    kept = config.checkpoint.keep_last + 1  # the best
    if every := config.checkpoint.keep_every_steps:
        kept += config.training.steps // every
    there = len(Checkpoints(RunDir(workdir).checkpoints).steps())
    needed, free = max(kept + 1 - there, 1) * each, shutil.disk_usage(_existing(workdir)).free
    what = f"up to {kept} checkpoints of {readable_bytes(each)} are kept, {there} are there"
    free_for_data = shutil.disk_usage(_existing(Path("data"))).free if data_bytes else free
    if data_bytes:
        what += f", the data takes up to {readable_bytes(data_bytes)}"
    said = f"{what}; {readable_bytes(free)} are free at {workdir}"
    if needed > free or data_bytes > free_for_data:
        return f"{said}: make room, keep fewer checkpoints, or choose another --workdir", "PROBLEM"
    return said, "ok" if needed + data_bytes < 0.8 * free else "warning"


def clock(workdir: Path, before: tuple[float, float]) -> tuple[str, Status]:
    """Compare the clock with itself, with this program's own files, with the file system and with the run's files.

    `before` is what `time.time()` and `time.monotonic()` said some time ago.
    """
    now, drift = time.time(), (time.time() - before[0]) - (time.monotonic() - before[1])
    stamps = [path.stat().st_mtime for path in (workdir / CONFIG, workdir / METRICS) if path.exists()]
    with tempfile.NamedTemporaryFile(dir=_existing(workdir.absolute().parent), prefix=".nextllm-doctor-") as file:
        offset = Path(file.name).stat().st_mtime - now
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    if now < Path(__file__).stat().st_mtime - 86_400:
        return f"it says {written}, before this program was installed; set it", "warning"
    if abs(drift) > _CLOCK_TOLERANCE_SECONDS:
        return f"it jumped by {drift:+.1f} s while this ran; times in the run's files will not be in order", "warning"
    if abs(offset) > _CLOCK_TOLERANCE_SECONDS:
        return f"the file system of {workdir} is {offset:+.1f} s off the system's clock", "warning"
    if stamps and max(stamps) > now + _CLOCK_TOLERANCE_SECONDS:
        return f"it went back: {workdir} was written {max(stamps) - now:,.0f} s in the future", "warning"
    return f"{written}, and the file system agrees", "ok"


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
