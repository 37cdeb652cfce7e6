"""Round trips, incremental decoding, saved tokenizers, and what is refused."""

import base64
import json
import os

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer import tokenizer as tokenizer_module
from nextllm_jax.tokenizer.backends import sha256
from nextllm_jax.tokenizer.bpe import train_tokenizer
from nextllm_jax.tokenizer.published import KNOWN_ENCODINGS, load_tokenizer
from nextllm_jax.tokenizer.tokenizer import IncrementalDecoder, Tokenizer

TEXT = "def add(first, second):\n    return first + second\n\nźdźbło trawy i kilka słów, 漢字 and 🎉 naïve café\n" * 20
TOKENIZER = train_tokenizer([TEXT], 320)

any_text = st.text(st.characters(), max_size=60)  # lone surrogates too
any_ids = st.lists(st.integers(-5, TOKENIZER.vocab_size + 5), max_size=60)


def write_ranks(path, ranks):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def test_training_fills_the_vocabulary_with_merges_and_special_tokens():
    assert TOKENIZER.vocab_size == 320
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id) == (318, 319)
    assert len(TOKENIZER.encode("return first")) < len("return first") / 2
    assert train_tokenizer([TEXT], 320).hash == TOKENIZER.hash
    assert train_tokenizer([TEXT], 321).hash != TOKENIZER.hash


def test_training_refuses_a_vocabulary_without_room_for_bytes():
    with pytest.raises(InputError, match="at least 258"):
        train_tokenizer([TEXT], 257)


@given(any_text)
def test_any_text_is_encoded_and_comes_back(text):
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == expected


@given(st.binary(max_size=60))
def test_any_bytes_come_back(content):
    text = content.decode("latin-1")
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode_bytes(list(content)) == content  # ids below 256 are the single bytes


def test_special_text_is_ordinary_text():
    for special in TOKENIZER.special_tokens:
        ids = TOKENIZER.encode(f"a{special}b")
        assert not set(ids) & set(TOKENIZER.special_tokens.values())
        assert TOKENIZER.decode(ids) == f"a{special}b"
    assert TOKENIZER.decode(TOKENIZER.encode("<|endoftext|>")) == "<|endoftext|>"


def test_a_document_stands_between_its_special_tokens():
    assert TOKENIZER.encode_document("ab") == [TOKENIZER.bos_id, *TOKENIZER.encode("ab"), TOKENIZER.eos_id]


@given(any_ids)
def test_decoding_never_raises(ids):
    text = TOKENIZER.decode(ids)
    unassigned = sum(not 0 <= token < TOKENIZER.vocab_size for token in ids)
    assert text.count("\ufffd") >= unassigned


@settings(max_examples=300)
@given(any_ids | any_text.map(TOKENIZER.encode), st.lists(st.integers(1, 3), max_size=60))
def test_incremental_decoding_adds_up_and_keeps_characters_whole(ids, sizes):
    decoder = IncrementalDecoder(TOKENIZER)
    pieces, start = [], 0
    for size in [*sizes, len(ids)]:
        pieces.append(decoder.push(ids[start : start + size]))
        start += size
        assert TOKENIZER.decode(ids).startswith("".join(pieces))
    assert "".join(pieces) + decoder.finish() == TOKENIZER.decode(ids)


def test_a_character_waits_for_its_last_byte():
    decoder = IncrementalDecoder(TOKENIZER)
    assert [decoder.push([byte]) for byte in "🎉".encode()] == ["", "", "", "🎉"]


def test_very_long_runs_are_encoded():
    # tiktoken's pattern engine overflows its stack at about 500,000 blanks.
    text = "x" + " " * 1_000_000 + "y" + "a" * 200_000
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert train_tokenizer([text], 300).vocab_size <= 300


def test_saved_tokenizer_comes_back_the_same(tmp_path):
    TOKENIZER.save(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert (loaded.name, loaded.hash, loaded.vocab_size) == (TOKENIZER.name, TOKENIZER.hash, TOKENIZER.vocab_size)
    assert loaded.encode_document(TEXT) == TOKENIZER.encode_document(TEXT)


def test_saving_over_another_tokenizer_is_atomic(tmp_path, monkeypatch):
    other = train_tokenizer([TEXT], 300)
    other.save(tmp_path)
    real_write = tokenizer_module._write

    def interrupted(path, content):
        if path.name == "encoding.json":
            raise OSError("stopped")
        real_write(path, content)

    monkeypatch.setattr(tokenizer_module, "_write", interrupted)
    with pytest.raises(OSError, match="stopped"):
        TOKENIZER.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == other.hash
    monkeypatch.undo()
    TOKENIZER.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == TOKENIZER.hash


def test_damaged_or_missing_saves_are_refused(tmp_path):
    with pytest.raises(InputError, match="no saved tokenizer"):
        Tokenizer.load(tmp_path)
    TOKENIZER.save(tmp_path)
    (ranks,) = tmp_path.glob("*.tiktoken")
    content = ranks.read_bytes()
    ranks.write_bytes(content.replace(b" 300\n", b" 301\n"))
    with pytest.raises(InputError, match="sha256"):
        Tokenizer.load(tmp_path)
    ranks.unlink()
    with pytest.raises(InputError, match="is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "encoding.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_a_ranks_file_gets_special_tokens_behind_its_ranks(tmp_path):
    ranks = {bytes([value]): value for value in range(256)} | {b"ab": 256, b"abc": 259}
    loaded = load_tokenizer(write_ranks(tmp_path / "mine.tiktoken", ranks))
    assert (loaded.name, loaded.bos_id, loaded.eos_id, loaded.vocab_size) == ("mine", 260, 261, 262)
    assert loaded.encode("abcab") == [259, 256]
    assert loaded.decode([257]) == "\ufffd"


def test_a_known_ranks_file_is_known_by_its_content(tmp_path, monkeypatch):
    ranks = {bytes([value]): value for value in range(256)}
    path = write_ranks(tmp_path / "renamed.tiktoken", ranks)
    digest = sha256(path.read_bytes())
    known = KNOWN_ENCODINGS["gpt2"]._replace(sha256=digest)
    monkeypatch.setitem(KNOWN_ENCODINGS, "gpt2", known)
    path.write_bytes(path.read_bytes().rstrip() + b"\r\n")  # a copy through another system
    loaded = load_tokenizer(path)
    assert (loaded.name, loaded.bos_id, loaded.eos_id) == ("gpt2", 50256, 50256)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no ranks"),
        (b"YQ== 0\nrubbish\n", "line 2"),
        (b"YQ== x\n", "line 1"),
        (b"YQ== 0\n", "lacks 255 of the 256 single bytes"),
        (b"".join(base64.b64encode(bytes([i])) + b" 1\n" for i in range(256)), "same id to two tokens"),
    ],
)
def test_broken_ranks_files_are_refused(tmp_path, content, message):
    path = tmp_path / "broken.tiktoken"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(path)


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="gpt2, cl100k_base, o200k_base"):
        load_tokenizer("gpt5")


