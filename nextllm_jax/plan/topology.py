"""The devices of a TPU topology, without a TPU: libtpu knows them, and compiles for them."""

import importlib.util
import re
from typing import Any

from nextllm_jax.errors import InputError
from nextllm_jax.hardware import Chip, chip


def tpu_devices(topology: str, num_slices: int = 1) -> list[Any]:
    """The jax devices of `num_slices` slices of a topology such as "v5e:4x4"; they compile, but hold nothing.

    Raises InputError without libtpu, and for a topology that it does not know.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "compiling for TPUs needs libtpu, which is not installed; pip install '.[tpu]', or estimate with --fast"
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
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except JaxRuntimeError as error:
        reason = str(error).partition(": ")[2].replace("\n", " ") or str(error)
        raise InputError(
            f"libtpu knows no topology '{topology}' ({reason}); there are v4:4x4x4, v5e:4x4, v5p:4x4x4, v6e:16x16, "
            "tpu7x:4x4x4 and other shapes of these"
        ) from error


def chip_of(device: Any) -> Chip:
    """The limits of one device of a topology. Raises InputError for a chip that `hardware` does not know."""
    limits = chip(device.device_kind)
    if limits is None:
        raise InputError(f"the limits of {device.device_kind} are not known; hardware.py lists the chips that are")
    return limits
