"""GGUF vocabularies: both ways, against the Hugging Face tokenizers that they were made from."""

import dataclasses
import functools
import json

import pytest

from nextllm_jax.diagnostics.stress_texts import stress_texts, token_texts
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.backends import ByteBPE
from nextllm_jax.tokenizer.bpe import train_tokenizer
from nextllm_jax.tokenizer.gguf import from_gguf, to_gguf
from nextllm_jax.tokenizer.huggingface import load_huggingface
from nextllm_jax.tokenizer.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from nextllm_jax.tokenizer.tokenizer import Tokenizer

hf = pytest.importorskip("tokenizers", reason="pip install '.[interop]'")
from tests.tokenizer.vocabularies import CUTS, TEXT, save, trained  # noqa: E402

PRE = {"gpt2": "gpt-2", "llama3": "smaug-bpe", "qwen2": "qwen2", "o200k": "gpt-4o", "digits": "smollm"}


def metadata(theirs, pre):
    """What a converter writes for a tokenizer of the package."""
    description = json.loads(theirs.to_str())
    tokens = {id: token for token, id in description["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for token in description["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokens[id] for id in range(len(tokens))],
        "tokenizer.ggml.token_type": [types[id] for id in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in description["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize("cut", PRE)
def test_byte_level_vocabularies_give_the_ids_that_they_were_made_with(cut):
    theirs = trained(CUTS[cut], normalizer=hf.normalizers.NFC() if cut == "qwen2" else None)
    tokenizer = from_gguf(metadata(theirs, PRE[cut]))
    assert isinstance(tokenizer.backend, ByteBPE)
    for text in [TEXT, *stress_texts(), *token_texts(tokenizer.backend.tokens)]:
        assert tokenizer.encode(text, recognize="all") == theirs.encode(text, add_special_tokens=False).ids
    assert (tokenizer.add_bos, tokenizer.eos_id, tokenizer.stop_ids) == (False, 0, (0, 2))
    assert tokenizer.chat_template == "{{ messages }}"
    again = from_gguf(to_gguf(tokenizer) | {"general.name": "again"})
    assert (again.hash, again.roles, again.name) == (tokenizer.hash, tokenizer.roles, "again")


def test_llama_3_begins_prompts_with_bos_and_looks_up_whole_words():
    tokenizer = from_gguf(metadata(trained(CUTS["llama3"]), "llama-bpe"))
    assert tokenizer.encode_prompt("a")[0] == tokenizer.bos_id == 0
    assert not from_gguf(
        metadata(trained(CUTS["llama3"]), "llama-bpe") | {"tokenizer.ggml.add_bos_token": False}
    ).add_bos


def test_a_tokenizer_trained_here_comes_back():
    tokenizer = train_tokenizer([TEXT], 400)
    again = from_gguf(to_gguf(tokenizer))
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.roles == tokenizer.roles


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_sentencepiece_vocabularies_give_the_ids_that_they_were_made_with(tmp_path, kind):
    pytest.importorskip("sentencepiece", reason="pip install '.[interop]'")
    from tests.tokenizer.test_sentencepiece import KINDS, MESSY, train

    theirs = train(tmp_path, **KINDS[kind])
    size = theirs.get_piece_size()
    kinds = [
        UNKNOWN if theirs.is_unknown(i) else CONTROL if theirs.is_control(i) else BYTE if theirs.is_byte(i) else NORMAL
        for i in range(size)
    ]
    for symbol in KINDS[kind].get("user_defined_symbols", []):
        kinds[theirs.piece_to_id(symbol)] = USER_DEFINED
    tokenizer = from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in range(size)],
            "tokenizer.ggml.scores": [theirs.get_score(i) for i in range(size)],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": theirs.bos_id(),
            "tokenizer.ggml.eos_token_id": theirs.eos_id(),
            "tokenizer.ggml.add_space_prefix": kind == "llama",
        }
    )
    again = from_gguf(to_gguf(tokenizer))
    for text in [*MESSY, *stress_texts()[::5]]:
        assert tokenizer.encode(text) == theirs.encode(text) == again.encode(text)
    assert tokenizer.encode_prompt("the cat")[0] == theirs.bos_id()
    assert again.roles == tokenizer.roles


