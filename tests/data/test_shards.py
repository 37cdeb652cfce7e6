"""Shards are read across file ends, and damage is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest

from nextllm_jax.data import blocks, shards
from nextllm_jax.data.shards import SPLITS, Dataset, TokenizedDocuments, token_dtype, write_index, write_split
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.bpe import train_tokenizer

TOKENIZER = train_tokenizer(["some text to learn from, some more text"], 270)


def write_dataset(directory, lengths=(5, 1, 30, 14), tokens_per_shard=16, tokenizer=TOKENIZER, seed=0):
    directory.mkdir(exist_ok=True)
    tokens = np.random.default_rng(seed).integers(0, 256, sum(lengths))
    texts = np.split(tokens, np.cumsum(lengths)[:-1])
    parts = [TokenizedDocuments(text, np.array([len(text)]), len(text)) for text in texts]
    splits = {
        name: write_split(
            directory, name, iter(parts), vocab_size=tokenizer.vocab_size, tokens_per_shard=tokens_per_shard
        )
        for name in SPLITS
    }
    tokenizer.save(directory / "tokenizer")
    write_index(directory, tokenizer, splits)
    return np.concatenate([part.tokens for part in parts])


def test_every_range_is_read_across_shards(tmp_path):
    stream = write_dataset(tmp_path)
    split = Dataset.open(tmp_path).split("train")
    assert len(list(tmp_path.glob("train-*.bin"))) == 4
    assert (split.num_tokens, split.num_documents, split.num_bytes) == (50, 4, 50)
    assert split.document_starts.tolist() == [0, 5, 6, 36, 50]
    for start in range(51):
        for stop in range(start, 51):
            np.testing.assert_array_equal(split.tokens(start, stop), stream[start:stop])
    with pytest.raises(IndexError):
        split.tokens(40, 51)


def test_shard_files_end_exactly_where_tokens_do(tmp_path):
    stream = write_dataset(tmp_path, lengths=(16, 16))
    assert [path.stat().st_size for path in sorted(tmp_path.glob("train-*.bin"))] == [32, 32]
    np.testing.assert_array_equal(Dataset.open(tmp_path).split("train").tokens(0, 32), stream)


def test_the_data_id_follows_the_tokens_and_the_tokenizer(tmp_path):
    write_dataset(tmp_path / "a")
    write_dataset(tmp_path / "b")
    write_dataset(tmp_path / "c", lengths=(5, 1, 30, 15))
    write_dataset(tmp_path / "d", tokenizer=train_tokenizer(["some other text"], 260))
    write_dataset(tmp_path / "e", tokens_per_shard=7)
    write_dataset(tmp_path / "f", lengths=(5, 1, 30, 14), seed=1)
    write_dataset(tmp_path / "g", lengths=(6, 30, 14))
    ids = [Dataset.open(tmp_path / name).data_id for name in "abcdefg"]
    assert ids[0] == ids[1] == ids[4], "neither the place nor how shards are cut is part of it"
    assert len(set(ids)) == 5
    assert Dataset.open(tmp_path / "a").split("train").data_id == ids[0]


def test_the_type_on_disk_holds_the_vocabulary(tmp_path):
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32
    parts = [TokenizedDocuments(np.array([1, 70_000]), np.array([2]), 2)]
    with pytest.raises(InputError, match="70000 is outside the vocabulary of 65536"):
        write_split(tmp_path, "train", parts, vocab_size=65536, tokens_per_shard=10)
    entry = write_split(tmp_path, "train", parts, vocab_size=70_001, tokens_per_shard=10)
    assert entry["shards"][0]["size"] == 8


def test_a_split_without_documents_is_refused(tmp_path):
    with pytest.raises(InputError, match="the validation split has no documents"):
        write_split(tmp_path, "validation", [], vocab_size=300, tokens_per_shard=10)


@pytest.mark.parametrize("name", ["train-00001.bin", "validation-documents.npy"])
def test_damaged_files_are_refused_by_name(tmp_path, name):
    write_dataset(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is damaged or .*sha256.*nextllm prepare --overwrite --output"):
        Dataset.open(tmp_path)
    Dataset.open(tmp_path, verify="sizes")
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"{name} is damaged: .* bytes instead of"):
        Dataset.open(tmp_path, verify="sizes")
    path.unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        Dataset.open(tmp_path, verify="sizes")


@pytest.fixture
def sampled(tmp_path, monkeypatch):
    """A dataset of 4 train shards of 8 blocks of 8 bytes and validation of the like, of which 20 blocks are sampled."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 8)
    monkeypatch.setattr(shards, "SAMPLED_BLOCKS", 20)
    write_dataset(tmp_path, lengths=(60, 68), tokens_per_shard=32)
    return tmp_path


