"""Validation text is held out by content, so training does not see it under another name."""

import hashlib
import json

import pytest

from nextllm_jax.config import DataConfig
from nextllm_jax.data import corpora
from nextllm_jax.data.census import Census
from nextllm_jax.data.corpora import Document, document_hash, read_documents, validation_limit
from nextllm_jax.data.prepare import prepare
from nextllm_jax.data.shards import Dataset
from nextllm_jax.errors import InputError


def split(corpus, **settings):
    """The texts of the training documents, and those of the documents that are held out."""
    config = DataConfig(corpus=str(corpus), **settings)
    documents = list(read_documents(config))
    limit = validation_limit(documents, config.validation_fraction)
    return [[each.text for each in documents if (document_hash(each) <= limit) == held] for held in (False, True)]


def test_the_split_of_the_default_corpus_stays():
    """It is by name, as in earlier versions."""
    for document in read_documents(DataConfig()):
        assert document.location.endswith(f"/{document.group}")
        expected = int.from_bytes(hashlib.sha256(str(document.group).encode()).digest()[:8], "big")
        assert document_hash(document) == expected


def test_files_of_equal_text_are_in_one_split_whatever_their_names(tmp_path):
    for number in range(60):
        for name in ("a", "copy of a"):
            (tmp_path / f"{name}{number}.txt").write_text(f"text {number}")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "text {number}"}}\n' for number in range(60)))
    training, held_out = split(tmp_path, validation_fraction=0.3)
    assert not set(training) & set(held_out)
    assert len(training) + len(held_out) == 180
    assert 20 < len(held_out) < 90


def long_text(number):
    return "".join(f"file {number} line {line}\n" for line in range(60))


@pytest.mark.parametrize(("files", "is_whole"), [(40, True), (4, False), (1, False)])
def test_the_sections_of_a_file_are_in_one_split_if_there_are_enough_files(tmp_path, monkeypatch, files, is_whole):
    monkeypatch.setattr(corpora, "SECTION_CHARACTERS", 100)
    for number in range(files):
        for name in ("a", "b"):
            (tmp_path / f"{name}{number}.txt").write_text(long_text(number))
            if files == 1:
                break
    training, held_out = split(tmp_path, validation_fraction=0.1)
    assert training
    assert held_out
    assert not set(training) & set(held_out)
    owners = [{section.split()[1] for section in sections} for sections in (training, held_out)]
    assert bool(owners[0] & owners[1]) != is_whole


def test_both_splits_have_documents_and_equal_ones_do_not_count_twice():
    few = [Document(f"text {number}", "") for number in range(3)]
    for fraction in (1e-9, 1 - 1e-9):
        limit = validation_limit(few, fraction)
        assert 1 <= sum(document_hash(document) <= limit for document in few) <= 2
    with pytest.raises(InputError, match="at least two different documents"):
        validation_limit([few[0], few[0]], 0.5)


def test_duplicates_are_reported_and_dropped_on_request(tmp_path, messages):
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(f"text {number % 20} caf\udce9" * 3, errors="surrogateescape")
    config = {"corpus": str(tmp_path), "vocab_size": 260, "num_processes": 1}
    prepare(DataConfig(**config), tmp_path / "all")
    assert "10 of 30 documents repeat the text of another; data.deduplicate exact keeps one of each" in messages.text
    assert "90 characters in 30 documents are U+FFFD, which stands for invalid UTF-8" in messages.text
    messages.clear()
    prepare(DataConfig(**config, deduplicate="exact"), tmp_path / "distinct")
    assert "skipped 10 duplicate documents" in messages.text
    assert "repeat" not in messages.text
    data = Dataset.open(tmp_path / "distinct")
    assert data.split("train").num_documents + data.split("validation").num_documents == 20
    assert sum(map(len, split(tmp_path, deduplicate="exact"))) == 20


def test_training_documents_that_are_also_held_out_are_counted():
    census = Census()
    documents = [Document("same", "", group=name) for name in "abcdef"] + [Document("other", "", group="g")]
    limit = validation_limit(documents, 0.5)
    held_out = sum(document_hash(document) <= limit for document in documents[:6])
    assert 0 < held_out < 6
    list(census.count(documents, limit))
    line = f"5 of 7 documents repeat the text of another, and {6 - held_out} training documents are also"
    assert line in str(census.describe_duplicates())


def test_conversations_are_held_out_by_what_is_said(tmp_path):
    for number in range(40):
        talk = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a"}]
        turned = [{"id": number, "value": each["content"], "from": each["role"]} for each in talk]
        rows = [json.dumps({"messages": messages}) for messages in (talk, turned)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows))
    training, held_out = split(tmp_path, messages_field="messages", validation_fraction=0.3)
    questions = [{json.loads(text)[0]["content"] for text in texts} for texts in (training, held_out)]
    assert not questions[0] & questions[1]
    assert len(training) + len(held_out) == 80
