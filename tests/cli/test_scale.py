"""`nextllm scale` as a user types it, and on the default corpus."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from nextllm_jax import process
from nextllm_jax.cli.scale import scale_command
from nextllm_jax.errors import InputError
from nextllm_jax.scaling.family import size_of
from nextllm_jax.scaling.processes import Trainer
from tests.conftest import ROOT, Door

GPUS = ("--chip", "NVIDIA H100 80GB HBM3", "--devices", "8")
LADDER = ("--config", "config.py", "--ladder-flops", "4e10", "--tokens-per-parameter", "4")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either --budget, or --days with --topology"),
        (["--budget", "1e15", "--days", "3"], "give either --budget, or --days with --topology"),
        (["--days", "3"], "--days needs the devices of the large run; add --topology or --chip"),
        (["--budget", "1e15", "--price", "2"], "--price needs the devices of the large run"),
        (["--budget", "1e15", "--topology", "v5e:2x2", "--chip", "NVIDIA L4"], "give either --topology or --chip"),
        (["--budget", "1e15", "--topology", "v5e:2x2", "--devices", "4"], "--devices is for --chip"),
        (["--budget", "1e15", "--rungs", "3"], "--rungs is 3; it must be at least 4"),
        (["--budget", "-1"], "--budget is -1.0; it must be from 1 to 1e+30"),
        (["--budget", "nan"], "--budget is nan; it must be from 1 to 1e+30"),
        (["--budget", "1e300"], "--budget is 1e+300; it must be from 1 to 1e+30"),
        (["--budget", "1e15", "--rungs", "1000000000"], "and at most 20"),
        (["--budget", "1e15", "--search-minutes", "nan"], "--search-minutes is nan; it must be at least 0"),
        (["--budget", "1e15", "--mfu", "0.5"], "--mfu is for --days"),
        (["--days", "1", "--topology", "v5e:2x2", "--mfu", "40"], "--mfu is 40.0; it must be a fraction"),
        (["--budget", "1e15", "--init-from", "smollm2"], "init_from is smollm2, but all runs start from new weights"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)) as refused:
        scale_command(["--config", str(ROOT / "configs" / "tiny.py"), *arguments])
    assert "\n" not in str(refused.value)


@pytest.fixture
def here(door, monkeypatch):
    """A directory with a config and prepared data; yields the runs that are trained. They write a result at once."""
    monkeypatch.chdir(door.directory)
    monkeypatch.setattr(process, "use_planning_settings", lambda: None)  # which are for the whole process
    trained = []

    def train(self, config, show):
        trained.append(config.workdir)
        Path(config.workdir).mkdir()
        loss = 0.3 + (size_of(config).flops / 1e8) ** -0.2
        line = {"split": "validation", "step": config.training.steps, "bits_per_byte": loss}
        (Path(config.workdir) / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr(Trainer, "num_devices", lambda self: 1)
    monkeypatch.setattr(Trainer, "measure", lambda self, config: 20_000.0)
    return trained


def test_a_small_ladder_from_start_to_end(here, messages, capsys):
    with pytest.raises(InputError, match=r"repeats the training data .* add --extrapolate") as refused:
        scale_command([*LADDER, "--budget", "1e12", *GPUS])
    assert "\n" not in str(refused.value)
    assert len(here) == 4
    assert "4 rungs of 9.9e+08 to 2.7e+10 FLOPs take about" in messages.text
    shown = capsys.readouterr().out
    assert "loss = E + A x FLOPs^-alpha" in shown
    assert "largest rung from the other 3" in shown
    assert "bits per byte" in shown
    assert "on NVIDIA" not in shown

    assert scale_command([*LADDER, "--budget", "1e12", *GPUS, "--price", "2", "--extrapolate", "--json"]) == 0
    assert len(here) == 4  # nothing is trained again
    values = json.loads(capsys.readouterr().out)
    assert [rung["flops"] for rung in values["rungs"]] == pytest.approx([1e9, 3e9, 9e9, 27e9], rel=0.05)
    assert abs(values["check"]["error"]) < 0.02
    large = values["large_run"]
    assert large["flops"] == pytest.approx(1e12, rel=0.02)
    truth = 0.3 + (1e12 / 1e8) ** -0.2
    assert large["bits_per_byte"]["low"] < truth < large["bits_per_byte"]["high"]
    assert large["bits_per_byte"]["median"] == pytest.approx(truth, abs=0.04)
    assert any("repeats the training data" in warning for warning in large["warnings"])
    plan = large["plan"]
    assert plan["devices"] == 8
    assert plan["estimated"]
    seconds = large["steps"] * plan["step_seconds"]
    assert large["least_days"] == pytest.approx(seconds / 86_400)
    assert large["least_cost"] == pytest.approx(seconds / 3600 * 8 * 2)
    assert Path("runs/config_ladder/scaling.png").read_bytes().startswith(b"\x89PNG")

    assert scale_command([*LADDER, "--days", "1e-8", *GPUS, "--mfu", "0.5", "--extrapolate"]) == 0
    shown = capsys.readouterr().out
    assert f"{1e-8 * 86400 * 8 * 989e12 * 0.5:.3g}" in shown
    assert re.search(r"memory per device +.* of 80\.0 GiB, estimated", shown)
    assert re.search(r"at least .* days, more than --days 1e-08; give an --mfu below 0\.5", messages.text)
    command = shown.split("python train.py ")[1].splitlines()[0]
    assert "--workdir runs/config_large" in command
    assert "--data.path" not in command

    with pytest.raises(InputError, match="no mesh, remat policy"):  # none divides the batch
        scale_command([*LADDER, "--budget", "1e12", *GPUS, "--devices", "7", "--extrapolate"])
    assert "the large run" in capsys.readouterr().out

    with pytest.raises(InputError, match=r"not more than the .* of the largest rung"):
        scale_command([*LADDER, "--budget", "1e10"])
    with pytest.raises(InputError, match=r"holds a ladder with other settings.*\n  ladder_flops 4"):
        scale_command([*LADDER, "--ladder-flops", "5e10", "--budget", "1e12"])


@pytest.mark.parametrize("phase", ["num_devices", "measure"])
def test_a_signal_between_the_runs(here, monkeypatch, messages, phase):
    monkeypatch.setattr(Trainer, phase, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert scale_command([*LADDER, "--budget", "1e12"]) == 75
    assert "interrupted; the same command continues" in messages.text
    assert here == []


@pytest.mark.slow
def test_a_ladder_of_processes(door):
    """The command, interrupted in its second rung and run again."""
    command = ("nextllm_jax.cli", "scale", *LADDER, "--budget", "1e12", "--extrapolate")
    process = door.start(*command)
    for line in process.stderr:
        if line.startswith("rung 1 of 4"):
            process.terminate()
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, out + err
    done = door.run(*command)
    assert "rung 1 of 4" not in done.stderr
    assert "rung 4 of 4" in done.stderr
    assert "python train.py --config config.py" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1"])
def test_the_largest_rung_is_predicted_from_the_others(compilation_cache, tmp_path, seed):
    """The default corpus; a few minutes for each seed. Longer ladders follow no curve, see docs/scaling.md."""
    door = Door(tmp_path, compilation_cache)
    config = ("--config", ROOT / "configs" / "tiny.py", "--seed", seed, "--budget", "1e14", "--ladder-flops", "1.2e13")
    process = door.start("nextllm_jax.cli", "scale", *config, "--extrapolate", "--json")
    out, err = process.communicate(timeout=3600)
    assert process.returncode == 0, err
    assert abs(json.loads(out)["check"]["error"]) < 0.02
