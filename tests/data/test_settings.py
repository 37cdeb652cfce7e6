"""Prepared data belongs to the content of its corpus, tokenizer and chat template, wherever they are."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from nextllm_jax.config import DataConfig
from nextllm_jax.data import prepare as prepare_module
from nextllm_jax.data import settings
from nextllm_jax.data.prepare import ensure_prepared, prepare
from nextllm_jax.data.settings import CONTENT_FIELDS, content_settings, continued, default_data_path, find_data
from nextllm_jax.data.shards import Dataset
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.bpe import train_tokenizer
from nextllm_jax.tokenizer.published import load_tokenizer

LETTERS = [chr(97 + number % 26) * (number + 1) for number in range(20)]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Twenty short files, with which the working directory has no data yet."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number, text in enumerate(LETTERS):
        Path(f"texts/{number:02}.txt").write_text(text)
    return DataConfig(corpus="texts", vocab_size=260, num_processes=1)


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_names_of_data_without_paths_stay():
    paths = {
        "some_set-gpt2-e8ac74da": DataConfig(corpus="hf:org/some-set", tokenizer="gpt2"),
        "some_set-bpe8192-fdc9e7da": DataConfig(corpus="hf:org/some-set", text_field="m"),
    }
    for name, config in paths.items():
        assert default_data_path(config) == Path("data") / name, "this name is that of an earlier version"
    assert default_data_path(DataConfig()).name.startswith("stdlib-bpe8192-")
    assert default_data_path(DataConfig(path="elsewhere")) == Path("elsewhere")


def test_the_default_path_follows_the_settings_that_change_the_data(config):
    path = default_data_path(config)
    assert path.name.startswith("texts-bpe260-")
    for same in ({"sequence_length": 128}, {"num_processes": 3}, {"verify": "full"}, {"chat_template": "x"}):
        assert default_data_path(dataclasses.replace(config, **same)) == path
    others = [
        {"validation_fraction": 0.1}, {"vocab_size": 4096}, {"tokens_per_shard": 2048}, {"deduplicate": "exact"},
        {"skip_bad_rows": 1}, {"messages_field": "m"},
    ]  # fmt: skip
    assert len({path, *(default_data_path(dataclasses.replace(DataConfig(), **other)) for other in others)}) == 7


def test_equal_copies_agree_and_every_change_counts(config):
    path = default_data_path(config)
    shutil.copytree("texts", "elsewhere/texts")
    os.utime("elsewhere/texts/00.txt", ns=(0, 10**9))
    copied = dataclasses.replace(config, corpus="elsewhere/texts")
    assert default_data_path(copied) == path
    found = [path]
    stat = os.stat("texts/19.txt")
    Path("texts/19.txt").write_text("u" * 20)  # of the same size and modification time
    os.utime("texts/19.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found.append(default_data_path(config))
    Path("texts/19.txt").rename("texts/99.txt")
    found.append(default_data_path(config))
    Path("texts/99.txt").unlink()
    found.append(default_data_path(config))
    Path("texts/picture.png").write_text("not part of the corpus")
    assert default_data_path(config) == found[-1]
    assert len(set(found)) == 4


def test_the_hash_of_a_large_corpus_is_kept_until_a_file_changes(config, monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "_FAST_BYTES", 0)
    monkeypatch.setattr(settings, "_SETTLED_SECONDS", -10.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real, hashed = settings._hash_files, []
    monkeypatch.setattr(settings, "_hash_files", lambda *args: hashed.append(1) or real(*args))
    first = content_settings(config)
    assert content_settings(config) == first
    assert len(hashed) == 1
    stat = os.stat("texts/19.txt")
    Path("texts/19.txt").write_text("u" * 20)
    os.utime("texts/19.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_settings(config) != first
    assert len(hashed) == 2
    monkeypatch.setattr(settings, "_SETTLED_SECONDS", 1000.0)
    Path("texts/19.txt").write_text("v" * 20)
    assert content_settings(config) == content_settings(config) != first
    assert len(hashed) == 4, "a corpus that was just written to may change again within one time stamp"


def test_a_local_dataset_that_was_replaced_is_noticed(config):
    named = dataclasses.replace(config, corpus="hf:texts")
    path = default_data_path(named)
    Path("texts/00.txt").write_text("other")
    assert default_data_path(named) != path
    path = default_data_path(named)
    Path("texts/.cache").write_text("not part of the data")
    assert default_data_path(named) == path


def test_another_tokenizer_at_the_same_path_is_noticed(config):
    pytest.importorskip("jinja2", reason="pip install '.[interop]'")
    train_tokenizer(LETTERS, 258).save("tokenizer")
    named = dataclasses.replace(config, tokenizer="tokenizer", path="out")
    prepare(named, Path("out"))
    prepare(named, Path("out"))
    path = default_data_path(dataclasses.replace(named, path=None))
    shutil.rmtree("tokenizer")
    train_tokenizer(LETTERS, 270).save("tokenizer")
    assert default_data_path(dataclasses.replace(named, path=None)) != path
    for refused in (lambda: prepare(named, Path("out")), lambda: ensure_prepared(named)):
        with pytest.raises(
            InputError, match=r"data.tokenizer tokenizer has changed since out was prepared.*--overwrite"
        ):
            refused()
    assert ensure_prepared(named, allow_change=["data.tokenizer"]) == Path("out")


def test_data_in_which_spelled_tokens_were_control_tokens_is_not_used_again(config):
    hf = pytest.importorskip("tokenizers", reason="pip install '.[interop]'")
    pieces = [("<unk>", 0.0), ("</s>", -9.0), *((letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyz<>/")]
    theirs = hf.Tokenizer(hf.models.Unigram(pieces, unk_id=0))
    theirs.pre_tokenizer, theirs.decoder = hf.pre_tokenizers.Metaspace(), hf.decoders.Metaspace()
    theirs.add_special_tokens(["<unk>", "</s>"])
    Path("tokenizer").mkdir()
    theirs.save("tokenizer/tokenizer.json")
    named = dataclasses.replace(config, tokenizer="tokenizer", path="out")
    prepare(named, Path("out"))
    prepare(named, Path("out"))
    settings = json.loads(Path("out/settings.json").read_text())
    earlier = settings | {"tokenizer_hash": load_tokenizer("tokenizer").hash}  # as earlier versions recorded it
    Path("out/settings.json").write_text(json.dumps(earlier))
    for refused in (lambda: prepare(named, Path("out")), lambda: ensure_prepared(named)):
        with pytest.raises(InputError, match=r"the encoding of data.tokenizer tokenizer has changed .*--overwrite"):
            refused()


def test_conversations_prepared_before_tools_were_read_are_prepared_again(config):
    pytest.importorskip("jinja2", reason="pip install '.[interop]'")
    Path("talks.jsonl").write_text(
        "".join(json.dumps({"messages": [{"role": "assistant", "content": f"{i}"}]}) + "\n" for i in range(20))
    )
    Path("template").write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    talks = dataclasses.replace(config, corpus="talks.jsonl", messages_field="messages", chat_template="template")
    prepare(talks, Path("out"))
    prepare(talks, Path("out"))
    settings = json.loads(Path("out/settings.json").read_text())
    del settings["tools"]
    Path("out/settings.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"an earlier version prepared out by other rules.*--overwrite"):
        prepare(talks, Path("out"))
    assert ensure_prepared(dataclasses.replace(talks, path="out")) == Path("out")


def test_an_edited_chat_template_is_noticed(config):
    pytest.importorskip("jinja2", reason="pip install '.[interop]'")
    from tests.tokenizer.test_chat import CHATML, GENERATION, tokenizer

    talks = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in LETTERS]
    Path("talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    Path("mine.jinja").write_text(GENERATION)
    named = dataclasses.replace(config, corpus="talks.jsonl", messages_field="messages", chat_template="mine.jinja")
    first = ensure_prepared(named)
    Path("mine.jinja").write_text(CHATML)
    second = ensure_prepared(named)
    assert [Dataset.open(path).tokenizer().chat_template for path in (first, second)] == [GENERATION, CHATML]
    with pytest.raises(
        InputError, match=r"data.chat_template mine.jinja has changed since .*--allow-change data.chat_t"
    ):
        ensure_prepared(dataclasses.replace(named, path=str(first)))
    # The template may also come with the tokenizer, whose ids stay the same.
    tokenizer(GENERATION).save("tokenizer")
    own = dataclasses.replace(named, chat_template=None, tokenizer="tokenizer")
    path = default_data_path(own)
    tokenizer(CHATML).save("tokenizer")
    assert default_data_path(own) != path


def test_a_changed_corpus_is_refused_or_told_of(config, messages):
    used = dataclasses.replace(config, path="out")
    prepare(config, Path("out"))
    before = contents(Path("out"))
    Path("texts/new.txt").write_text("one more document")
    with pytest.raises(InputError, match=r"data.corpus texts has changed since .*--overwrite"):
        prepare(config, Path("out"))
    with pytest.raises(InputError, match=r"data.corpus texts has changed since .*--allow-change data.corpus"):
        ensure_prepared(used)
    messages.clear()
    assert ensure_prepared(used, allow_change=CONTENT_FIELDS) == Path("out")
    assert "the content of data.corpus texts has changed" in messages.text
    assert contents(Path("out")) == before
    prepare(config, Path("out"), overwrite=True)
    data = Dataset.open("out")
    assert data.split("train").num_documents + data.split("validation").num_documents == 21
    prepare(config, Path("out"))
    messages.clear()
    ensure_prepared(used)
    assert not messages.messages
    shutil.rmtree("texts")
    prepare(config, Path("out"))
    ensure_prepared(used)
    assert "already prepared" in messages.text, "prepared data needs its corpus no more"


def test_a_corpus_that_changes_while_it_is_read_is_refused(config, monkeypatch):
    real = prepare_module.write_index

    def slow(*args):
        real(*args)
        Path("texts/00.txt").write_text("edited meanwhile")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_index", slow)
        with pytest.raises(InputError, match="changed while they were read; run again"):
            prepare(config, Path("out"))
    prepare(config, Path("out"))
    prepare(config, Path("expected"))
    assert contents(Path("out")) == contents(Path("expected"))


def test_data_that_the_user_names_is_used_as_it_is_and_described(config, messages):
    prepare(config, Path("out"))
    before = contents(Path("out"))
    named = dataclasses.replace(config, path="out")
    messages.clear()
    shutil.copytree("texts", "copy")
    for same in ({}, {"tokens_per_shard": 2048, "sequence_length": 8}, {"corpus": "copy"}):
        assert ensure_prepared(dataclasses.replace(named, **same)) == Path("out")
        assert not messages.messages
    assert ensure_prepared(DataConfig(path="out")) == Path("out")
    assert not messages.messages  # nothing is stated
    prepare(DataConfig(corpus="texts", tokenizer="out", num_processes=1), Path("shared"))
    messages.clear()
    assert ensure_prepared(dataclasses.replace(config, path="shared")) == Path("shared")
    assert not messages.messages, "it has as many tokens as the config says"
    other = dataclasses.replace(named, corpus="hf:name", tokenizer="gpt2", deduplicate="exact")
    assert ensure_prepared(other) == Path("out")
    (line,) = messages.messages
    assert "using out unchanged: corpus texts, tokenizer train with 260 tokens" in line
    assert "the config says corpus hf:name, tokenizer gpt2, deduplicate exact" in line
    assert contents(Path("out")) == before


def test_a_run_continues_with_the_data_that_it_recorded(config):
    path = ensure_prepared(config)
    recorded = dataclasses.replace(config, path=str(path))
    Path("texts/00.txt").write_text("edited since")
    assert continued(config, recorded) == recorded
    for other in ({"path": "named"}, {"corpus": "other"}, {"deduplicate": "exact"}):
        new = dataclasses.replace(config, **other)
        assert continued(new, recorded) == new
    shutil.rmtree(path)
    assert continued(config, recorded) == config


def test_data_whose_corpus_is_gone_is_named(config, messages):
    path = ensure_prepared(config)
    Path("texts/00.txt").write_text("edited since")
    messages.clear()
    ensure_prepared(config)
    assert f"texts has other content than {path} was prepared from" in messages.text
    shutil.rmtree("texts")
    with pytest.raises(InputError, match=r"holds no text.*set data.path data/texts-bpe260-"):
        find_data(config)
    with pytest.raises(InputError, match=r"or \.parquet$"):
        find_data(dataclasses.replace(config, deduplicate="exact"))


def test_data_of_an_earlier_version_is_found_by_its_run_and_loads(config):
    """Its directory is named after the paths, which its settings record without their content."""
    earlier = Path("data/texts-bpe260-84c8605d")
    prepare(config, earlier)
    old = {
        name: value
        for name, value in json.loads((earlier / "settings.json").read_text()).items()
        if "_sha256" not in name
    }
    (earlier / "settings.json").write_text(json.dumps({**old, "files": "0123456789abcdef"}))
    assert not find_data(config)[1], "a new run prepares its data by content"
    found = continued(config, config)
    assert found.path == str(earlier)
    assert ensure_prepared(found) == earlier
    with pytest.raises(InputError, match=r"an earlier version prepared .*--data.path data/texts.*--overwrite"):
        prepare(config, earlier)
    assert Dataset.open(earlier).split("train").num_documents > 0
