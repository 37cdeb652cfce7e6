"""The order of a mixture is a function of (data ids, weights, seed, step), and no source is ever a window off."""

import dataclasses
import itertools
import json
import random
from fractions import Fraction

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from nextllm_jax.config import DataConfig
from nextllm_jax.config.mixture import parse_mixture
from nextllm_jax.data.loader import TrainLoader
from nextllm_jax.data.mixture import Mixture, Source, data_id
from nextllm_jax.data.packing import read_batch
from nextllm_jax.data.prepare import ensure_prepared, prepare
from nextllm_jax.data.shards import Dataset, TokenizedDocuments, data_path, write_index, write_masks, write_split
from nextllm_jax.data.sources import continued, open_sources, source_paths, with_source_paths
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.bpe import train_tokenizer
from tests.conftest import write_corpus

T, B = 8, 8


def counts_by_window(mixture: Mixture, windows: int, sources: int) -> np.ndarray:
    """How many of the first n windows come from each source, [windows + 1, sources]."""
    located = np.array([mixture.locate(n)[0] for n in range(windows)])
    return np.concatenate([np.zeros((1, sources), int), (located[:, None] == np.arange(sources)).cumsum(0)])


def test_no_source_deviates_from_its_weight_by_a_window():
    rng = random.Random(0)
    for _ in range(60):
        weights = [rng.choice([1, 1, 2, rng.randint(1, 200)]) for _ in range(rng.randint(2, 9))]
        windows = min(2 * sum(weights) + 5, 1500)
        counts = counts_by_window(Mixture(weights, [None] * len(weights)), windows, len(weights))
        ideal = np.arange(windows + 1)[:, None] * np.array(weights) / sum(weights)
        assert np.abs(counts - ideal).max() < 1


def test_each_window_of_a_source_is_drawn_once_in_order_and_counted():
    mixture = Mixture([3, 5, 1], [None, 7, 2])
    seen = [0, 0, 0]
    for window in range(200):
        assert mixture.counts(window) == seen
        source, number = mixture.locate(window)
        assert number == seen[source]
        seen[source] += 1
    far = 10**15
    assert sum(mixture.counts(far)) == far
    assert mixture.locate(far)[1] == mixture.counts(far)[mixture.locate(far)[0]]


def test_the_weight_of_an_exhausted_source_goes_to_the_others_by_their_weights():
    mixture = Mixture([3, 1, 4], [None, None, 40])
    ((source, end),) = mixture.ends
    counts = counts_by_window(mixture, 400, 3)
    assert source == 2
    assert (counts[end][2], counts[end - 1][2], counts[400][2]) == (40, 39, 40)
    left = np.arange(400 - end + 1)[:, None] * np.array([3, 1]) / 4
    assert np.abs(counts[end:, :2] - counts[end, :2] - left).max() < 1
    assert mixture.length is None
    assert Mixture([3, 1], [6, 10]).length == 16
    assert Mixture([3, 1], [0, 0]).length == 0
    assert Mixture([3, 1], [0, None]).locate(5) == (1, 5)


