"""What a training keeps when it is interrupted, or fails in what it can do without; in this process, on one device."""

import dataclasses
import itertools
from pathlib import Path
from unittest import mock

import jax
import pytest

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.config.files import load_config_file
from nextllm_jax.pretrained.init_from import with_source
from nextllm_jax.sharding import make_mesh
from nextllm_jax.training import pictures, samples, start, validation
from nextllm_jax.training.loop import run_steps
from nextllm_jax.training.setup import open_session
from tests.runs import metrics

RUN = Path("run")


@pytest.fixture
def config(door, monkeypatch):
    """The config of the shared run, for a run of its own that saves and evaluates at the same steps."""
    monkeypatch.chdir(door.directory)
    monkeypatch.setattr(start, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    config = load_config_file("config.py")
    return dataclasses.replace(
        config,
        workdir=str(RUN),
        data=dataclasses.replace(config.data, path="data/known"),
        training=dataclasses.replace(config.training, log_every_steps=10),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=20),
    )


def train(config, **options):
    with open_session(config, **options) as (session, at):
        return run_steps(session, at)


def stop_at(call):
    """A request to stop that is met at a call of `reached`, which the loop makes before each step."""
    calls = itertools.count(1)
    return mock.Mock(reached=lambda: "SIGTERM" if next(calls) >= call else None)


def test_an_interruption_a_failed_evaluation_and_failed_output_lose_nothing(trained, config, monkeypatch, messages):
    assert train(config, stop=stop_at(16)) == "interrupted"
    checkpoints = Checkpoints(RUN / "checkpoints")
    assert checkpoints.steps() == [15]

    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate", mock.Mock(side_effect=RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            train(config)
    assert checkpoints.steps() == [15, 20]
    assert (checkpoints.validation_loss(20), checkpoints.record(20)["evaluated"]) == (None, False)

    monkeypatch.setattr(pictures, "draw_losses", mock.Mock(side_effect=ValueError("no fonts")))
    messages.clear()
    monkeypatch.setattr(samples, "sample_text", mock.Mock(side_effect=RuntimeError("no sampler")))
    assert train(config) == "finished"
    assert messages.messages.count("loss.png is disabled for this training (ValueError: no fonts)") == 1
    assert messages.messages.count("samples.txt is disabled for this training (RuntimeError: no sampler)") == 1

    reference = trained.directory / "runs" / "config"  # trained without an interruption, with a line for each step
    expected = {line["step"]: pytest.approx(line["loss"], rel=1e-5) for line in metrics(reference, "validation")}
    assert {line["step"]: line["loss"] for line in metrics(RUN, "validation")} == expected
    assert len(metrics(RUN, "validation")) == 2
    assert {step: checkpoints.validation_loss(step) for step in checkpoints.steps()} == expected
    steps = metrics(reference, "train")
    seen = [0, *(line["tokens_seen"] for line in steps)]
    for line in metrics(RUN, "train"):
        window = range(line["step"] - 10, line["step"])
        nll = sum(steps[i]["loss"] * (seen[i + 1] - seen[i]) for i in window)
        assert line["loss"] == pytest.approx(nll / (seen[line["step"]] - seen[line["step"] - 10]), rel=1e-5)


def test_the_score_before_the_first_step_outlives_an_interruption(trained, config, monkeypatch, messages):
    """A run that starts from other weights is saved, evaluated and sampled at step 0."""
    config = dataclasses.replace(config, init_from=str(trained.directory / "runs" / "config"))
    config, _ = with_source(config, config)
    sample_text = mock.Mock(return_value=[("def ", "f()")])
    monkeypatch.setattr(samples, "sample_text", sample_text)
    stop = mock.Mock(reached=lambda: "SIGTERM" if sample_text.called else None)
    written = []
    for _ in range(2):
        assert train(config, stop=stop) == "interrupted"
        written.append([(RUN / name).read_bytes() for name in ("metrics.jsonl", "samples.txt")])
    assert f"continuing from step 0 of {RUN}" in messages.messages
    assert written[0] == written[1]
    assert [line["step"] for line in metrics(RUN, "validation")] == [0]
    assert sample_text.call_count == 1
