"""Versions, sizes and clocks, each of which can be found wanting."""

import dataclasses
import importlib.metadata
import math
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nextllm_jax import hardware
from nextllm_jax.config import CheckpointConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
from nextllm_jax.config.files import load_config_file
from nextllm_jax.diagnostics import machine
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.sharding import make_mesh
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.state import abstract_state


def test_versions_out_of_range_are_named(monkeypatch):
    assert machine.versions()[1] == "ok"
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "jax" else version(name))
    message, status = machine.versions()
    assert status == "PROBLEM"
    assert message.startswith("jax is 0.1, but >=")

    def missing(name):
        if name == "grain":
            raise importlib.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert machine.versions()[0].startswith("grain is missing; run pip install")


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("first_moment_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_the_bytes_of_the_state_are_those_of_the_arrays(param_dtype, first_moment_dtype, name):
    optimizer = OptimizerConfig(name=name, first_moment_dtype=first_moment_dtype)
    config = ModelConfig(num_layers=2, embed_dim=16, mlp_dim=32, vocab_size=50, head_dim=8, param_dtype=param_dtype)
    state = abstract_state(Transformer(config), make_optimizer(optimizer, config), make_mesh(MeshConfig()))
    arrays = jax.tree.leaves((state.params, state.opt_state))
    counter = 4  # optax's own
    found = machine.state_bytes(Config(model=config, data=DataConfig(tokenizer="gpt2"), optimizer=optimizer))
    assert found == sum(leaf.size * leaf.dtype.itemsize for leaf in arrays) - counter


class Accelerator:
    """What jax says of a device that this machine does not have."""

    platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def accelerators(stats, **shape):
    devices = np.array([Accelerator(stats) for _ in range(math.prod(shape.values()))])
    return SimpleNamespace(
        shape={"data": 1, "fsdp": 1, "tensor": 1, "expert": 1} | shape, devices=devices, local_devices=devices
    )


@pytest.mark.parametrize(
    ("stats", "fsdp", "host", "status", "words"),
    [
        (None, 1, None, "PROBLEM", "take 119.7 GiB per device; the NVIDIA H100 80GB HBM3 has 80.0 GiB; use a smaller"),
        (None, 8, None, "ok", "take 15.0 GiB per device; the NVIDIA H100 80GB HBM3 has 80.0 GiB"),
        ({"bytes_limit": 20 * 2**30}, 8, None, "warning", "has 20.0 GiB, which leaves little for activations"),
        ({"bytes_limit": 10 * 2**30}, 8, None, "PROBLEM", "has 10.0 GiB"),
        (None, 8, 2**30, "warning", "a save copies 89.7 GiB to the host, which has 1.0 GiB free"),
    ],
)
def test_the_memory_of_accelerators(monkeypatch, stats, fsdp, host, status, words):
    """Llama 3 8B: parameters, gradients and two moments of 4 bytes each."""
    monkeypatch.setattr(hardware, "available_host_memory", lambda: host)
    config = load_config_file(str(Path(__file__).parents[2] / "configs" / "llama3_8b.py"))
    said, found = machine.memory(config, accelerators(stats, fsdp=fsdp))
    assert words in said
    assert found == status, said


def test_the_time_of_a_save_is_compared_with_the_time_to_preemption():
    """Llama 3 8B has 12 bytes of state a parameter."""
    config = load_config_file(str(Path(__file__).parents[2] / "configs" / "llama3_8b.py"))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, preemption_seconds=25.0))
    for hosts, status in ((4, "ok"), (2, "warning")):
        mesh = SimpleNamespace(devices=np.array([SimpleNamespace(process_index=i // 4) for i in range(4 * hosts)]))
        said, found = machine.save_time(config, mesh)
        seconds = 8_030_261_248 * 12 / hosts / 1e9
        assert f"each of {hosts} hosts, which takes {seconds:.1f} s at 1,000 MB/s" in said
        assert found == status
        assert ("SIGTERM starts no save, since training.preemption_seconds is 25" in said) == (status == "warning")


def test_available_memory_is_known_here():
    there = hardware.available_host_memory()
    assert there is not None
    assert 2**20 < there < 2**50


def test_a_clock_that_jumps_or_went_back_is_told_of(tmp_path):
    now = (time.time(), time.monotonic())
    assert machine.clock(tmp_path / "run", now)[1] == "ok"
    message, status = machine.clock(tmp_path / "run", (now[0] - 60, now[1]))
    assert (re.match(r"the clock jumped by \+(59|60)\.", message) is not None, status) == (True, "warning")
    (tmp_path / "config.json").write_text("")
    os.utime(tmp_path / "config.json", (now[0] + 3600, now[0] + 3600))
    message, status = machine.clock(tmp_path, now)
    assert status == "warning"
    assert "the clock was set back" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_a_file_system_with_a_time_of_its_own_is_told_of(tmp_path, monkeypatch):
    stat = Path.stat

    def late(self, **options):
        found = stat(self, **options)
        return found if "clock" not in self.name else os.stat_result((*found[:8], found.st_mtime + 90, *found[9:]))

    monkeypatch.setattr(Path, "stat", late)
    message, status = machine.clock(tmp_path, (time.time(), time.monotonic()))
    assert status == "warning"
    assert "s off the system clock" in message


def test_retention_counts_in_the_disk_that_is_needed(tmp_path):
    config = Config(workdir=str(tmp_path), model=ModelConfig(vocab_size=8192))
    message, _ = machine.disk(config, data_bytes=0)
    assert message.startswith("up to 3 checkpoints of ")
    kept = CheckpointConfig(keep_last=3, keep_every_steps=1000)  # and 5,000 steps
    kept = dataclasses.replace(config, checkpoint=kept)
    assert machine.disk(kept, data_bytes=0)[0].startswith("up to 9 check")
