"""GGUF vocabularies: both ways, against the Hugging Face tokenizers that they were made from."""

import json

import pytest

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.backends import ByteBPE
from nextllm_jax.tokenizer.bpe import train_tokenizer
from nextllm_jax.tokenizer.gguf import from_gguf, to_gguf
from nextllm_jax.tokenizer.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from tests.tokenizer.stress import stress_texts, token_texts

hf = pytest.importorskip("tokenizers", reason="pip install '.[interop]'")
from tests.tokenizer.vocabularies import CUTS, TEXT, trained  # noqa: E402

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


REFUSED = {
    "no vocabulary": ({"tokenizer.ggml.tokens": None}, "lacks tokenizer.ggml.tokens"),
    "another kind": ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is t5"),
    "another cut": ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre is viking"),
    "no cut": ({"tokenizer.ggml.pre": None}, "lacks tokenizer.ggml.pre"),
    "no merges": ({"tokenizer.ggml.merges": None}, "lacks tokenizer.ggml.merges"),
    "short types": ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 entries"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": None}, "same token twice"),
    "a broken merge": ({"tokenizer.ggml.merges": ["a bx"]}, "cannot be read as a tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_by_its_key(case):
    entries, message = REFUSED[case]
    broken = metadata(trained(CUTS["gpt2"]), "gpt-2") | entries
    with pytest.raises(InputError, match=message):
        from_gguf({key: value for key, value in broken.items() if value is not None})
