"""Bandwidths between the devices of a slice, counted by hand."""

import types

import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from nextllm_jax.hardware import chip
from nextllm_jax.plan.collectives import Collective, Traffic
from nextllm_jax.plan.roofline import Roofline, axes_bandwidth, roofline

GB = 1e9


def mesh(shape, torus, *, slices=1):
    """A stand-in for a Mesh with axes (data, fsdp, tensor), its devices numbered along the torus, slices outermost."""
    places = [(index, *coords) for index in range(slices) for coords in np.ndindex(torus)]
    devices = np.empty(len(places), dtype=object)
    of_a_slice = [{"slice_index": index} if slices > 1 else {} for index, *_ in places]
    devices[:] = [
        types.SimpleNamespace(coords=place[1:], **more) for place, more in zip(places, of_a_slice, strict=True)
    ]
    return types.SimpleNamespace(
        devices=devices.reshape(shape), size=devices.size, axis_names=("data", "fsdp", "tensor")
    )


@pytest.mark.parametrize(
    ("kind", "shape", "torus", "axes", "bandwidth"),
    [
        ("TPU v5 lite", (1, 16, 1), (4, 4), "fsdp", 2 * 50 * GB),  # two lines
        ("TPU v5 lite", (1, 4, 4), (4, 4), "tensor", 50 * GB),  # one line
        ("TPU v5 lite", (1, 256, 1), (16, 16), "fsdp", 4 * 50 * GB),  # two rings
        ("TPU v5 lite", (1, 16, 16), (16, 16), "fsdp", 2 * 50 * GB),  # one ring
        ("TPU v5 lite", (1, 64, 4), (16, 16), "tensor", 50 * GB),  # a part of a ring is a line
        ("TPU v5", (1, 64, 1), (4, 4, 4), "fsdp", 6 * 100 * GB),
        ("TPU v5", (1, 16, 4), (4, 4, 4), "fsdp+tensor", 6 * 100 * GB),
        ("TPU v5", (1, 4, 1), (2, 2, 1), "fsdp", 2 * 100 * GB),
    ],
)
def test_links_of_a_slice(kind, shape, torus, axes, bandwidth) -> None:
    assert axes_bandwidth(mesh(shape, torus), axes, chip(kind)) == (bandwidth, False)


def test_what_crosses_slices_goes_through_the_network() -> None:
    two, limits = mesh((2, 16, 1), (4, 4), slices=2), chip("TPU v5 lite")
    assert axes_bandwidth(two, "fsdp", limits) == (2 * 50 * GB, False)
    assert axes_bandwidth(two, "slices", limits) == (3.125 * GB, True)
    four = mesh((4, 8, 1), (4, 4), slices=2)
    assert axes_bandwidth(four, "data", limits) == (50 * GB, False)  # the part of it within a slice
    traffic = {
        Collective("all-gather", "fsdp", "bf16"): Traffic(1, 100 * GB),
        Collective("all-reduce", "slices", "f32"): Traffic(1, 6.25 * GB),
    }
    limit = roofline(0, 0, traffic, two, limits)
    assert (limit.ici, limit.network) == (1.0, 2.0)


def test_devices_that_are_only_counted() -> None:
    counted = AbstractMesh((1, 8), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    assert axes_bandwidth(counted, "fsdp", chip("NVIDIA H100 80GB HBM3")) == (450 * GB, True)
    assert axes_bandwidth(counted, "fsdp", chip("TPU v5p")) == (2 * 100 * GB, False)


def test_the_bound() -> None:
    roofline = Roofline(compute=2.0, hbm=0.5, ici=3.0, network=0.0)
    assert (roofline.bound, roofline.seconds, roofline.seconds_without_overlap) == ("ici", 3.0, 5.5)
