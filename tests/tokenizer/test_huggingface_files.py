"""Tokens and settings declared in the files next to tokenizer.json, against transformers."""

import json
import os
import subprocess
import sys

import pytest

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.backends import ByteBPE, HuggingFaceBPE
from nextllm_jax.tokenizer.huggingface import load_huggingface
from nextllm_jax.tokenizer.tokenizer import Tokenizer

hf = pytest.importorskip("tokenizers", reason="pip install '.[interop]'")
from tests.tokenizer.vocabularies import CUTS, TEXT, save, trained  # noqa: E402

TOKENIZER = trained(CUTS["gpt2"])
NEXT, TOOL = TOKENIZER.get_vocab_size(), TOKENIZER.token_to_id("<tool>")
FLAGS = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
SPECIAL_MAP = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<x>"]}


def with_files(folder, files=None, *, tokenizer=TOKENIZER, **config):
    save(tokenizer, folder, **config)
    for name, content in ({"config.json": {"model_type": "llama"}} | (files or {})).items():
        (folder / name).write_text(json.dumps(content))
    return folder


# (other files, tokenizer_config.json)
DECLARED = {
    "added_tokens_decoder": ({}, {"added_tokens_decoder": {str(NEXT): {"content": "<x>", **FLAGS}}}),
    "other flags": ({}, {"added_tokens_decoder": {str(TOOL): {"content": "<tool>", **FLAGS, "lstrip": True}}}),
    "additional_special_tokens": ({}, {"additional_special_tokens": ["<x>"]}),
    "extra_special_tokens": ({}, {"extra_special_tokens": {"image_token": "<x>"}}),
    "a named token": ({}, {"image_token": "<x>"}),
    "a padding token": ({}, {"pad_token": "<x>"}),
    "an added token": ({}, {"additional_special_tokens": ["<tool>"]}),
    "a piece of the vocabulary": ({}, {"additional_special_tokens": ["er"]}),
    "added_tokens.json": ({"added_tokens.json": {"<y>": NEXT + 1, "<x>": NEXT}}, {}),
    "special_tokens_map.json": ({"special_tokens_map.json": SPECIAL_MAP}, {}),
    "special_tokens_map.json, not read": ({"special_tokens_map.json": SPECIAL_MAP}, {"added_tokens_decoder": {}}),
}


