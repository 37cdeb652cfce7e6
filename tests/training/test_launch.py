"""`nextllm_jax.train(config)`, which train.py calls too."""

import concurrent.futures
import dataclasses
import shutil
import signal
import subprocess
import sys

import pytest

import nextllm_jax
from nextllm_jax import process
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.cli.main import train_command
from nextllm_jax.config.files import load_config_file
from nextllm_jax.errors import InputError


def test_the_public_names_are_there():
    assert {name: getattr(nextllm_jax, name).__name__ for name in nextllm_jax.__all__} == {
        name: name for name in ("LLM", "Config", "load", "train")
    }


def test_a_notebook_trains_in_a_thread_and_keeps_its_signal_handlers(trained, door, monkeypatch, messages, capsys):
    """The run is finished already, so nothing is compiled."""
    monkeypatch.chdir(door.directory)
    shutil.copytree(trained.directory / "runs", "runs")
    config = load_config_file("config.py")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(nextllm_jax.train, config).result() == "finished"
    assert any("the run is finished at step 40" in message for message in messages.messages)
    assert nextllm_jax.train(config) == "finished"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert capsys.readouterr() == ("", ""), "messages go to the handlers that the program has configured"
    with pytest.raises(InputError, match=r"another config.*\n.*seed 0 -> 1"):
        nextllm_jax.train(dataclasses.replace(config, seed=1))
    (door.directory / "corpus").unlink()
    shutil.copytree(trained.directory / "corpus", "corpus")
    (door.directory / "corpus" / "new.txt").write_text("added since the run began")
    prepared = sorted((door.directory / "data").iterdir())
    assert nextllm_jax.train(config) == "finished", "the run does not need the data of the new corpus"
    assert sorted((door.directory / "data").iterdir()) == prepared


def test_an_accepted_change_is_the_runs_and_the_first_command_continues_it(trained, door, monkeypatch, messages):
    """The run is finished already, so nothing is compiled."""
    monkeypatch.chdir(door.directory)
    monkeypatch.setattr(process, "restart_with_settings", lambda: None)
    shutil.copytree(trained.directory / "runs", "runs")
    first, rate = ["--config", "config.py"], "--optimizer.learning-rate"
    # The file says 0.005.
    assert train_command([*first, rate, "0.002", "--allow-change", "optimizer.learning-rate"]) == 0
    assert "changed: optimizer.learning_rate 0.005 -> 0.002" in messages.text
    assert "the command without them continues it too" in messages.text
    messages.clear()
    for _ in range(2):  # the first must not make the run forget
        assert train_command(first) == 0
        assert "optimizer.learning_rate is 0.002 instead of 0.005, by an earlier --allow-change" in messages.text
    assert RunDir("runs/config").read_config().optimizer.learning_rate == 0.002
    for value in ("0.005", "0.001"):
        with pytest.raises(InputError, match=rf"learning_rate 0.002 -> {value}"):
            train_command([*first, f"{rate}={value}"])
    text = (door.directory / "config.py").read_text()
    (door.directory / "edited.py").write_text(text.replace("learning_rate=5e-3", "learning_rate=1e-3"))
    with pytest.raises(InputError, match=r"learning_rate 0.002 -> 0.001"):
        train_command(["--config", "edited.py", "--workdir", "runs/config"])


NOTEBOOK = """
import asyncio, dataclasses, os, signal
import nextllm_jax
from nextllm_jax.config.files import load_config_file

async def cell(config):
    return nextllm_jax.train(config)

process, handlers = os.getpid(), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
config = load_config_file("config.py")
data = dataclasses.replace(config.data, num_processes=2)
training = dataclasses.replace(config.training, steps=3)
assert asyncio.run(cell(dataclasses.replace(config, data=data, training=training))) == "finished"
assert process == os.getpid()
assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
"""


def test_a_program_without_a_guard_trains_as_in_a_notebook(door):
    """In a running event loop, with a notebook's backend for pictures. Worker processes prepare the data."""
    (door.directory / "data").unlink()  # that of the other tests
    (door.directory / "notebook.py").write_text(NOTEBOOK)
    environment = {**door.environment, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, "notebook.py"]
    done = subprocess.run(
        command, cwd=door.directory, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "disabled" not in done.stderr
    assert done.stderr.count("finished at step 3;") == 1
    run = door.directory / "runs" / "config"
    assert all((run / name).stat().st_size for name in ("loss.png", "layers.png", "samples.txt", "metrics.jsonl"))