@pytest.mark.parametrize("name", KNOWN_ENCODINGS)
def test_an_encoding_that_cannot_be_fetched_says_which_file_to_bring(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", lambda path: (_ for _ in ()).throw(ConnectionError(path)))
    with pytest.raises(InputError, match=rf"{KNOWN_ENCODINGS[name].file} and name its path as the tokenizer"):
        load_tokenizer(name)


@pytest.mark.parametrize("name", KNOWN_ENCODINGS)
def test_published_patterns_and_special_tokens_are_tiktokens(name, monkeypatch):
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *args, **kwargs: {})
    published = openai_public.ENCODING_CONSTRUCTORS[name]()
    assert KNOWN_ENCODINGS[name].pattern == published["pat_str"]
    assert KNOWN_ENCODINGS[name].special_tokens == published["special_tokens"]


@pytest.mark.parametrize("name", KNOWN_ENCODINGS)
def test_the_real_encoding_equals_tiktokens(name):
    folder = os.environ.get("NEXTLLM_RANKS_DIR")
    if not folder or not os.path.isfile(os.path.join(folder, KNOWN_ENCODINGS[name].file)):
        pytest.skip("set NEXTLLM_RANKS_DIR to a directory with the published .tiktoken files")
    loaded = load_tokenizer(os.path.join(folder, KNOWN_ENCODINGS[name].file))
    assert loaded.name == name
    direct = tiktoken.Encoding(
        name,
        pat_str=KNOWN_ENCODINGS[name].pattern,
        mergeable_ranks=loaded.backend.ranks,
        special_tokens=loaded.special_tokens,
    )
    assert loaded.encode(TEXT) == direct.encode_ordinary(TEXT)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert loaded.vocab_size == direct.n_vocab


BROKEN = {
    "a pattern that does not compile": {"pattern": "("},
    "no special tokens": {"special_tokens": {}},
    "a list of special tokens": {"special_tokens": []},
    "a negative id": {"special_tokens": {"<|endoftext|>": -1}},
    "an id that is no number": {"special_tokens": {"<|endoftext|>": "x"}},
    "a ranks file that is none": {"ranks_file": 3},
}
CHANGES = BROKEN | {"another pattern": {"pattern": "."}, "another hash": {"hash": "0" * 16}}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_description_is_refused_by_name(tmp_path, change):
    TOKENIZER.save(tmp_path)
    file = tmp_path / "encoding.json"
    description = json.loads(file.read_text())
    file.write_text(json.dumps(description | change))
    with pytest.raises(InputError, match=r"encoding.json is damaged"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_description_without_a_hash_is_refused_by_name(tmp_path, change):
    TOKENIZER.save(tmp_path)
    file = tmp_path / "encoding.json"
    description = json.loads(file.read_text())
    del description["hash"]
    file.write_text(json.dumps(description))
    assert Tokenizer.load(tmp_path).hash == TOKENIZER.hash
    file.write_text(json.dumps(description | change))
    with pytest.raises(InputError, match=r"encoding.json is damaged"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_of_another_format_is_refused(tmp_path):
    TOKENIZER.save(tmp_path)
    file = tmp_path / "encoding.json"
    description = json.loads(file.read_text())
    file.write_text(json.dumps(description | {"format": "nextllm_jax tokenizer 9"}))
    with pytest.raises(InputError, match="has format 'nextllm_jax tokenizer 9'; use the version that wrote it"):
        Tokenizer.load(tmp_path)
    del description["format"]  # as the first version wrote it
    file.write_text(json.dumps(description))
    assert Tokenizer.load(tmp_path).hash == TOKENIZER.hash


def test_what_is_not_a_saved_tokenizer_is_refused(tmp_path):
    for content in (b"[]", b"{}", b"\xff\xfe", b"3"):
        (tmp_path / "encoding.json").write_bytes(content)
        with pytest.raises(InputError, match=r"encoding.json is damaged"):
            Tokenizer.load(tmp_path)
    with pytest.raises(InputError, match=r"encoding.json cannot be read \(Not a directory\)"):
        Tokenizer.load(tmp_path / "encoding.json")
