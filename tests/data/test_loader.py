"""The order of batches is a function of (data id, seed, step) alone."""

import itertools
import shutil
import threading
from typing import Any

import grain
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nextllm_jax.data.loader import TrainLoader, validation_batches
from nextllm_jax.data.mixture import Source
from nextllm_jax.data.packing import num_windows, read_batch
from nextllm_jax.data.shards import Dataset, SplitName, TokenizedDocuments, write_index, write_split
from nextllm_jax.errors import InputError
from nextllm_jax.model.objective import Batch
from nextllm_jax.tokenizer.bpe import train_tokenizer

T, B = 8, 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A train split of 301 tokens (37 windows of 8) and a validation split of 61, each token another."""
    directory = tmp_path_factory.mktemp("data")
    tokenizer = train_tokenizer(["some text to learn from"], 258)
    splits = {}
    documents: dict[SplitName, list[int]] = {"train": [100, 1, 50, 150], "validation": [30, 31]}
    for name, lengths in documents.items():
        tokens = np.arange(sum(lengths)) % 258
        parts = [TokenizedDocuments(tokens, np.array(lengths), len(tokens))]
        splits[name] = write_split(directory, name, parts, vocab_size=258, tokens_per_shard=64)
    tokenizer.save(directory / "tokenizer")
    write_index(directory, tokenizer, splits)
    return Dataset.open(directory)


def make_sharding(shape=(8, 1)):
    mesh = jax.make_mesh(shape, ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, P("data", "sequence"))


def make_loader(dataset, **changes):
    settings = {"sequence_length": T, "global_batch_size": B, "seed": 0, "sharding": make_sharding()} | changes
    return TrainLoader([Source(dataset)], **settings)


def take(batches: Any, count: int) -> list[Batch]:
    result = [jax.tree.map(np.asarray, batch) for batch in itertools.islice(batches, count)]
    batches.close()
    return result


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_batches_are_global_arrays_with_the_sharding(dataset):
    sharding = make_sharding((4, 2))
    batch = next(make_loader(dataset, sharding=sharding).batches(0))
    for array in batch:
        assert array.shape == (B, T)
        assert array.sharding == sharding
        assert array.addressable_shards[0].data.shape == (2, 4)


def test_batches_are_on_their_devices_before_they_are_asked_for(dataset, monkeypatch):
    """So that the transfer of a batch overlaps with the steps before."""
    loader, read = make_loader(dataset), []
    host_batches = loader.host_batches
    monkeypatch.setattr(
        loader, "host_batches", lambda step: (read.append(batch) or batch for batch in host_batches(step))
    )
    batches = loader.batches(0)
    for taken in range(1, 4):
        next(batches)
        assert len(read) == taken + 2


def test_each_epoch_holds_every_window_once_in_a_new_order(dataset):
    split = dataset.split("train")
    windows = num_windows(split.num_tokens, T, partial=False)
    rows = np.concatenate([batch.tokens_BT for batch in take(make_loader(dataset).batches(0), 10)])
    expected = sorted(read_batch(split, np.arange(windows), T).tokens_BT.tolist())
    first, second = rows[:windows].tolist(), rows[windows : 2 * windows].tolist()
    assert sorted(first) == sorted(second) == expected
    assert first != second
    assert first != expected


def test_starting_at_a_step_gives_what_an_uninterrupted_run_gets(dataset):
    loader = make_loader(dataset)
    assert_same(take(loader.batches(0), 12)[7:], take(loader.batches(7), 5))
    far = 10**15
    assert_same(take(loader.batches(far), 2)[1], take(loader.batches(far + 1), 1)[0])


def test_the_order_depends_on_seed_and_data_only(dataset):
    expected = take(make_loader(dataset).batches(0), 6)
    for shape in [(1, 8), (2, 4), (8, 1)]:
        assert_same(take(make_loader(dataset, sharding=make_sharding(shape)).batches(0), 6), expected)
    # A global batch is the next B windows of one endless stream.
    halves = take(make_loader(dataset, global_batch_size=4, sharding=make_sharding((4, 2))).batches(0), 12)
    joined = [jax.tree.map(lambda *pair: np.concatenate(pair), *halves[i : i + 2]) for i in range(0, 12, 2)]
    assert_same(joined, expected)
    other = take(make_loader(dataset, seed=1).batches(0), 6)
    assert not np.array_equal(other[0].tokens_BT, expected[0].tokens_BT)


class OneProcess:
    """The sharding as a process that holds only some of the devices sees it."""

    def __init__(self, sharding, devices):
        self._sharding, self._devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        indices = self._sharding.devices_indices_map(shape)
        return {device: indices[device] for device in self._devices}


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_read_their_rows_alone(dataset, shape, num_processes, monkeypatch):
    sharding = make_sharding(shape)
    expected = take(make_loader(dataset, sharding=sharding).batches(3), 4)
    seen = set()
    for devices in np.array(jax.devices()).reshape(num_processes, -1):
        one = OneProcess(sharding, devices)
        rows = sorted(
            {row for index in one.addressable_devices_indices_map((B, T)).values() for row in range(B)[index[0]]}
        )
        for batch, whole in zip(take(make_loader(dataset, sharding=one).host_batches(3), 4), expected, strict=True):
            assert_same(batch, jax.tree.map(lambda array, rows=rows: array[rows], whole))
        seen |= set(rows)
    assert seen == set(range(B))


def test_a_position_is_plain_json_and_goes_on_with_the_same_order(dataset):
    loader = make_loader(dataset)
    position = loader.position(12)
    assert position == {
        "data_id": dataset.data_id, "tokenizer_hash": dataset.tokenizer_hash, "seed": 0, "step": 12,
        "sequence_length": T, "global_batch_size": B, "window": 12 * B,
    }  # fmt: skip
    expected = take(loader.batches(12), 3)
    old = {name: value for name, value in position.items() if name not in ("window", "tokenizer_hash")}
    for recorded in (position, old):
        loader = make_loader(dataset)
        loader.resume(recorded)
        assert_same(take(loader.batches(12), 3), expected)


def test_another_batch_size_goes_on_with_the_next_window_and_so_does_a_run_after_it(dataset):
    windows = np.concatenate([batch.tokens_BT for batch in take(make_loader(dataset).batches(0), 12)])
    loader = make_loader(dataset, global_batch_size=2 * B)
    loader.resume(make_loader(dataset).position(3))
    got = take(loader.batches(3), 4)
    np.testing.assert_array_equal(np.concatenate([batch.tokens_BT for batch in got]), windows[3 * B : 11 * B])
    after = make_loader(dataset, global_batch_size=2 * B)
    after.resume(loader.position(5))
    assert_same(take(after.batches(5), 2), got[2:])


@pytest.mark.parametrize("change", [{"seed": 1}, {"sequence_length": 2 * T}])
def test_another_order_begins_at_its_beginning(dataset, change):
    loader = make_loader(dataset, **change)
    loader.resume(make_loader(dataset).position(3))
    assert loader.position(4)["window"] == B
    assert_same(take(loader.batches(3), 2), take(make_loader(dataset, **change).batches(0), 2))


def test_validation_reads_everything_once_for_every_batch_size(dataset):
    split = dataset.split("validation")
    windows = num_windows(split.num_tokens, T, partial=True)
    expected = read_batch(split, np.arange(windows), T)
    for batch_size, shape in [(2, (2, 4)), (4, (4, 2)), (8, (8, 1)), (24, (8, 1))]:
        sharding = make_sharding(shape)
        batches = list(validation_batches(split, sequence_length=T, batch_size=batch_size, sharding=sharding))
        assert all(array.shape == (batch_size, T) for batch in batches for array in batch)
        for array, rows in zip(zip(*batches, strict=True), expected, strict=True):
            joined = np.concatenate(array)
            np.testing.assert_array_equal(joined[:windows], rows)
            assert not joined[windows:].any()
    assert int(expected.loss_mask_BT.sum()) == split.num_tokens - split.num_documents


def test_a_validation_split_shorter_than_a_window_is_one_padded_window(dataset):
    (batch,) = validation_batches(
        dataset.split("validation"), sequence_length=64, batch_size=8, sharding=make_sharding()
    )
    assert int(batch.loss_mask_BT.sum()) == 59


def test_bad_sizes_are_refused(dataset):
    with pytest.raises(InputError, match=r"sequence_length 301 is too long for the train split of 301 tokens"):
        make_loader(dataset, sequence_length=301)
    with pytest.raises(InputError, match=r"7 sequences .* cannot be sharded over the mesh"):
        make_loader(dataset, global_batch_size=7)
    with pytest.raises(InputError, match="cannot be sharded over the mesh"):
        list(validation_batches(dataset.split("validation"), sequence_length=T, batch_size=3, sharding=make_sharding()))


def test_an_id_outside_the_vocabulary_ends_the_loop_with_the_name_of_the_file(dataset, tmp_path):
    copy = Dataset.open(shutil.copytree(dataset.path, tmp_path / "copy"))
    with open(copy.path / "train-00002.bin", "r+b") as file:  # after it was opened and checked
        file.write(b"\xff\xff")
    with pytest.raises(InputError, match=r"02.bin holds the token id 65535, which is outside the vocabulary of 258"):
        take(make_loader(copy).batches(0), 6)


def test_reading_ahead_ends_with_the_loop(dataset):
    before = threading.active_count()
    for _ in range(5):
        take(make_loader(dataset).batches(0), 2)
    assert threading.active_count() <= before + 3


def test_grain_finds_its_iterator_restored_exactly_from_every_state(dataset):
    """Grain's own check; over the end of an epoch of 37 windows."""
    batches = make_loader(dataset).dataset(2)
    grain.experimental.assert_equal_output_after_checkpoint(grain.experimental.LimitIterDataset(batches, 5))
