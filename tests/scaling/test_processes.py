"""Runs as real processes of `nextllm train`: options, progress, signals, failures."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.cli.main import parse_train
from nextllm_jax.config.fields import command_line_options
from nextllm_jax.config.files import load_config_file
from nextllm_jax.errors import InputError
from nextllm_jax.scaling.processes import Interrupted, Trainer, finished_loss, interruptible

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def test_options_turn_one_config_into_another():
    file, wanted = (load_config_file(str(CONFIGS / f"{name}.py")) for name in ("small", "llama3_405b"))
    model = dataclasses.replace(wanted.model, qk_norm=False, layer_pattern=("local", "global"), attention_bias=True)
    training = dataclasses.replace(wanted.training, sample_prompts=("a 'b'", "c"))
    wanted = dataclasses.replace(wanted, model=model, training=training)
    options = command_line_options(wanted, file)
    assert {"--model.no-qk-norm", "--model.attention-bias", "--optimizer.adamw-learning-rate"} <= set(options)
    assert parse_train(["--config", "small.py", *options], file).run == wanted
    assert command_line_options(file, file) == []


@pytest.fixture
def small(door, monkeypatch):
    """A trainer in a fresh directory with prepared data, and the config of a short run."""
    monkeypatch.chdir(door.directory)
    file = load_config_file("config.py")
    config = dataclasses.replace(
        file,
        workdir="ladder/rung_1",
        training=dataclasses.replace(file.training, steps=30, evaluate_every_steps=30, sample_tokens=0),
        checkpoint=dataclasses.replace(file.checkpoint, every_steps=10),
    )
    return Trainer("config.py", file, door.environment), config


def test_a_signal_stops_the_run_which_then_continues(small):
    trainer, config = small
    steps, handler = [], signal.getsignal(signal.SIGTERM)

    def show(step):
        steps.append(step)
        if step > 0 and not any(steps[:-1]):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        trainer.train(config, show)
    assert signal.getsignal(signal.SIGTERM) == handler
    if finished_loss(config) is None:  # else the run was faster than the signal
        trainer.train(config, steps.append)
    assert steps == sorted(steps)
    assert 0 < finished_loss(config) < 8
    log = Path("ladder/rung_1.log").read_text()
    assert "finished at step 30" in log


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_run_stops_when_its_ladder_is_killed(small):
    trainer, config = small
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=100_000))

    def train():
        trainer.train(config, lambda step: os.kill(os.getpid(), signal.SIGKILL) if step else None)

    killed = multiprocessing.get_context("fork").Process(target=train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns of every fork
        killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    run = RunDir("ladder/rung_1")
    for _ in range(600):
        with contextlib.suppress(InputError):
            run.require_unlocked()
            break
        time.sleep(0.1)
    assert "SIGTERM: saved step" in Path("ladder/rung_1.log").read_text()


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_fails_says_why(small):
    trainer, config = small
    bad = dataclasses.replace(config, data=dataclasses.replace(config.data, path="nowhere"))
    with pytest.raises(InputError, match=r"the training in ladder/rung_1 failed with exit code 2: .*nowhere"):
        trainer.train(bad, print)
