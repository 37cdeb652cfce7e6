"""`nextllm_jax.train(config)`, which train.py calls too."""

import concurrent.futures
import dataclasses
import shutil
import signal

import pytest

import nextllm_jax
from nextllm_jax.config.files import load_config_file
from nextllm_jax.errors import InputError
from nextllm_jax.training import launch


def test_the_public_names_are_there():
    assert {name: getattr(nextllm_jax, name).__name__ for name in nextllm_jax.__all__} == {
        name: name for name in ("LLM", "Config", "load", "train")
    }


def test_a_notebook_trains_in_a_thread_and_keeps_its_signal_handlers(trained, door, monkeypatch, capsys):
    """The run is finished already, so nothing is compiled."""
    monkeypatch.chdir(door.directory)
    monkeypatch.setattr(launch, "use_compilation_cache", lambda: None)  # it is the whole process's
    shutil.copytree(trained.directory / "runs", "runs")
    config = load_config_file("config.py")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(nextllm_jax.train, config).result() == "finished"
    assert "the run is finished at step 40" in capsys.readouterr().out
    assert nextllm_jax.train(config) == "finished"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    with pytest.raises(InputError, match=r"another config.*\n.*seed 0 -> 1"):
        nextllm_jax.train(dataclasses.replace(config, seed=1))
    (door.directory / "corpus").unlink()
    shutil.copytree(trained.directory / "corpus", "corpus")
    (door.directory / "corpus" / "new.txt").write_text("added since the run began")
    prepared = sorted((door.directory / "data").iterdir())
    assert nextllm_jax.train(config) == "finished", "the run does not need the data of the new corpus"
    assert sorted((door.directory / "data").iterdir()) == prepared
