"""The rows of the embedding follow the prepared data, unless the config states them."""

import dataclasses
from pathlib import Path

import pytest

from nextllm_jax.config import Config, DataConfig, ModelConfig
from nextllm_jax.config.files import load_config_file
from nextllm_jax.errors import InputError
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.training.resume_guard import changes
from nextllm_jax.training.start import CHECKS, Start
from nextllm_jax.training.vocabulary import with_vocab_size


@pytest.fixture
def config(trained, monkeypatch) -> Config:
    """A config that states neither the rows nor anything about its data, which has 320 tokens."""
    monkeypatch.chdir(trained.directory)
    config = load_config_file("config.py")
    model = dataclasses.replace(config.model, vocab_size=0)
    return dataclasses.replace(config, model=model, data=DataConfig(path="data/known", sequence_length=64))


def test_the_prepared_data_decides_the_rows(config, trained):
    data = Path("data/known")
    rows = with_vocab_size(dataclasses.replace(config, workdir="new"), data)
    assert rows.model.vocab_size == 384  # a multiple of 128
    assert with_vocab_size(config, data, overwrite=True) == dataclasses.replace(rows, workdir=config.workdir)
    assert with_vocab_size(rows, None) == rows
    planned = dataclasses.replace(config.data, path=None, vocab_size=1000)
    unprepared = dataclasses.replace(config, data=planned, workdir="new")
    assert with_vocab_size(unprepared, None).model.vocab_size == 1024


def test_a_run_keeps_its_rows(config):
    assert with_vocab_size(config, Path("data/known")).model.vocab_size == 320
    recorded = load_config_file("config.py")
    assert not [change for change in changes(recorded, config) if change.name == "model.vocab_size"]
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=384))
    assert next(change.name for change in changes(recorded, other)) == "model.vocab_size"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (320, "320 tokens in the vocabulary, 320 rows in the embedding"),
        (8192, "320 tokens in the vocabulary, 8,192 rows in the embedding (7,872 of them padding)"),
    ],
)
def test_padding_is_reported(config, rows, said):
    from nextllm_jax.data.mixture import Source
    from nextllm_jax.data.shards import Dataset

    stated = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=rows))
    (fit,) = [check for check in CHECKS if check.name == "fit"]
    assert [remark.text for remark in fit.run(Start(stated, lambda: (Source(Dataset.open("data/known")),)))] == [said]


def test_prepared_data_is_compared_with_the_model_by_its_own_size():
    Config(data=DataConfig(path="data/known", vocab_size=8192), model=ModelConfig(vocab_size=4096))
    with pytest.raises(InputError, match=r"model.vocab_size is not stated"):
        abstract_params(ModelConfig())
