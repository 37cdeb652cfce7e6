"""`nextllm plan` as a user types it; what is compiled for TPUs needs libtpu, but no TPU."""

import importlib.util
import json
from pathlib import Path

import pytest

from nextllm_jax import process
from nextllm_jax.cli.plan import plan_command
from nextllm_jax.errors import InputError
from nextllm_jax.plan.topology import tpu_slices

COMMAND = ("nextllm_jax.cli", "plan", "--config", "config.py")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either --topology, or --fast and --chip"),
        (["--chip", "NVIDIA H200", "--devices", "8"], "--chip can only be estimated; add --fast"),
        (["--chip", "Abacus", "--devices", "8", "--fast", "--search"], "chip 'Abacus' is unknown; the known ones are"),
        (["--topology", "v5e:4x4", "--devices", "8"], "--devices is for --chip"),
        (["--topology", "v5e:4x4", "--decode", "--fast"], "--decode always compiles"),
        (["--topology", "v5e:4x4", "--quantize", "int8"], "--quantize is for sampling; add --decode"),
        (["--topology", "v5e:4x4", "--hlo", "none/step.hlo"], "--hlo none/step.hlo cannot be written; name a file in"),
        (["--topology", "v5e:4x4", "--days", "0"], "days is 0.0; it must be positive"),
    ],
)
def test_bad_input_is_one_sentence(door, arguments, sentence) -> None:
    done = door.run(*COMMAND, *arguments, exit_code=2)
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_estimate_for_gpus(door) -> None:
    arguments = ("--fast", "--chip", "NVIDIA H100 80GB HBM3", "--devices", "4", "--mesh.tensor", "2", "--days", "1")
    values = json.loads(door.run(*COMMAND, *arguments, "--json").stdout)
    assert values["mesh"] == {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 2, "expert": 1}
    assert values["estimated"]
    assert values["fits"]
    assert values["memory"]["peak_bytes"] > values["memory"]["argument_bytes"]
    assert "estimated" in door.run(*COMMAND, *arguments).stdout


def test_an_unknown_chip_has_memory_without_speed(monkeypatch, caplog, capsys) -> None:
    """A name from a shop instead of JAX's: the memory does not depend on it."""
    monkeypatch.setattr(process, "use_planning_settings", lambda: None)  # which are for the whole process
    config = str(Path(__file__).parent.parent.parent / "configs" / "tiny.py")
    arguments = ["--config", config, "--fast", "--chip", "NVIDIA RTX 4090", "--devices", "4"]
    plan_command([*arguments, "--json"])
    assert "did you mean NVIDIA GeForce RTX 4090?); the known ones are TPU v2, TPU v3" in caplog.text
    values = json.loads(capsys.readouterr().out)
    assert values["memory"]["peak_bytes"] > 0
    assert all(values[name] is None for name in ("fits", "hbm_bytes", "roofline", "tokens_per_second", "days"))
    plan_command(arguments)
    table = capsys.readouterr().out
    assert "the capacity and the speed of the device are unknown" in table
    assert "tokens/s" not in table
    assert "a save writes " in table
    assert values["save"]["num_hosts"] == 1
    assert values["save"]["seconds"] == values["save"]["host_bytes"] / 1e9


def test_without_libtpu(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install '\.\[tpu\]'"):
        tpu_slices("v5e:4x4")


@pytest.mark.tpu
def test_a_topology_that_does_not_exist(door) -> None:
    pytest.importorskip("libtpu")
    done = door.run(*COMMAND, "--topology", "v9:2x2", exit_code=2)
    assert "libtpu knows no topology 'v9:2x2'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.tpu
def test_a_train_step_for_four_tpus(door) -> None:
    pytest.importorskip("libtpu")
    config = str(Path(__file__).parent.parent.parent / "configs" / "tiny.py")
    mesh = ("--topology", "v5e:2x2", "--mesh.data", "1", "--mesh.fsdp", "4")
    done = door.run(*COMMAND[:-1], config, *mesh, "--model.remat", "full", "--json", "--hlo", "step.hlo")
    values = json.loads(done.stdout)
    assert (door.directory / "step.hlo").read_text().startswith("HloModule")
    assert values["device_kind"] == "TPU v5 lite"
    assert values["devices"] == 4
    assert values["fits"]
    memory = values["memory"]
    assert memory["argument_bytes"] > 12 * values["parameters"] / 4  # a chip pads small arrays
    assert memory["temporary_bytes"] > 0
    assert memory["argument_bytes"] < memory["peak_bytes"] < values["hbm_bytes"]
    sent, least = (
        sum(row["sent_bytes"] for row in values[name] if row["axes"] == "fsdp" and row["dtype"] == "bf16")
        for name in ("collectives", "collectives_minimum")
    )
    assert sent == pytest.approx(least, rel=0.25)  # every loop multiplied out, and nothing counted twice
    assert values["unknown_loops"] == 0
    assert abs(values["flops_check"]["relative_difference"]) < 0.1
    assert values["roofline"]["ici_seconds"] > 0


@pytest.mark.slow
@pytest.mark.tpu
def test_a_batch_that_no_tpu_holds_is_reported(door) -> None:
    pytest.importorskip("libtpu")
    batch = ("--training.global-batch-size", "4194304")
    values = json.loads(door.run(*COMMAND, "--topology", "v5e:2x2", *batch, "--json").stdout)
    assert not values["fits"]
    assert values["memory"]["peak_bytes"] > values["out_of_memory"]["limit_bytes"] > 15 * 2**30
    assert values["advice"][0].startswith("--mesh.data 1 --mesh.fsdp 4")