def refusals(directory, tries, **settings):
    count = 0
    for _ in range(tries):
        try:
            Dataset.open(directory, **settings)
        except InputError:
            count += 1
    return count


def test_a_flipped_bit_is_found_as_often_as_promised_and_always_by_a_full_check(sampled):
    path = sampled / "train-00002.bin"
    content = bytearray(path.read_bytes())
    content[21] ^= 4
    path.write_bytes(content)
    sizes = [file.stat().st_size for file in [*sampled.glob("*.bin"), *sampled.glob("*.npy")]]
    expected = 20 * 8 / sum(sizes)  # sampled bytes over all bytes, and a little more for the one block of each file
    found = refusals(sampled, 400) / 400
    assert expected - 0.1 < found < expected + 1 / 8 + 0.1
    assert refusals(sampled, 3, verify="full") == 3
    assert refusals(sampled, 3, verify="sizes") == 0


def test_swapped_and_foreign_shards_are_always_found(sampled):
    first, second = sampled / "train-00000.bin", sampled / "train-00003.bin"
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert refusals(sampled, 20) == 20
    first.write_bytes(contents[0])
    second.write_bytes(bytes(len(contents[1])))
    assert refusals(sampled, 20) == 20
    second.write_bytes(contents[1])
    assert refusals(sampled, 1, verify="full") == 0


def test_an_id_outside_the_vocabulary_is_refused_by_the_name_of_its_file(tmp_path):
    write_dataset(tmp_path)
    dataset = Dataset.open(tmp_path)
    with open(tmp_path / "train-00001.bin", "r+b") as file:
        file.write(b"\xff\xff")
    with pytest.raises(InputError, match=r"01.bin holds the token id 65535, which is outside the vocabulary of 270"):
        dataset.split("train").tokens(0, 20)  # of data damaged after the start, or where no sample was taken
    np.testing.assert_array_equal(dataset.split("train").tokens(0, 16), dataset.split("train").tokens(0, 16))


def test_a_manifest_of_another_tokenizer_or_vocabulary_is_refused(tmp_path):
    write_dataset(tmp_path)
    file = tmp_path / "index.json"
    index = json.loads(file.read_text())
    index["tokenizer"]["vocab_size"] = 100
    file.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index.json is damaged \(its sha256 does not match its content\)"):
        Dataset.open(tmp_path)
    index["sha256"] = shards._index_sha256(index)
    file.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"00.bin holds the token id \d+, which is outside the vocabulary of 100"):
        Dataset.open(tmp_path).split("train").tokens(0, 20)
    with pytest.raises(InputError, match=r"tokenizer is not the tokenizer of this data, as .*index.json"):
        Dataset.open(tmp_path, verify="sizes").tokenizer()


def test_data_of_an_earlier_format_are_refused_with_the_command_that_makes_them_again(tmp_path):
    write_dataset(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "format": "nextllm_jax tokens 2"}))
    command = f"nextllm prepare --overwrite --output {tmp_path}"
    with pytest.raises(InputError, match=rf"'nextllm_jax tokens 2' of another version .*again: {command}"):
        Dataset.open(tmp_path)


def test_missing_unfinished_and_foreign_directories_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no prepared data.*nextllm prepare"):
        Dataset.open(tmp_path / "data")
    (tmp_path / "data.partial").mkdir()
    with pytest.raises(InputError, match="is not fully prepared"):
        Dataset.open(tmp_path / "data")
    for address in ("az://bucket/data", Path("az://bucket/data")):
        with pytest.raises(InputError, match=r"^az://bucket/data is neither a local path"):
            Dataset.open(address)
    write_dataset(tmp_path / "data")
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    for broken, message in [({**index, "format": "other 2"}, "format 'other 2'"), ({**index, "splits": {}}, "damaged")]:
        (tmp_path / "data" / "index.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=message):
            Dataset.open(tmp_path / "data")
    (tmp_path / "data" / "index.json").write_text("{")
    with pytest.raises(InputError, match=r"index.json is damaged .*remove .*data and prepare the data again"):
        Dataset.open(tmp_path / "data")


def test_the_tokenizer_must_be_the_one_that_made_the_data(tmp_path):
    write_dataset(tmp_path)
    dataset = Dataset.open(tmp_path)
    assert dataset.tokenizer().hash == dataset.tokenizer_hash == TOKENIZER.hash
    assert dataset.vocab_size == TOKENIZER.vocab_size
    train_tokenizer(["some other text"], 260).save(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="tokenizer is not the tokenizer of this data"):
        dataset.tokenizer()