@pytest.mark.parametrize("case", DECLARED)
def test_declared_tokens_are_those_of_transformers(tmp_path, case):
    transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
    files, config = DECLARED[case]
    tokenizer = load_huggingface(with_files(tmp_path, files, **config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "a  <x> b <y> <tool>, other <|endoftext|>"
    assert tokenizer.encode(text, recognize="all") == theirs(text).input_ids
    assert tokenizer.roles.names["eos_token"] == theirs.eos_token
    assert tokenizer.pad_id == theirs.pad_token_id
    special = {*tokenizer.special_tokens.values()}
    assert special >= {id for id in theirs.all_special_ids if id < theirs.vocab_size + 1}
    assert not special & {*tokenizer.encode(text)}


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("has_processor", [True, False])
def test_the_post_processor_decides_about_bos(tmp_path, caplog, has_processor, add_bos):
    transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
    theirs = trained(CUTS["gpt2"])
    if has_processor:
        theirs.post_processor = hf.processors.TemplateProcessing("<tool> $A", special_tokens=[("<tool>", TOOL)])
    tokenizer = load_huggingface(with_files(tmp_path, tokenizer=theirs, add_bos_token=add_bos))
    assert tokenizer.encode_prompt("hi") == transformers.AutoTokenizer.from_pretrained(tmp_path)("hi").input_ids
    assert ("post-processor" in caplog.text) == (has_processor != add_bos)


BROKEN = {
    "list of a template": ({}, {"chat_template": ["x"]}, r"chat_template is \"\['x'\]\".*a list of objects"),
    "template without text": ({}, {"chat_template": [{"name": "default", "template": 1}]}, "chat_template is '1'"),
    "template in another file": ({"chat_template.json": {"chat_template": 1}}, {}, "chat_template is '1'"),
    "another id": ({}, {"added_tokens_decoder": {"900": {"content": "<x>", **FLAGS}}}, f"id 900 .* but {NEXT} in"),
    "two ids": ({"added_tokens.json": {"<tool>": 7}}, {}, f"<tool> has the id 7 in .* but {TOOL} in tokenizer.json"),
    "no object": ({}, {"added_tokens_decoder": {"1": "<x>"}}, "tokenizer_config.json: added_tokens_decoder has '1'"),
    "no list": ({}, {"extra_special_tokens": "<x>"}, "tokenizer_config.json: extra_special_tokens is '<x>'"),
    "no ids": ({"added_tokens.json": {"<x>": "7"}}, {}, "added_tokens.json must map tokens to ids"),
    "no flag": ({}, {"add_bos_token": "yes"}, "tokenizer_config.json: add_bos_token is 'yes'"),
    "few rows": ({"config.json": {"vocab_size": 300}}, {}, f"has ids up to {TOOL}, .* only 300 rows"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_declarations_are_refused_by_name(tmp_path, case):
    files, config, message = BROKEN[case]
    with pytest.raises(InputError, match=message):
        load_huggingface(with_files(tmp_path, files, **config))


@pytest.mark.parametrize("cut", ["gpt2", "two cuts"])
def test_tokens_without_a_row_in_the_embedding_are_left_out(tmp_path, caplog, cut):
    theirs = trained(CUTS[cut])
    rows = theirs.get_vocab_size()
    files = {"config.json": {"vocab_size": rows}}
    folder = with_files(tmp_path, files, tokenizer=theirs, pad_token="<x>", eos_token="<y>")
    tokenizer = load_huggingface(folder)
    assert isinstance(tokenizer.backend, ByteBPE if cut == "gpt2" else HuggingFaceBPE)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (rows, None, 0)
    assert f"({rows} rows) lacks are left out: <y>, <x>" in caplog.text
    text = "a <x> b <tool>"
    assert tokenizer.encode(text, recognize="all") == theirs.encode(text).ids


def unigram():
    tokenizer = hf.Tokenizer(hf.models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = hf.pre_tokenizers.Metaspace(), hf.decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = hf.trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def whole_words():
    """A BPE that looks up whole words, which contain a control token."""
    vocabulary = {letter: id for id, letter in enumerate("▁</s>tacSTOP")} | {
        "</": 20,
        "</s": 21,
        "</s>": 22,
        "STOP": 23,
    }
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    tokenizer = hf.Tokenizer(hf.models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = hf.decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(["</s>", "STOP"])
    return tokenizer


@pytest.mark.parametrize("make", [unigram, whole_words])
def test_the_model_produces_no_control_token_from_text(tmp_path, make):
    theirs = make()
    tokenizer = load_huggingface(save(theirs, tmp_path, eos_token="</s>"))
    assert tokenizer.eos_id == theirs.token_to_id("</s>")
    for recognize in ("added", "none"):
        ids = tokenizer.encode("cat </s> STOP cat", recognize=recognize)
        assert tokenizer.eos_id not in ids
        assert theirs.token_to_id("STOP") not in ids
        assert tokenizer.encode("cat", recognize=recognize) == theirs.encode("cat").ids
    assert tokenizer.eos_id in tokenizer.encode("cat </s> cat", recognize="all")


def test_a_control_token_that_is_only_in_the_vocabulary_of_a_unigram_is_special(tmp_path):
    description = json.loads(unigram().to_str()) | {"added_tokens": []}
    theirs = hf.Tokenizer.from_str(json.dumps(description))
    tokenizer = load_huggingface(save(theirs, tmp_path, eos_token="</s>"))
    assert tokenizer.special_tokens["</s>"] == tokenizer.eos_id not in tokenizer.encode("cat </s>")


def test_dropout_is_left_out(tmp_path):
    theirs = trained(CUTS["two cuts"])
    expected = theirs.encode(TEXT).ids
    theirs.model.dropout = 0.5
    tokenizer = load_huggingface(save(theirs, tmp_path / "hf"))
    tokenizer.save(tmp_path / "saved")
    assert tokenizer.encode(TEXT) == Tokenizer.load(tmp_path / "saved").encode(TEXT) == expected


DECODERS = hf.decoders
REPLACED = {
    "metaspace": (DECODERS.Metaspace("_", prepend_scheme="never"), True),
    "replace": (DECODERS.Sequence([DECODERS.Replace("_", " "), DECODERS.Fuse()]), True),
    "two": (DECODERS.Sequence([DECODERS.Replace("_", "+"), DECODERS.Replace("+", " "), DECODERS.Fuse()]), True),
    "regex": (DECODERS.Sequence([DECODERS.Replace(hf.Regex("_"), " "), DECODERS.Fuse()]), False),
    "after joining": (DECODERS.Sequence([DECODERS.Fuse(), DECODERS.Replace("_", " ")]), False),
    "strip": (DECODERS.Sequence([DECODERS.Replace("_", " "), DECODERS.Fuse(), DECODERS.Strip("a", 1, 0)]), False),
    "bytes": (DECODERS.Sequence([DECODERS.Replace("_", " "), DECODERS.ByteLevel()]), False),
}


@pytest.mark.parametrize("case", REPLACED)
def test_decoders_are_applied_or_refused(tmp_path, case):
    decoder, is_supported = REPLACED[case]
    theirs = hf.Tokenizer(
        hf.models.BPE({letter: id for id, letter in enumerate("_abc")} | {"</s>": 4, "<0x41>": 5}, [])
    )
    theirs.normalizer, theirs.decoder = hf.normalizers.Replace(" ", "_"), decoder
    theirs.add_special_tokens(["</s>"])
    save(theirs, tmp_path, eos_token="</s>")
    if not is_supported:
        with pytest.raises(InputError, match="decoder"):
            load_huggingface(tmp_path)
        return
    tokenizer = load_huggingface(tmp_path)
    for ids in (tokenizer.encode("a cab"), [5, 1]):  # without ByteFallback, <0x41> is text
        assert tokenizer.decode(ids) == theirs.decode(ids)


def test_a_post_processor_that_puts_two_tokens_first_is_refused(tmp_path):
    theirs = trained(CUTS["gpt2"])
    special = [("<tool>", theirs.token_to_id("<tool>")), ("<think>", theirs.token_to_id("<think>"))]
    theirs.post_processor = hf.processors.TemplateProcessing("<tool> <think> $A", special_tokens=special)
    with pytest.raises(InputError, match=r"puts \['<tool>', '<think>'\] before a text; only one"):
        load_huggingface(save(theirs, tmp_path))


def test_files_are_utf8_in_every_locale(tmp_path):
    folder = with_files(tmp_path / "source", chat_template="é {{ messages }}")
    code = "import sys; from nextllm_jax.tokenizer.huggingface import load_huggingface, save_huggingface;"
    code += "save_huggingface(load_huggingface(sys.argv[1]), sys.argv[2])"
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, folder, tmp_path / "copy"], env=ascii_only, check=True)
    assert load_huggingface(tmp_path / "copy").chat_template == "é {{ messages }}"
