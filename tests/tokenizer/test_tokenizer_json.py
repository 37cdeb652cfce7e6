"""Hugging Face's tokenizers in and out: our ids against those of the `tokenizers` package and of transformers."""

import json

import pytest

from nextllm_jax.diagnostics.stress_texts import stress_texts, token_texts
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer import huggingface
from nextllm_jax.tokenizer.backends import ByteBPE, HuggingFaceBPE
from nextllm_jax.tokenizer.bpe import train_tokenizer
from nextllm_jax.tokenizer.huggingface import load_huggingface, save_huggingface
from nextllm_jax.tokenizer.patterns import LLAMA3_PATTERN
from nextllm_jax.tokenizer.published import load_tokenizer
from nextllm_jax.tokenizer.tokenizer import IncrementalDecoder, Tokenizer

hf = pytest.importorskip("tokenizers", reason="pip install '.[interop]'")
from tests.tokenizer.vocabularies import ADDED, CUTS, SPECIAL, TEXT, save, trained  # noqa: E402

ALL_TEXTS = [TEXT, *stress_texts(), *token_texts([*SPECIAL, *ADDED])]


def edited(tokenizer, change):
    """The tokenizer with its JSON changed in place by a function."""
    description = json.loads(tokenizer.to_str())
    change(description)
    return hf.Tokenizer.from_str(json.dumps(description))


def assert_same_ids(tokenizer, theirs, texts=ALL_TEXTS):
    for special, recognize in ((False, "all"), (True, "added")):
        theirs.encode_special_tokens = special
        for text in texts:
            assert tokenizer.encode(text, recognize=recognize) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("cut", CUTS)
def test_ids_are_those_of_the_package(tmp_path, cut):
    theirs = trained(CUTS[cut])
    tokenizer = load_huggingface(save(theirs, tmp_path))
    assert isinstance(tokenizer.backend, HuggingFaceBPE if cut in ("prefix space", "another", "two cuts") else ByteBPE)
    assert_same_ids(tokenizer, theirs)
    if cut != "prefix space":
        assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in ALL_TEXTS)


def test_composed_characters(tmp_path):
    theirs = trained(CUTS["qwen2"], normalizer=hf.normalizers.NFC())
    tokenizer = load_huggingface(save(theirs, tmp_path))
    assert isinstance(tokenizer.backend, ByteBPE)
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("café")
    assert_same_ids(tokenizer, theirs, [*ALL_TEXTS, "e\u0301<think>\u0338a\u030a", "a\u1df6\u0301"])


def test_bytes_that_the_vocabulary_lacks_are_left_out(tmp_path):
    theirs = trained(CUTS["digits"], alphabet=False)  # the bytes of TEXT, and of no other
    assert theirs.token_to_id("Ā") is None

    def with_continuations(description):
        vocabulary = description["model"]["vocab"]
        letters = [huggingface.bytes_to_letters(bytes([byte])) for byte in range(0x80, 0xC0)]
        vocabulary |= {letter: 1000 + i for i, letter in enumerate(letters) if letter not in vocabulary}

    tokenizer = load_huggingface(save(theirs, tmp_path))
    assert isinstance(tokenizer.backend, HuggingFaceBPE)  # without all of the bytes that continue characters
    assert_same_ids(tokenizer, theirs)
    theirs = edited(theirs, with_continuations)
    tokenizer = load_huggingface(save(theirs, tmp_path))
    assert isinstance(tokenizer.backend, ByteBPE)
    assert_same_ids(tokenizer, theirs, [*ALL_TEXTS, "a\x00nd 🎉\U000f0000!Ωnd", "\x01"])


def test_merges_in_another_order_than_ids_stay_with_the_package(tmp_path):
    def swap(description):
        vocabulary = description["model"]["vocab"]
        a, b = list(vocabulary)[300:302]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    theirs = edited(trained(CUTS["llama3"]), swap)
    tokenizer = load_huggingface(save(theirs, tmp_path))
    assert isinstance(tokenizer.backend, HuggingFaceBPE)
    assert_same_ids(tokenizer, theirs)


@pytest.mark.parametrize("whole_words_first", [False, True])
def test_words_that_the_merges_do_not_make_stay_with_the_package(tmp_path, whole_words_first):
    def drop_merges(description):
        del description["model"]["merges"][-40:]
        description["model"]["ignore_merges"] = whole_words_first

    theirs = edited(trained(CUTS["llama3"]), drop_merges)
    tokenizer = load_huggingface(save(theirs, tmp_path))
    assert isinstance(tokenizer.backend, HuggingFaceBPE)  # tiktoken would make them
    assert_same_ids(tokenizer, theirs)


def test_a_vocabulary_of_every_cut_that_looks_up_whole_words_runs_in_tiktoken(tmp_path):
    """As Llama 3's, of which merges alone do not make all words."""
    ranks = {**train_tokenizer([TEXT], 300).backend.ranks, b"\1\2\3": 300}
    tokenizer = Tokenizer("cuts", ByteBPE(ranks, LLAMA3_PATTERN, {"<|begin_of_text|>": 400, "<|end_of_text|>": 401}))
    save_huggingface(tokenizer, tmp_path)
    again = load_huggingface(tmp_path)
    assert isinstance(again.backend, ByteBPE)
    assert again.hash == tokenizer.hash
    assert again.encode("\1\2\3") == [300]
    theirs = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert_same_ids(again, theirs, [*ALL_TEXTS, "\1\2\3", "\1\2\3\1\2\3"])


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_swallow_blanks_stay_with_the_package(tmp_path, flag):
    theirs = trained(CUTS["gpt2"])
    theirs.add_special_tokens([hf.AddedToken("<|im_end|>", **{flag: True})])
    tokenizer = load_huggingface(save(theirs, tmp_path))
    assert isinstance(tokenizer.backend, HuggingFaceBPE)
    assert_same_ids(tokenizer, theirs)


