"""SentencePiece models against the sentencepiece package itself."""

import io
import random

import pytest

from nextllm_jax.diagnostics.stress_texts import stress_texts
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.backends import HuggingFaceBPE
from nextllm_jax.tokenizer.huggingface import load_huggingface, save_huggingface
from nextllm_jax.tokenizer.tokenizer import IncrementalDecoder, Tokenizer

spm = pytest.importorskip("sentencepiece", reason="pip install '.[interop]'")
pytest.importorskip("tokenizers", reason="pip install '.[interop]'")
pytest.importorskip("google.protobuf", reason="pip install '.[interop]'")

_RNG = random.Random(0)
_WORDS = [
    "".join(_RNG.choices(["ka", "lo", "mi", "th", "er", "st", "żó", "漢", "42"], k=_RNG.randrange(1, 5)))
    for _ in range(500)
]
TEXT = (
    "\n".join(" ".join(_RNG.choices(_WORDS, k=9)) for _ in range(300))
    + (
        "The cat sat on the mat, and the dog sat on the cat.\n  indented    text == 1234 ----\n"
        "Źdźbło trawy i kilka słów, 漢字 and naïve café\n"
    )
    * 20
)
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LLAMA = {**PLAIN, "model_type": "bpe", "byte_fallback": True, "split_digits": True}
KINDS = {
    "llama": LLAMA,
    "gemma": {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": ["▁▁", "▁▁▁▁", "<b>", "\n\n"]},
}
# What the model reads, not what its trainer saw.
MESSY = [
    "",
    " ",
    "  two  spaces ",
    "a\n\nb",
    "▁▁",
    "<b>bold</b>",
    "12345",
    "🎉\x00\uffff",
    "cat cat  cat",
    "=====---",
    TEXT,
]


def train(directory, **settings):
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=460, minloglevel=2, **settings
    )
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}')
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_sentencepiece(tmp_path, kind):
    theirs = train(tmp_path, **KINDS[kind])
    tokenizer = load_huggingface(tmp_path)
    assert isinstance(tokenizer.backend, HuggingFaceBPE)
    for text in [*MESSY, *stress_texts()]:
        assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.encode_prompt("the cat") == [theirs.bos_id(), *theirs.encode("the cat")]
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (theirs.eos_id(), (theirs.eos_id(),))
    assert tokenizer.vocab_size == theirs.get_piece_size()


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back_piece_by_piece_with_its_spaces(tmp_path, kind):
    train(tmp_path, **KINDS[kind])
    tokenizer = load_huggingface(tmp_path)
    prefix = " " if kind == "llama" else ""
    for text in (text for text in MESSY if text != "▁▁"):
        ids = tokenizer.encode(text)
        decoder = IncrementalDecoder(tokenizer)
        pieces = [decoder.push([token]) for token in ids] + [decoder.finish()]
        assert "".join(pieces) == tokenizer.decode(ids) == (prefix + text if text else "")
    words = [tokenizer.decode([token]) for token in tokenizer.encode("the cat")]
    assert "".join(words[-2:]).endswith("cat")
    assert any(word.startswith(" ") for word in words)


def test_control_tokens_are_ordinary_text_until_asked_for(tmp_path):
    theirs = train(tmp_path, **LLAMA)
    tokenizer = load_huggingface(tmp_path)
    assert theirs.eos_id() not in tokenizer.encode("the</s>cat")
    assert tokenizer.encode("the</s>cat") == theirs.encode("the</s>cat")
    both = [*theirs.encode("the"), theirs.eos_id(), *theirs.encode("cat")]
    assert tokenizer.encode("the</s>cat", recognize="all") == both


def test_saved_and_exported_it_gives_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
    train(tmp_path / "source", **LLAMA)
    tokenizer = load_huggingface(tmp_path / "source")
    tokenizer.save(tmp_path / "saved")
    saved = Tokenizer.load(tmp_path / "saved")
    save_huggingface(saved, tmp_path / "export")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    again = load_huggingface(tmp_path / "export")
    assert saved.roles == again.roles == tokenizer.roles
    assert saved.hash == tokenizer.hash
    for text in MESSY:
        assert saved.encode(text) == again.encode(text) == tokenizer.encode(text)
        assert exported.encode(text) == tokenizer.encode_prompt(text) or not text
        assert exported.encode(text, add_special_tokens=False) == tokenizer.encode(text, recognize="all")


REFUSED = {
    "unigram": ({**PLAIN, "model_type": "unigram", "hard_vocab_limit": False}, "is not a BPE model"),
    "normalizing": ({"model_type": "bpe", "byte_fallback": True}, "normalizes text in an unsupported way"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_reproduced_are_refused(tmp_path, case):
    settings, message = REFUSED[case]
    train(tmp_path, **settings)
    with pytest.raises(InputError, match=message):
        load_huggingface(tmp_path)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    for content in (b"", b"\x80\x04pickle", b"{}"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(InputError, match=r"tokenizer.model is not"):
            load_huggingface(tmp_path)
