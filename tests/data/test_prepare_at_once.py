"""Several processes that prepare data in one directory at once: one does the work, and nothing is done twice."""

import contextlib
import dataclasses
import signal
import types

import pytest

from nextllm_jax.config import DataConfig
from nextllm_jax.config.files import load_config_file
from nextllm_jax.data import data_directory
from nextllm_jax.data import prepare as prepare_module
from nextllm_jax.data.data_directory import claimed, remove_replaced
from nextllm_jax.data.prepare import prepare
from nextllm_jax.data.settings import default_data_path
from nextllm_jax.data.shards import Dataset, partial_path
from nextllm_jax.errors import InputError
from tests.conftest import write_corpus
from tests.runs import metrics


@pytest.fixture
def config(tmp_path):
    write_corpus(tmp_path / "corpus", documents=8)
    corpus = str(tmp_path / "corpus")
    return DataConfig(corpus=corpus, vocab_size=300, num_processes=1, validation_fraction=0.2)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def entries(directory):
    return sorted(entry.name for entry in directory.iterdir())


def before_the_claim(monkeypatch, action):
    """Have `action` happen when `prepare` has looked at the output and not yet claimed it."""

    def claim(*args, **settings):
        monkeypatch.setattr(prepare_module, "claimed", claimed)
        action()
        return claimed(*args, **settings)

    monkeypatch.setattr(prepare_module, "claimed", claim)


def test_while_another_process_prepares_it_is_refused(config, output):
    with claimed(partial_path(output), output), pytest.raises(InputError, match="another process is preparing"):
        prepare(config, output)
    assert entries(output.parent) == ["corpus"]
    prepare(config, output)


def test_data_that_was_published_before_the_claim_is_not_prepared_twice(config, output, monkeypatch, messages):
    before_the_claim(monkeypatch, lambda: prepare(config, output))
    prepare(config, output)
    assert messages.text.count("training a tokenizer") == 1
    assert f"{output} is already prepared" in messages.messages
    assert entries(output.parent) == ["corpus", "out"]


def test_other_data_that_was_published_before_the_claim_is_refused_without_work(config, output, monkeypatch, messages):
    other = dataclasses.replace(config, vocab_size=290)
    before_the_claim(monkeypatch, lambda: prepare(other, output))
    with pytest.raises(InputError, match="prepared with other settings"):
        prepare(config, output)
    assert messages.text.count("training a tokenizer") == 1
    assert entries(output.parent) == ["corpus", "out"]
    before_the_claim(monkeypatch, lambda: prepare(other, output))
    prepare(config, output, overwrite=True)
    assert Dataset.open(output).vocab_size == 300


@pytest.mark.parametrize("leave", [lambda partial, output: partial.rename(output), lambda partial, _: partial.rmdir()])
@pytest.mark.parametrize("moment", ["lock_file", "_is_at", "open"])
def test_a_directory_that_goes_while_it_is_claimed_is_not_the_claimed_one(output, monkeypatch, leave, moment):
    owner = data_directory.os if moment == "open" else data_directory
    real, partial, calls = getattr(owner, moment), partial_path(output), []

    def after_it_left(*args):
        calls.append(args)
        if len(calls) == 1:
            leave(partial, output)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, after_it_left)
        stack = contextlib.ExitStack()
        stack.enter_context(claimed(partial, output))
    assert len(calls) == 2
    with stack, pytest.raises(InputError, match="another process is preparing"), claimed(partial, output):
        pass
    assert not partial.exists()


class Clock(types.SimpleNamespace):
    """Stands in for the module `time`: sleeping is what lets `action` happen, after so many seconds."""

    def __init__(self, seconds, action):
        super().__init__(now=0.0, seconds=seconds, action=action)

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        if self.now >= self.seconds and self.action:
            self.action()
            self.action = None


@pytest.mark.parametrize("seconds", [0.1, 5])
def test_waiting_for_a_process_that_finishes_takes_its_data(config, output, tmp_path, monkeypatch, messages, seconds):
    prepare(config, tmp_path / "elsewhere")
    partial, other = partial_path(output), contextlib.ExitStack()
    other.enter_context(claimed(partial, output))

    def finish():
        partial.rmdir()
        (tmp_path / "elsewhere").rename(partial)
        partial.rename(output)
        other.close()

    monkeypatch.setattr(data_directory, "time", Clock(seconds, finish))
    messages.clear()
    prepare(config, output, wait=True)
    assert f"{output} is already prepared" in messages.messages
    assert messages.text.count(f"waiting for another process, which is preparing {output}") == (seconds > 1)
    assert entries(tmp_path) == ["corpus", "out"]


def test_waiting_for_a_process_that_dies_goes_on_from_its_parts(config, output, monkeypatch, messages):
    def die(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "publish", die)
        with pytest.raises(RuntimeError, match="killed"):
            prepare(config, output)
    other = contextlib.ExitStack()
    other.enter_context(claimed(partial_path(output), output))
    monkeypatch.setattr(data_directory, "time", Clock(5, other.close))
    messages.clear()
    prepare(config, output, wait=True)
    assert "continuing the interrupted preparation" in messages.text
    Dataset.open(output)


def test_the_older_data_may_be_removed_by_two_at_once(output, monkeypatch):
    replaced = output / data_directory._REPLACED
    replaced.mkdir(parents=True)
    remove = data_directory.shutil.rmtree

    def removed_by_another(path):
        remove(path)
        raise FileNotFoundError(path)

    monkeypatch.setattr(data_directory.shutil, "rmtree", removed_by_another)
    remove_replaced(output)
    assert entries(output) == []


def wait_until(process, text):
    """What a training has printed on standard error up to a line with `text`."""
    printed = ""
    for line in process.stderr:
        printed += line
        if text in line:
            return printed
    raise AssertionError(printed)


@pytest.mark.slow
def test_two_trainings_at_once_prepare_their_data_once(door, trained):
    (door.directory / "data").unlink()  # that of the other tests
    path = door.directory / default_data_path(load_config_file(str(door.directory / "config.py")).data)
    command = ("train.py", "--config", "config.py")
    with claimed(partial_path(path), path):
        interrupted = door.start(*command)
        wait_until(interrupted, "waiting for another process")
        interrupted.send_signal(signal.SIGTERM)
        _, err = interrupted.communicate(timeout=60)
        assert interrupted.returncode == 75, err
        assert "SIGTERM while preparing data: nothing is lost" in err
        both = [door.start(*command, "--workdir", f"runs/{name}") for name in ("a", "b")]
        for process in both:
            wait_until(process, "waiting for another process")
    printed = ""
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        printed += out
    assert printed.count("training a tokenizer") == printed.count("is already prepared") == 1
    assert entries(path.parent) == [path.name]
    expected = [line["loss"] for line in metrics(trained.directory / "runs" / "config", "train")]
    for name in ("a", "b"):
        assert [line["loss"] for line in metrics(door.directory / "runs" / name, "train")] == expected