@pytest.mark.parametrize("cut", ["llama3", "two cuts"])
def test_special_and_added_tokens_are_told_apart(tmp_path, cut):
    tokenizer = load_huggingface(save(trained(CUTS[cut]), tmp_path))
    text = "a<think>b<|im_end|>c"
    think, end = tokenizer.backend.added_tokens["<think>"], tokenizer.special_tokens["<|im_end|>"]
    assert {think, end} <= set(tokenizer.encode(text, recognize="all"))
    ordinary = tokenizer.encode(text)
    assert think in ordinary
    assert end not in ordinary
    neither = tokenizer.encode(text, recognize="none")
    assert not {think, end} & set(neither)
    assert tokenizer.decode(neither) == tokenizer.decode(ordinary) == text


@pytest.mark.parametrize("cut", ["digits", "two cuts"])
def test_invalid_utf8_decodes_as_the_package_does(tmp_path, cut):
    theirs = trained(CUTS[cut])
    tokenizer = load_huggingface(save(theirs, tmp_path))
    single = [tokenizer.encode(letter, recognize="none")[0] for letter in "aé"]
    byte_ids = [theirs.token_to_id(huggingface.bytes_to_letters(bytes([byte]))) for byte in b"\xf0\x9f\x8e\xff\xc3\x80"]
    for ids in (byte_ids, byte_ids[:3] + single, [*single, *byte_ids[::-1]]):
        decoder = IncrementalDecoder(tokenizer)
        pieces = "".join(decoder.push([token]) for token in ids) + decoder.finish()
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=False) == pieces


def test_roles_are_read_from_the_files_beside_it(tmp_path):
    save(trained(CUTS["gpt2"]), tmp_path, chat_template="{{ messages }}", pad_token={"content": "<|im_start|>"})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 77, 100000]}')
    tokenizer = load_huggingface(tmp_path)
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (tokenizer.add_bos, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (False, 0, 0, 1)
    assert tokenizer.stop_ids == (0, 2, 77)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.encode_prompt("") == [0]
    assert tokenizer.encode_prompt("ab") == tokenizer.encode("ab")
    (tmp_path / "chat_template.jinja").write_text("new")
    assert load_huggingface(tmp_path).chat_template == "new"
    theirs = trained(CUTS["gpt2"])
    theirs.post_processor = hf.processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    save(theirs, tmp_path, bos_token="<|im_start|>")
    assert load_huggingface(tmp_path).encode_prompt("ab")[0] == 1
    assert load_tokenizer(tmp_path / "tokenizer.json").bos_id == 1
    assert load_tokenizer(tmp_path).encode_document("ab")[-1] == 0


@pytest.mark.parametrize("cut", ["digits", "two cuts", "prefix space"])
def test_a_saved_import_comes_back_the_same(tmp_path, cut):
    tokenizer = load_huggingface(save(trained(CUTS[cut]), tmp_path / "hf", chat_template="{{ 1 }}"))
    tokenizer.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    assert (loaded.hash, loaded.roles, loaded.name) == (tokenizer.hash, tokenizer.roles, "hf")
    assert loaded.encode(TEXT + "<think>") == tokenizer.encode(TEXT + "<think>")


def ours():
    return train_tokenizer([TEXT], 400)


@pytest.mark.parametrize("source", ["ours", "digits", "two cuts", "lacking"])
def test_transformers_loads_an_export_and_gives_the_same_ids(tmp_path, source):
    transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
    if source == "ours":
        tokenizer = ours()
    else:
        theirs = trained(CUTS["digits" if source == "lacking" else source], alphabet=source != "lacking")
        tokenizer = load_huggingface(save(theirs, tmp_path / "source", chat_template="{{ messages[0].content }}"))
    save_huggingface(tokenizer, tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in [TEXT, *stress_texts()[::9], *token_texts(tokenizer.backend.tokens), "\n \n", "x \n  "]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text, recognize="all")
    assert theirs.encode("ab cd") == tokenizer.encode_prompt("ab cd")
    assert (theirs.bos_token, theirs.eos_token) == (
        tokenizer.roles.names["bos_token"],
        tokenizer.roles.names["eos_token"],
    )
    assert theirs.chat_template == tokenizer.chat_template
    again = load_huggingface(tmp_path / "export")
    assert again.roles == tokenizer.roles
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


BROKEN = {
    "no file": (None, "holds neither tokenizer.json nor tokenizer.model"),
    "no JSON": ("{", "tokenizer.json cannot be read as JSON"),
    "another JSON": ("[1]", "must hold a JSON object"),
    "no tokenizer": ('{"added_tokens": []}', "cannot be read as a tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(tmp_path, case):
    content, message = BROKEN[case]
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_huggingface(tmp_path)


def test_a_vocabulary_of_another_kind_is_refused(tmp_path):
    theirs = hf.Tokenizer(hf.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    theirs.decoder = hf.decoders.WordPiece()
    with pytest.raises(InputError, match="the decoder WordPiece"):
        load_huggingface(save(theirs, tmp_path))


def test_without_the_package_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    save(trained(CUTS["gpt2"]), tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"pip install 'nextllm_jax\[interop\]'"):
        load_huggingface(tmp_path)
