import subprocess
import sys

import pytest

from nextllm_jax import hardware


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
    ],
)
def test_peak_of_known_chips(kind, teraflops):
    chip = hardware.chip(kind)
    assert chip is not None
    assert chip.peak_flops_bf16 == teraflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_unknown_device_has_no_peak(kind):
    assert hardware.chip(kind) is None


def test_every_entry_is_plausible():
    # A slip of a power of ten: all of these chips do 60 to 600 bf16 operations per byte that they can read.
    for kind, chip in hardware._CHIPS.items():
        assert 60 < chip.peak_flops_bf16 / chip.hbm_bandwidth < 600, kind
        assert 8 * 2**30 <= chip.hbm_bytes <= 256 * 2**30, kind


def test_import_does_not_import_jax():
    code = "import sys, nextllm_jax.hardware; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
