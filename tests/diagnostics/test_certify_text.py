"""Faults of tokenizers and chat templates that `nextllm certify` names, each with its fix undone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is missing; install the extra 'interop'")
pytest.importorskip("jinja2", reason="jinja2 is missing; install the extra 'interop'")

import tokenizers

from nextllm_jax.diagnostics.certify import outside, programs, same_model, text
from nextllm_jax.diagnostics.stress_texts import stress_texts
from nextllm_jax.tokenizer import backends
from nextllm_jax.tokenizer.backends import HuggingFaceBPE
from nextllm_jax.tokenizer.control_tokens import ControlTokens
from nextllm_jax.tokenizer.huggingface import load_huggingface
from nextllm_jax.tokenizer.tokenizer import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}"


@pytest.fixture(autouse=True)
def few_texts(monkeypatch) -> None:
    texts = stress_texts()[::100]
    monkeypatch.setattr(text, "stress_texts", lambda: texts)


def sentence_piece(folder: Path, letter: str = "▁") -> Tokenizer:
    """A Unigram model whose words begin with a letter that stands for a space, and which knows `SPECIAL`."""
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(letter, prepend_scheme="first")
    made.decoder = tokenizers.decoders.Metaspace(letter, prepend_scheme="first")
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(["a cat sat on a mat <s> /"] * 4, trainer)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return load_huggingface(folder)


def test_decoded_texts_are_compared(tmp_path, monkeypatch):
    tokenizer = sentence_piece(tmp_path, "_")
    assert text.check_ids("ids", tokenizer, tmp_path / "tokenizer.json").status == "ok"
    monkeypatch.setattr(backends, "_piece_decoder", lambda decoder: str.encode)
    row = text.check_ids("ids", load_huggingface(tmp_path), tmp_path / "tokenizer.json")
    assert (row.status, row.detail.endswith("in tokenizers")) == ("FAILED", True)


def test_a_special_token_in_a_plain_text_is_named(tmp_path, monkeypatch):
    tokenizer = sentence_piece(tmp_path)
    assert text.check_special(tokenizer, 100, None).status == "ok"
    monkeypatch.setattr(backends, "_can_produce", lambda *_: False)
    row = text.check_special(load_huggingface(tmp_path), 100, None)
    assert (row.status, row.detail) == ("FAILED", "a text that spells '<s>' contains this token")


def test_a_spelled_token_that_changes_the_text_around_it_is_named(tmp_path, monkeypatch):
    tokenizer, plain = sentence_piece(tmp_path), ControlTokens.encode
    assert text.check_spelled_tokens(tokenizer).status == "ok"

    def in_pieces(self: ControlTokens, whole: str, mark: str, cuts: Any = ()) -> Any:
        pieces = re.split("(</?s>)", whole) if mark in whole else [whole]
        return [id for piece in pieces for id in plain(self, piece, mark)[0]], []

    monkeypatch.setattr(ControlTokens, "encode", in_pieces)
    row = text.check_spelled_tokens(tokenizer)
    assert (row.status, "changes the text around it" in row.detail) == ("FAILED", True)


def test_a_token_that_is_special_in_transformers_only_is_named(tmp_path):
    tokenizer = sentence_piece(tmp_path)
    assert isinstance(tokenizer.backend, HuggingFaceBPE)
    tokenizer.backend.added_tokens["<x>"] = 7
    theirs = {"class": "T", "added": {}, "special": [*SPECIAL, "<x>"]}
    theirs["ids"] = [tokenizer.encode(each, recognize="all") for each in programs.texts_with_tokens(tokenizer)]
    row = programs.compare_transformers_text(outside.Answer({"version": "5", "text": theirs}, {}), tokenizer, 100)[0]
    assert (row.status, "treats ['<x>'] as special tokens" in row.detail) == ("FAILED", True)


def test_lost_generation_settings_are_named():
    settings = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.6, "pad_token_id": None}
    compare = same_model._same_generation
    for same in (settings | {"eos_token_id": [2, 3]}, {}):  # GGUF files have none
        assert compare("", settings, same).status == "ok"
    assert compare("", settings, settings | {"bos_token_id": 2}).fault == "shifted token id"
    row = compare("", settings, {"bos_token_id": 1})
    assert (row.status, row.detail) == ("FAILED", "generation_config.json: temperature 0.6 became None")
