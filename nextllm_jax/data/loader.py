"""Batches on devices: training batches in an endless shuffled order, validation batches once in stored order."""

import collections
import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from nextllm_jax.data.mixture import Mixture, Source, data_id
from nextllm_jax.data.packing import count_windows, read_batch
from nextllm_jax.data.shards import DataPath, Split
from nextllm_jax.errors import InputError
from nextllm_jax.model.objective import Batch

_MIN_THREADS, _MAX_THREADS = 2, 16
_MIN_BATCHES_AHEAD = 8
_BATCHES_ON_DEVICE = 2
_IDENTITY = ("data_id", "weight", "epochs")


class TrainLoader:
    """An endless sequence of training batches. Each depends only on (data ids and weights, seed, step).

    The windows of several sources alternate by their weights; see `Mixture`. Every epoch of a source visits all its
    windows in a new order. Each process reads only the rows that its devices hold. For a run whose batch size, order or
    data changed, `resume` sets the position to continue from.
    `sharding` is the sharding of [B, T] arrays. Raises InputError if a source is shorter than one window, or if the
    batch cannot be sharded that way.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        sharding: jax.sharding.Sharding,
    ):
        self._sources = sources
        self._splits = [source.dataset.split("train") for source in sources]
        self._seed = seed
        self._shape = (global_batch_size, sequence_length)
        self._sharding = sharding
        self._rows = _local_rows(sharding, self._shape)
        self._epochs = [_windows_per_epoch(split, sequence_length) for split in self._splits]
        self._orders = [_order(*each, seed) for each in zip(self._splits, self._epochs, strict=True)]
        self._start_at((0, 0), [0] * len(sources))

    def _start_at(self, origin: tuple[int, int], first: list[int]) -> None:
        """Continue from `origin`, a step and its first window, with the sources beginning at their windows `first`."""
        self._origin, self._first = origin, first
        limits = [
            None if source.epochs is None else max(math.ceil(source.epochs * windows) - begun, 0)
            for source, windows, begun in zip(self._sources, self._epochs, first, strict=True)
        ]
        self._mixture = Mixture([source.weight for source in self._sources], limits)

    def batches(self, start_step: int) -> Iterator[Batch]:
        """The batches of `start_step`, `start_step` + 1, ... as global jax arrays. Any start step is equally fast."""
        return _on_device(self.host_batches(start_step), self._rows, self._shape, self._sharding)

    def host_batches(self, start_step: int) -> Iterator[Batch]:
        """The same batches as numpy arrays with only this process's rows, prefetched by threads."""
        return _closing(self.dataset(start_step))

    def dataset(self, start_step: int) -> grain.IterDataset[Batch]:
        """The grain dataset of those batches."""
        return _read_ahead(self._splits, self._read, range(start_step, sys.maxsize), len(self._rows))

    def position(self, step: int) -> dict[str, Any]:
        """The position to store in a checkpoint, from which training resumes at `step` in the same order; JSON values.

        `window` is the number of windows of this order that the steps before `step` have consumed. For a mixture,
        `sources` has for each source its identity, where this order begins in it, and its windows consumed so far.
        """
        batch_size, sequence_length = self._shape
        window = self._first_window(step)
        position = {
            "data_id": data_id(self._sources),
            "tokenizer_hash": self._splits[0].tokenizer_hash,
            "seed": self._seed,
            "step": step,
            "sequence_length": sequence_length,
            "global_batch_size": batch_size,
            "window": window,
        }
        if len(self._sources) > 1:
            counts = zip(self._identities(), self._first, self._mixture.counts(window), strict=True)
            position["sources"] = [each | {"first": first, "windows": first + count} for each, first, count in counts]
        return position

    def _identities(self) -> list[dict[str, Any]]:
        """What determines the order of the sources, as JSON values."""
        return [
            {
                "data_id": source.dataset.data_id,
                "weight": source.weight,
                "epochs": None if source.epochs is None else str(source.epochs),
            }
            for source in self._sources
        ]

    def resume(self, position: dict[str, Any]) -> None:
        """Continue from a recorded position: each source at its next window, or at its first in another order.

        The order in a source depends on (data id, seed, sequence length). The batch size and the weights may differ.
        """
        step, expected = position["step"], self.position(0)
        window = position.get("window", step * position["global_batch_size"])
        recorded = position.get("sources", [{"data_id": position["data_id"], "windows": window}])
        if any(position[name] != expected[name] for name in ("seed", "sequence_length")):
            recorded = []
        consumed = {source["data_id"]: source["windows"] for source in recorded}
        first = [consumed.get(split.data_id, 0) for split in self._splits]
        if len(self._sources) == 1:
            self._start_at((step, first[0]), [0])
        elif [{name: source.get(name) for name in _IDENTITY} for source in recorded] == self._identities():
            self._start_at((step, window), [source["first"] for source in recorded])
        else:
            self._start_at((step, 0), first)

    def _first_window(self, step: int) -> int:
        origin_step, origin_window = self._origin
        return origin_window + (step - origin_step) * self._shape[0]

    def exhausted(self, steps: int) -> list[str]:
        """A message for each source that is exhausted before the last of so many steps, and for what follows.

        Raises InputError if all are.
        """
        batch_size, last = self._shape[0], self._first_window(steps)
        if self._mixture.length is not None and self._mixture.length < last:
            raise InputError(
                f"all sources of data.mixture are exhausted before step {steps}: their limits of epochs allow "
                f"{self._mixture.length:,} windows, but {last:,} are needed; raise a limit or leave it out, or lower "
                "training.steps"
            )
        messages = []
        for index, window in self._mixture.ends:
            source, since = self._sources[index], window - self._origin[1]
            if since >= 0 and window < last:
                step = self._origin[0] + -(-since // batch_size)
                messages.append(
                    f"{source.name} is exhausted after step {step}, since its limit of epochs is {source.epochs}; its "
                    "weight is distributed over the other sources"
                )
        return messages

    def epochs(self, steps: int) -> list[float]:
        """How many epochs of each source the steps from 0 up to `steps` take, in this order."""
        counts = self._mixture.counts(steps * self._shape[0])
        return [count / windows for count, windows in zip(counts, self._epochs, strict=True)]

    @property
    def directories(self) -> list[DataPath]:
        """The directory of each source."""
        return [split.directory for split in self._splits]

    def whole_batch(self, step: int) -> tuple[np.ndarray, Batch]:
        """The windows of a step, and its batch with the rows of all processes; numpy arrays.

        The windows are their numbers, int [B], or for a mixture (source, number), int [B, 2].
        """
        windows = self._windows(step, np.arange(self._shape[0]))
        return windows if len(self._sources) > 1 else windows[:, 1], self._read_windows(windows)

    def _windows(self, step: int, rows: np.ndarray) -> np.ndarray:
        """(source, window) of rows of a step, int [R, 2]."""
        first = self._first_window(step)
        located = [self._mixture.locate(first + int(row)) for row in rows]
        return np.array([(source, self._orders[source][self._first[source] + index]) for source, index in located])

    def _read(self, step: int) -> Batch:
        return self._read_windows(self._windows(step, self._rows))

    def _read_windows(self, windows: np.ndarray) -> Batch:
        """The batch of windows of the sources, in their order."""
        sources, numbers = windows.T
        parts = [read_batch(split, numbers[sources == i], self._shape[1]) for i, split in enumerate(self._splits)]
        place = np.argsort(np.argsort(sources, kind="stable"))
        return Batch(*(np.concatenate(arrays)[place] for arrays in zip(*parts, strict=True)))


def _windows_per_epoch(split: Split, sequence_length: int) -> int:
    windows = count_windows(split, sequence_length, partial=False)
    if windows == 0:
        raise InputError(
            f"data.sequence_length {sequence_length} is too long for the {split.name} split of {split.num_tokens} "
            f"tokens in {split.directory}, which must have at least one token more; lower it, or add text"
        )
    return windows


def _order(split: Split, windows: int, seed: int) -> grain.MapDataset[int]:
    """The windows of a split in an endless order."""
    digest = hashlib.sha256(f"{split.data_id}:{seed}".encode()).digest()
    return grain.MapDataset.range(windows).shuffle(seed=int.from_bytes(digest[:4], "big")).repeat()


def validation_batches(
    split: Split, *, sequence_length: int, batch_size: int, sharding: jax.sharding.Sharding
) -> Iterator[Batch]:
    """The whole split once, in stored order, as global jax arrays. Each target is in the loss mask at most once.

    The last window and the last batch are padded, with the loss mask False. Raises InputError as TrainLoader does.
    """
    if split.num_tokens < 2:
        raise InputError(f"the {split.name} split has {split.num_tokens} tokens; prepare data with more text")
    shape = (batch_size, sequence_length)
    rows = _local_rows(sharding, shape)
    num_batches = -(-count_windows(split, sequence_length, partial=True) // batch_size)

    def read(batch: int) -> Batch:
        return read_batch(split, batch * batch_size + rows, sequence_length)

    batches = _read_ahead([split], read, range(num_batches), len(rows))
    return _on_device(_closing(batches), rows, shape, sharding)


def _read_ahead(
    splits: Sequence[Split], read: Callable[[int], Batch], batches: range, rows: int
) -> grain.IterDataset[Batch]:
    """The batches with these numbers, with `rows` windows to read for each. Threads read some of them ahead."""
    threads = min(max(max(split.concurrent_windows for split in splits) // rows, _MIN_THREADS), _MAX_THREADS)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, _MIN_BATCHES_AHEAD))
    return grain.MapDataset.range(batches.start, batches.stop).map(read).to_iter_dataset(options)


def _closing(dataset: grain.IterDataset[Batch]) -> Iterator[Batch]:
    """The batches of a dataset, whose threads end with this iterator."""
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()


def _local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> np.ndarray:
    """The rows of a [B, T] array that this process's devices hold, sorted."""
    try:
        indices = sharding.addressable_devices_indices_map(shape).values()
    except ValueError as error:
        raise InputError(
            f"a batch of {shape[0]} sequences of {shape[1]} tokens cannot be sharded over the mesh ({sharding}); "
            "change training.global_batch_size, training.evaluation_batch_size or mesh"
        ) from error
    rows = {row for index in indices if index is not None for row in range(*index[0].indices(shape[0]))}
    return np.array(sorted(rows))


def _on_device(
    batches: Iterable[Batch], rows: np.ndarray, shape: tuple[int, int], sharding: jax.sharding.Sharding
) -> Iterator[Batch]:
    """Global arrays built from this process's rows, a few batches ahead: transfers overlap with compute."""

    def to_global(local: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            wanted = np.arange(*index[0].indices(shape[0]))
            return local[np.searchsorted(rows, wanted)][:, index[1]]

        return jax.make_array_from_callback(shape, sharding, piece)

    ready: collections.deque[Batch] = collections.deque()
    for batch in batches:
        ready.append(Batch(*map(to_global, batch)))
        if len(ready) > _BATCHES_ON_DEVICE:
            yield ready.popleft()
    yield from ready