def test_entries_are_parsed_from_the_right():
    entries = ("gs://b:1/web:0.3", "s3://b/web/:.3:2", "hf:owner/web:0.15:0.5", "stdlib:0.75", "texts/*.txt:1")
    addresses, names, weights, epochs = zip(*parse_mixture(entries), strict=True)
    assert addresses == ("gs://b:1/web", "s3://b/web/", "hf:owner/web", "stdlib", "texts/*.txt")
    assert names == ("web", "web-2", "web-3", "stdlib", "txt")
    assert weights == (6, 6, 3, 15, 20)
    assert epochs == (None, 2, Fraction(1, 2), None, None)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (("web:1",), "give at least two sources"),
        (("web", "b:1"), r"data.mixture web has no weight, .*; write web:0.3"),
        (("gs://b:1/web:-1", "b:1"), "web:-1 has no weight, a positive decimal number; write gs://b:1/web:0.3"),
        (("web:1e-3", "b:1"), "write web:0.3"),
        (("web:0", "b:1"), "web:0 has weight 0"),
        (("web:1:0", "b:1"), "limit of 0 epochs"),
        (("web:1", "web:2"), "has web twice"),
        (("web:0.1234567", "b:1"), "round them to fewer digits"),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_refused(entries, words):
    with pytest.raises(InputError, match=words):
        DataConfig(mixture=entries)
    with pytest.raises(InputError, match=r"data.path is d, but data.mixture"):
        DataConfig(mixture=("a:1", "b:1"), path="d")
    with pytest.raises(InputError, match=r"1 directories for 2 sources"):
        DataConfig(mixture=("a:1", "b:1"), mixture_paths=("d",))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """`a` has 37 windows of 8 tokens, `b` 12 with other tokens, `talks` conversations, `odd` another vocabulary."""
    directory = tmp_path_factory.mktemp("data")
    for name, length, low, size in [
        ("a", 301, 0, 258),
        ("b", 97, 100, 258),
        ("talks", 80, 200, 258),
        ("odd", 80, 0, 259),
    ]:
        (directory / name).mkdir()
        tokenizer = train_tokenizer(["some text some text"], size)
        splits = {}
        for split, count in [("train", length), ("validation", 40)]:
            part = TokenizedDocuments(low + np.arange(count) % 50, np.array([count // 2, count - count // 2]), count)
            splits[split] = write_split(directory / name, split, [part], vocab_size=size, tokens_per_shard=64)
            if name == "talks":
                mask = np.arange(count, dtype=np.uint8) % 2
                splits[split]["masks"] = write_masks(directory / name, split, [mask], tokens_per_shard=64)
        tokenizer.save(directory / name / "tokenizer")
        write_index(directory / name, tokenizer, splits)
    return directory


@pytest.fixture
def loader(directories):
    def make(*sources, batch_size=B, sequence_length=T, seed=0, sharding=None):
        opened = [Source(Dataset.open(directories / name), name, weight, epochs) for name, weight, epochs in sources]
        return TrainLoader(
            opened, sequence_length=sequence_length, global_batch_size=batch_size, seed=seed,
            sharding=sharding or SingleDeviceSharding(jax.devices()[0]),
        )  # fmt: skip

    return make


MIXED = (("a", 3, None), ("b", 1, Fraction(2)))


def windows_of(loader, steps, first=0):
    return np.concatenate([loader.whole_batch(step)[0] for step in range(first, steps)]).tolist()


def test_every_row_is_the_window_of_its_source_and_each_source_is_shuffled_as_alone(loader, directories):
    mixed = loader(*MIXED)
    batches = mixed.batches(0)
    drawn = {0: [], 1: []}
    for step, batch in enumerate(itertools.islice(batches, 20)):
        for row, (source, window) in enumerate(mixed.whole_batch(step)[0].tolist()):
            drawn[source].append(window)
            split = Dataset.open(directories / "ab"[source]).split("train")
            np.testing.assert_array_equal(batch.tokens_BT[row], read_batch(split, np.array([window]), T).tokens_BT[0])
    batches.close()
    assert len(drawn[1]) == 24, "two epochs of 12 windows"
    for source, name in enumerate("ab"):
        alone = windows_of(loader((name, 1, None)), 20)
        assert drawn[source] == alone[: len(drawn[source])]


def test_the_order_depends_neither_on_the_batch_size_nor_on_where_it_begins(loader):
    expected = windows_of(loader(*MIXED), 20)
    assert windows_of(loader(*MIXED, batch_size=2 * B), 10) == expected
    assert windows_of(loader(*MIXED), 20, first=13) == expected[13 * B :]
    assert windows_of(loader(("a", 6, None), ("b", 2, Fraction(2))), 20) == expected, "the same weights"
    assert windows_of(loader(("a", 2, None), MIXED[1]), 20) != expected
    assert windows_of(loader(*MIXED, seed=1), 20) != expected


class Rows:
    """The sharding as a process sees it that holds some of the rows."""

    def __init__(self, *rows):
        self._rows = rows

    def addressable_devices_indices_map(self, shape):
        return {row: (slice(row, row + 1), slice(None)) for row in self._rows}


def test_a_process_reads_its_rows_alone(loader):
    whole = loader(*MIXED)
    batches = loader(*MIXED, sharding=Rows(1, 4, 6)).host_batches(10)
    for step in (10, 11, 12):
        rows = jax.tree.map(lambda array: array[[1, 4, 6]], whole.whole_batch(step)[1])
        jax.tree.map(np.testing.assert_array_equal, next(batches), rows)
    batches.close()


def resumed(loader, position):
    loader.resume(json.loads(json.dumps(position)))
    return loader


def test_a_position_continues_the_order_also_after_a_change_of_the_batch_size(loader):
    expected = windows_of(loader(*MIXED), 24)
    for stop in (5, 13):  # before and after b is exhausted
        position = loader(*MIXED).position(stop)
        assert windows_of(resumed(loader(*MIXED), position), 24, first=stop) == expected[stop * B :]
        half = resumed(loader(*MIXED, batch_size=B // 2), position)
        assert windows_of(half, stop + 6, first=stop) == expected[stop * B : (stop + 3) * B]
        again = resumed(loader(*MIXED), half.position(stop + 6))
        assert windows_of(again, stop + 8, first=stop + 6) == expected[(stop + 3) * B : (stop + 5) * B]


def test_other_weights_continue_each_source_at_its_next_window(loader):
    before, position = windows_of(loader(*MIXED), 5), loader(*MIXED).position(5)
    changed = resumed(loader(("b", 1, None), ("a", 1, None)), position)
    after = windows_of(changed, 10, first=5)
    for name, old, new in [("a", 0, 1), ("b", 1, 0)]:
        drawn = [window for source, window in before if source == old]
        drawn += [window for source, window in after if source == new]
        assert drawn == windows_of(loader((name, 1, None)), 10)[: len(drawn)]
    again = resumed(loader(("b", 1, None), ("a", 1, None)), changed.position(8))
    assert windows_of(again, 10, first=8) == after[3 * B :]
    both = resumed(loader(("b", 1, Fraction(2)), ("a", 1, None)), position)
    drawn = before + [[1 - source, window] for source, window in windows_of(both, 20, first=5)]
    assert sum(source for source, _ in drawn) == 24, "a limit counts from the beginning of the run"
    alone = resumed(loader(("a", 1, None)), changed.position(8))
    assert windows_of(alone, 10, first=8) == windows_of(loader(("a", 1, None)), 9)[30 + 12 : 30 + 12 + 2 * B]
    alone = resumed(loader(("a", 1, None)), position)
    assert windows_of(alone, 8, first=5) == windows_of(loader(("a", 1, None)), 9)[30 : 30 + 3 * B]
    assert alone.position(8).keys() == loader(("a", 1, None)).position(0).keys(), "as without mixtures"
    grown = resumed(loader(*MIXED), loader(("a", 1, None)).position(2))
    assert [window for source, window in windows_of(grown, 4, first=2) if source == 0] == windows_of(
        loader(("a", 1, None)), 4
    )[16:28]


def test_an_exhausted_source_is_announced_and_all_are_an_error(loader):
    for batch_size in (B, 5):
        mixed = loader(*MIXED, batch_size=batch_size)
        (message,) = mixed.exhausted(30)
        last = max(n for n, (source, _) in enumerate(windows_of(mixed, 30)) if source == 1)
        assert message.startswith(
            f"b is exhausted after step {last // batch_size + 1}, since its limit of epochs is 2;"
        )
    assert loader(*MIXED).exhausted(10) == []
    both = loader(("a", 3, Fraction(1)), MIXED[1])
    both.exhausted(7)
    with pytest.raises(InputError, match=r"all sources .* exhausted before step 8: .* allow 61 windows, but 64 are"):
        both.exhausted(8)
    assert loader(*MIXED).epochs(20) == [136 / 37, 24 / 12]


def test_text_and_conversations_mix_with_their_loss_masks(loader, directories):
    mixed = loader(("a", 1, None), ("talks", 1, None))
    windows, batch = mixed.whole_batch(0)
    masked = batch.loss_mask_BT.mean(axis=1)
    assert {*windows[:, 0].tolist()} == {0, 1}
    assert masked[windows[:, 0] == 0].min() > 0.8
    assert masked[windows[:, 0] == 1].max() < 0.6


def test_sources_have_one_tokenizer_and_different_data(directories, tmp_path):
    def config(*names):
        return DataConfig(mixture=tuple(f"{directories / name}:1" for name in names), sequence_length=T)

    assert [source.name for source in open_sources(config("a", "b"))] == ["a", "b"]
    with pytest.raises(InputError, match=r"/odd has another tokenizer .* than .*/a .*; prepare it again with"):
        open_sources(config("a", "odd"))
    (tmp_path / "a").symlink_to(directories / "a")
    with pytest.raises(InputError, match=f"{tmp_path}/a and {directories}/a hold the same data; name it"):
        open_sources(DataConfig(mixture=(f"{directories / 'a'}:1", f"{tmp_path / 'a'}:2")))
    with pytest.raises(InputError, match=r"data.mixture nowhere is read as a corpus, .*: data.corpus nowhere holds no"):
        open_sources(DataConfig(mixture=(f"{directories / 'a'}:1", "nowhere:2")))


def test_the_first_source_may_be_in_a_bucket_and_gives_its_tokenizer(tmp_path, monkeypatch, any_bucket):
    monkeypatch.chdir(tmp_path)
    plain = DataConfig(corpus="web", sequence_length=T, num_processes=1, vocab_size=280, cache_dir=str(tmp_path))
    write_corpus(tmp_path / "web", documents=10)
    (tmp_path / "books").mkdir()
    for number in range(20):
        (tmp_path / "books" / f"{number}.txt").write_text(f"quick brown foxes {number} " * 40)
    prepare(plain, data_path(any_bucket))
    config = dataclasses.replace(plain, mixture=(f"{any_bucket}:0.5", "books:0.5:2"))
    bucket, books = source_paths(config, ensure_prepared)
    assert str(bucket) == any_bucket
    first, second = open_sources(config, [bucket, books])
    assert second.dataset.tokenizer().hash == first.dataset.tokenizer_hash
    known = with_source_paths(config, [any_bucket, str(books)])
    assert data_id(open_sources(known)) == data_id([first, second])


def test_a_run_continues_with_the_directories_that_it_recorded(directories):
    known = (str(directories / "a"), str(directories / "b"))
    recorded = DataConfig(mixture=("x:1", "y:2"), mixture_paths=known)
    assert continued(DataConfig(mixture=("x:3", "y:2:5")), recorded).mixture_paths == known
    assert continued(DataConfig(mixture=("y:3", "new:2")), recorded).mixture_paths == (known[1], "")
    for other in (DataConfig(), DataConfig(mixture=("x:1", "y:2"), validation_fraction=0.5)):
        assert continued(other, recorded) == other
