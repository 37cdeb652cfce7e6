"""A ladder whose runs write their metrics at once: what is trained, recorded, continued and refused."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from nextllm_jax.errors import InputError
from nextllm_jax.scaling.ladder import Ladder, LadderSettings
from nextllm_jax.scaling.processes import Interrupted, Trainer
from tests.scaling.test_family import config

SETTINGS = LadderSettings(rungs=4, tokens_per_parameter=8.0, ladder_minutes=20.0, ladder_flops=None)
SPEED = 2_000


class FakeTrainer(Trainer):
    """Trains by writing the lines of metrics.jsonl; each smaller loss has a larger model."""

    trained: list[str]
    measured: list[int]
    stop_at: str | None

    def train(self, config, show):
        name = Path(config.workdir).name
        self.trained.append(name)
        show(config.training.steps // 2)
        if name == self.stop_at:
            raise Interrupted
        Path(config.workdir).mkdir()
        loss = 3 - config.model.embed_dim / 100
        line = {"split": "validation", "step": config.training.steps, "bits_per_byte": loss}
        (Path(config.workdir) / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    def num_devices(self):
        return 4

    def measure(self, config):
        self.measured.append(config.model.embed_dim)
        return SPEED


@pytest.fixture
def trainer():
    made = FakeTrainer("config.py", config("tiny"), {})
    made.trained, made.measured, made.stop_at = [], [], None
    return made


def climb(directory, trainer, base=None, **settings):
    ladder = Ladder(directory, base or config("tiny"), dataclasses.replace(SETTINGS, **settings), trainer)
    with ladder.lock():
        return ladder.climb(ladder.prepare())


def test_four_rungs_of_growing_compute(tmp_path, trainer, messages):
    rungs = climb(tmp_path / "ladder", trainer)
    assert trainer.trained == ["rung_1", "rung_2", "rung_3", "rung_4"]
    flops = [rung.size.flops for rung in rungs]
    assert [after / before for before, after in itertools.pairwise(flops)] == pytest.approx([3] * 3, rel=0.05)
    losses = [rung.loss for rung in rungs]
    assert losses == sorted(losses, reverse=True)
    assert all(rung.config.training.global_batch_size % 4 == 0 for rung in rungs)
    assert all(rung.config.training.evaluate_every_steps == rung.config.training.steps for rung in rungs)
    assert "4 rungs of" in messages.text
    assert "take about 0:20:00, at" in messages.text


def test_the_total_follows_the_measured_speed(tmp_path, trainer):
    slow = sum(rung.size.flops for rung in climb(tmp_path / "slow", trainer))
    fast = sum(rung.size.flops for rung in climb(tmp_path / "fast", trainer, ladder_minutes=40.0))
    assert len(trainer.measured) > 2  # until the measured size is about that of the largest rung
    assert 2 < fast / slow < 8  # twice the time; at a constant speed per token, larger models do more FLOPs in it
    given = climb(tmp_path / "given", trainer, ladder_flops=2e13)
    assert sum(rung.size.flops for rung in given) == pytest.approx(2e13, rel=0.02)


def test_an_interrupted_ladder_continues(tmp_path, trainer):
    trainer.stop_at = "rung_3"
    with pytest.raises(Interrupted):
        climb(tmp_path / "ladder", trainer)
    measured, trainer.stop_at, trainer.trained[:] = list(trainer.measured), None, []
    rungs = climb(tmp_path / "ladder", trainer)
    assert trainer.trained == ["rung_3", "rung_4"]
    assert trainer.measured == measured
    trainer.trained.clear()
    assert climb(tmp_path / "ladder", trainer) == rungs
    assert trainer.trained == []


def test_other_settings_are_refused_with_their_differences(tmp_path, trainer):
    climb(tmp_path / "ladder", trainer)
    record = (tmp_path / "ladder" / "ladder.json").read_bytes()
    base = config("tiny")
    base = dataclasses.replace(base, seed=5, model=dataclasses.replace(base.model, qk_norm=False))
    with pytest.raises(InputError) as refused:
        climb(tmp_path / "ladder", trainer, base, tokens_per_parameter=20.0)
    assert str(refused.value).splitlines() == [
        f"{tmp_path / 'ladder'} holds a ladder with other settings, which was not touched:",
        "  tokens_per_parameter 8.0 -> 20.0",
        "  seed 0 -> 5",
        "  model.qk_norm True -> False",
        "restore the old values, or start a new ladder: another --workdir",
    ]
    assert (tmp_path / "ladder" / "ladder.json").read_bytes() == record


def test_a_directory_with_something_else_is_refused(tmp_path, trainer):
    (tmp_path / "probe_notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and has no ladder; choose another --workdir"):
        climb(tmp_path, trainer)
    assert trainer.measured == []
    assert [file.name for file in tmp_path.iterdir()] == ["probe_notes.txt"]


def test_two_commands_do_not_share_a_directory(tmp_path, trainer):
    one, other = (Ladder(tmp_path, config("tiny"), SETTINGS, trainer) for _ in range(2))
    with one.lock(), pytest.raises(InputError, match="is in use by process"), other.lock():
        pass
    with other.lock():
        pass


@pytest.mark.parametrize(
    "content", ["{", "{}", "[]", '{"format": "other"}', '{"format": "nextllm_jax ladder 1", "config": {}}']
)
def test_a_damaged_record_is_refused(tmp_path, trainer, content):
    (tmp_path / "ladder.json").write_text(content)
    with pytest.raises(InputError, match=r"ladder\.json"):
        climb(tmp_path, trainer)


@pytest.mark.parametrize(
    "devices", [{"count": 0}, {"count": "4"}, {"total_flops": float("nan")}, {"total_flops": None}]
)
def test_damaged_devices_are_refused(tmp_path, trainer, devices):
    climb(tmp_path, trainer)
    record = json.loads((tmp_path / "ladder.json").read_text())
    record["devices"].update(devices)
    (tmp_path / "ladder.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"ladder\.json is damaged"):
        climb(tmp_path, trainer)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("{\n", r"rung_2/metrics\.jsonl is damaged .*; delete .*rung_2 to train this run again"),
        ("[]\n", r"rung_2/metrics\.jsonl is damaged"),
        ('{"step": 1}\n', r"rung_2/metrics\.jsonl is damaged"),
        ('{"split": "validation", "step": STEPS, "loss": null, "bits_per_byte": null}\n', "rung_2 is not finite"),
        ('{"split": "validation", "step": STEPS, "loss": 2.0, "bits_per_byte": null}\n', "give text as data"),
    ],
)
def test_metrics_without_a_loss_are_named(tmp_path, trainer, metrics, message):
    rungs = climb(tmp_path, trainer)
    steps = str(rungs[1].config.training.steps)
    (tmp_path / "rung_2" / "metrics.jsonl").write_text(metrics.replace("STEPS", steps))
    with pytest.raises(InputError, match=message):
        climb(tmp_path, trainer)
    assert len(trainer.trained) == 4


def test_a_finished_run_without_its_metrics_is_named(tmp_path, trainer, monkeypatch):
    climb(tmp_path, trainer)
    (tmp_path / "rung_2" / "metrics.jsonl").unlink()
    monkeypatch.setattr(FakeTrainer, "train", lambda *_: None)  # as of a run that is at its last step
    with pytest.raises(InputError, match=r"no validation loss of its last step; delete .*rung_2 to train it again"):
        climb(tmp_path, trainer)
