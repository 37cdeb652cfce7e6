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
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and has no ladder; choose another --workdir"):
        climb(tmp_path, trainer)
    assert trainer.measured == []


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"format": "other"}', '{"format": "nextllm_jax ladder 1", "config": {}}']
)
def test_a_damaged_record_is_refused(tmp_path, trainer, content):
    (tmp_path / "ladder.json").write_text(content)
    with pytest.raises(InputError, match=r"ladder\.json"):
        climb(tmp_path, trainer)
