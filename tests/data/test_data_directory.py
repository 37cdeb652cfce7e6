"""Whatever somebody else put into or beside a data directory stays there."""

import json

import numpy as np
import pytest

from nextllm_jax.data.data_directory import check_replaceable, publish, read_settings, start_or_continue
from nextllm_jax.data.shards import FORMAT, SPLITS, Dataset, TokenizedDocuments, write_index, write_split
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.bpe import train_tokenizer

TOKENIZER = train_tokenizer(["some text to learn from"], 258)
SETTINGS = {"format": FORMAT, "corpus": "books"}


def write_prepared(directory, length=9):
    """A prepared directory of one document of `length` tokens."""
    directory.mkdir()
    start_or_continue(directory, SETTINGS)
    part = TokenizedDocuments(np.arange(length), np.array([length]), length)
    splits = {name: write_split(directory, name, [part], vocab_size=258, tokens_per_shard=4) for name in SPLITS}
    TOKENIZER.save(directory / "tokenizer")
    write_index(directory, TOKENIZER, splits)
    return directory


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_publishing_over_older_data_leaves_its_neighbours_alone(tmp_path):
    output = write_prepared(tmp_path / "out")
    for neighbour in ("out.old", "out.replaced-", "out.replaced"):
        (tmp_path / neighbour).mkdir()
        (tmp_path / neighbour / "thesis.txt").write_text("precious")
    before = names(tmp_path)
    publish(write_prepared(tmp_path / "out.partial", length=5), output)
    assert Dataset.open(output).split("train").num_tokens == 5
    assert names(tmp_path) == before
    for neighbour in ("out.old", "out.replaced-", "out.replaced"):
        assert (tmp_path / neighbour / "thesis.txt").read_text() == "precious"


def test_publishing_into_a_free_place(tmp_path):
    for output in (tmp_path / "new", tmp_path / "empty"):
        if output.name == "empty":
            output.mkdir()
        check_replaceable(output, overwrite=False)
        publish(write_prepared(tmp_path / f"{output.name}.partial"), output)
        Dataset.open(output)


def test_prepared_data_alone_may_be_overwritten(tmp_path):
    output = write_prepared(tmp_path / "out")
    with pytest.raises(InputError, match=r"other settings.*--overwrite"):
        check_replaceable(output, overwrite=False)
    check_replaceable(output, overwrite=True)
    index = json.loads((output / "index.json").read_text())
    (output / "index.json").write_text(json.dumps({**index, "format": "nextllm_jax tokens 1"}))
    check_replaceable(output, overwrite=True)
    (output / "train-00000.bin").unlink()  # damaged data is what one wants to replace
    check_replaceable(output, overwrite=True)


@pytest.mark.parametrize("content", ['{"pages": ["a.html"]}', "[]", "{", '{"format": "other"}', '{"format": 3}', ""])
def test_the_index_of_something_else_is_not_prepared_data(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    (tmp_path / "a.html").write_text("a page")
    with pytest.raises(InputError, match="is not prepared data; name another directory"):
        check_replaceable(tmp_path, overwrite=True)


@pytest.mark.parametrize("name", ["notes.txt", "train-00077.bin", "tokenizer/notes.txt", ".git", "empty/"])
def test_prepared_data_with_other_files_is_not_overwritten(tmp_path, name):
    output = write_prepared(tmp_path / "out")
    (output / name).mkdir() if name.endswith("/") else (output / name).write_text("mine")
    with pytest.raises(InputError, match=f"other than prepared data \\({name.strip('/')}\\); move them away"):
        check_replaceable(output, overwrite=True)


def test_a_damaged_index_lets_nothing_be_removed(tmp_path):
    output = write_prepared(tmp_path / "out")
    (output / "index.json").write_text(json.dumps({"format": SETTINGS["format"], "splits": 3}))
    with pytest.raises(InputError, match="holds files other than prepared data"):
        check_replaceable(output, overwrite=True)


def test_a_start_keeps_what_the_same_settings_left_and_drops_the_rest(tmp_path):
    for settings, kept in [(SETTINGS, False), (SETTINGS, True), ({**SETTINGS, "corpus": "other"}, False)]:
        start_or_continue(tmp_path, settings)
        assert read_settings(tmp_path) == settings
        assert (tmp_path / "parts").exists() == kept
        (tmp_path / "parts").mkdir(exist_ok=True)


@pytest.mark.parametrize("settings", ['{"theme": "dark"}', "{", None])
def test_a_start_refuses_a_directory_of_somebody_else(tmp_path, settings):
    (tmp_path / "thesis.txt").write_text("precious")
    if settings is not None:
        (tmp_path / "settings.json").write_text(settings)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="holds other files; move them away"):
        start_or_continue(tmp_path, SETTINGS)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_start_cut_short_while_it_wrote_its_settings_goes_on(tmp_path):
    (tmp_path / "settings.json.tmp").write_text("{")
    start_or_continue(tmp_path, SETTINGS)
    assert names(tmp_path) == ["settings.json"]