def sentencepiece(directory, *, normalizer=None, pre_tokenizer=None, added=(), missing_merges=0):
    """A SentencePiece tokenizer of the package that is trained here, as it is loaded."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    theirs = hf.Tokenizer(hf.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    theirs.decoder = hf.decoders.Sequence(steps)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *byte_pieces], show_progress=False
    )
    theirs.train_from_iterator(TEXT.split(), trainer)
    description = json.loads(theirs.to_str())
    description["added_tokens"] = description["added_tokens"][:3]  # byte pieces are ordinary ones
    description["model"]["merges"] = description["model"]["merges"][missing_merges:]
    theirs = hf.Tokenizer.from_str(json.dumps(description))
    if normalizer is not None:
        theirs.normalizer = hf.normalizers.Sequence(normalizer)
    if pre_tokenizer is not None:
        theirs.pre_tokenizer = pre_tokenizer
    theirs.add_tokens(list(added))
    return load_huggingface(save(theirs, directory, bos_token="<s>", eos_token="</s>"))


PREPEND, REPLACE = hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")
METASPACE, TOKEN = hf.pre_tokenizers.Metaspace, functools.partial(hf.AddedToken, "<t>", normalized=False)
REPRESENTED = {
    "prefix": {"normalizer": [PREPEND, REPLACE]},
    "prefix after replacing": {"normalizer": [REPLACE, PREPEND]},
    "no prefix": {"normalizer": [REPLACE]},
    "metaspace": {"pre_tokenizer": METASPACE(prepend_scheme="never", split=False)},
    "added token": {"normalizer": [PREPEND, REPLACE], "added": [TOKEN(), hf.AddedToken("<u>", special=True)]},
}
NOT_REPRESENTED = {
    "lower case": ({"normalizer": [hf.normalizers.Lowercase(), PREPEND, REPLACE]}, "Lowercase, Prepend, Replace"),
    "NFKC": ({"normalizer": [hf.normalizers.NFKC(), REPLACE]}, "text is prepared by NFKC, Replace"),
    "digits": (
        {"pre_tokenizer": hf.pre_tokenizers.Sequence([METASPACE(split=False), hf.pre_tokenizers.Digits(True)])},
        "text is prepared by Metaspace, Digits",
    ),
    "first": ({"pre_tokenizer": METASPACE(prepend_scheme="first", split=False)}, "text is prepared by Metaspace"),
    "no spaces": ({}, "text is prepared by nothing"),
    "another letter": ({"normalizer": [hf.normalizers.Replace(" ", "_")]}, "text is prepared by Replace"),
    "lstrip": ({"normalizer": [REPLACE], "added": [TOKEN(lstrip=True)]}, "added tokens strip whitespace"),
    "single_word": ({"normalizer": [REPLACE], "added": [TOKEN(single_word=True)]}, "match whole words"),
    "merges": ({"normalizer": [REPLACE], "missing_merges": 5}, "text is merged differently"),
}


@pytest.mark.parametrize("case", REPRESENTED)
def test_sentencepiece_tokenizers_of_the_package_come_back(tmp_path, case):
    tokenizer = sentencepiece(tmp_path, **REPRESENTED[case])
    again = from_gguf(to_gguf(tokenizer, tokenizer.vocab_size + 7))
    assert again.vocab_size == tokenizer.vocab_size  # without the 7 rows that have no token
    for text in (TEXT, " a", "  two <t> b<t>c</s>d", "<u> e", "x <u>y"):
        for recognize in ("all", "added"):
            assert again.encode(text, recognize=recognize) == tokenizer.encode(text, recognize=recognize)


@pytest.mark.parametrize("case", NOT_REPRESENTED)
def test_tokenizers_that_would_come_back_differently_are_refused(tmp_path, case):
    settings, message = NOT_REPRESENTED[case]
    with pytest.raises(InputError, match=f"GGUF cannot represent this tokenizer: .*{message}"):
        to_gguf(sentencepiece(tmp_path, **settings))


@pytest.mark.parametrize(("cut", "nfc"), [("qwen2", False), ("gpt2", True)])
def test_normalization_that_the_name_of_the_pattern_does_not_imply_is_refused(tmp_path, cut, nfc):
    theirs = trained(CUTS[cut], normalizer=hf.normalizers.NFC() if nfc else None)
    with pytest.raises(InputError, match="NFC normalization differs"):
        to_gguf(load_huggingface(save(theirs, tmp_path)))


def test_a_vocabulary_without_merges_and_more_stop_ids_come_back(tmp_path):
    tokenizer = train_tokenizer(["abc"], 258)
    roles = dataclasses.replace(tokenizer.roles, stop_ids=(97, 98, tokenizer.eos_id))
    again = from_gguf(to_gguf(Tokenizer("bytes", tokenizer.backend, roles)))
    assert again.encode("abc") == [97, 98, 99]
    assert again.stop_ids == roles.stop_ids


REFUSED = {
    "no vocabulary": ({"tokenizer.ggml.tokens": None}, "lacks tokenizer.ggml.tokens"),
    "another kind": ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is t5"),
    "another cut": ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre is viking"),
    "no cut": ({"tokenizer.ggml.pre": None}, "lacks tokenizer.ggml.pre"),
    "no merges": ({"tokenizer.ggml.merges": None}, "lacks tokenizer.ggml.merges"),
    "short types": ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 entries"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": None}, "same token twice"),
    "other types": ({"tokenizer.ggml.merges": [1]}, "tokenizer.ggml has values of a wrong type"),
    "a text as an id": ({"tokenizer.ggml.eos_token_id": "x"}, "tokenizer.ggml has values of a wrong type"),
    "short scores": (
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]},
        "tokenizer.ggml has values of a wrong",
    ),
    "a broken merge": ({"tokenizer.ggml.merges": ["a bx"]}, "cannot be read as a tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_by_its_key(case):
    entries, message = REFUSED[case]
    broken = metadata(trained(CUTS["gpt2"]), "gpt-2") | entries
    with pytest.raises(InputError, match=message):
        from_gguf({key: value for key, value in broken.items() if value is not None})
