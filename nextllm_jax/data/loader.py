"""Batches on devices: training batches in an endless shuffled order, validation batches once in stored order."""

import collections
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from nextllm_jax.data.packing import count_windows, read_batch
from nextllm_jax.data.shards import DataPath, Split
from nextllm_jax.errors import InputError
from nextllm_jax.model.objective import Batch

_MIN_THREADS, _MAX_THREADS = 2, 16
_MIN_BATCHES_AHEAD = 8
_BATCHES_ON_DEVICE = 2


class TrainLoader:
    """An endless sequence of training batches. Each depends only on (data id, seed, step).

    Every epoch visits all windows in a new order. Each process reads only the rows that its devices hold. For a run
    whose batch size, order or data changed, `resume` sets the position to continue from.
    `sharding` is the sharding of [B, T] arrays. Raises InputError if the split is shorter than one window, or if the
    batch cannot be sharded that way.
    """

    def __init__(
        self, split: Split, *, sequence_length: int, global_batch_size: int, seed: int, sharding: jax.sharding.Sharding
    ):
        windows = count_windows(split, sequence_length, partial=False)
        if windows == 0:
            raise InputError(
                f"data.sequence_length {sequence_length} is too long for the {split.name} split of "
                f"{split.num_tokens} tokens, which must have at least one token more; lower it, or add text"
            )
        self._split = split
        self._seed = seed
        self._shape = (global_batch_size, sequence_length)
        self._sharding = sharding
        self._rows = _local_rows(sharding, self._shape)
        digest = hashlib.sha256(f"{split.data_id}:{seed}".encode()).digest()
        order_seed = int.from_bytes(digest[:4], "big")
        self._order = grain.MapDataset.range(windows).shuffle(seed=order_seed).repeat()
        self._origin = (0, 0)  # a step, and the position of its first window in the order

    def batches(self, start_step: int) -> Iterator[Batch]:
        """The batches of `start_step`, `start_step` + 1, ... as global jax arrays. Any start step is equally fast."""
        return _on_device(self.host_batches(start_step), self._rows, self._shape, self._sharding)

    def host_batches(self, start_step: int) -> Iterator[Batch]:
        """The same batches as numpy arrays with only this process's rows, prefetched by threads."""
        return _closing(self.dataset(start_step))

    def dataset(self, start_step: int) -> grain.IterDataset[Batch]:
        """The grain dataset of those batches."""
        return _read_ahead(self._split, self._read, range(start_step, sys.maxsize), len(self._rows))

    def position(self, step: int) -> dict[str, Any]:
        """The position to store in a checkpoint, so that training resumes at `step` in the same order; JSON values.

        `window` is the number of windows of this order that the steps before `step` have consumed.
        """
        batch_size, sequence_length = self._shape
        return {
            "data_id": self._split.data_id,
            "tokenizer_hash": self._split.tokenizer_hash,
            "seed": self._seed,
            "step": step,
            "sequence_length": sequence_length,
            "global_batch_size": batch_size,
            "window": self._first_window(step),
        }

    def resume(self, position: dict[str, Any]) -> None:
        """Continue from a recorded position: at its next window if the order is the same, else at the first window.

        The order depends on (data id, seed, sequence length). The batch size may differ.
        """
        step, expected = position["step"], self.position(0)
        same_order = all(position[name] == expected[name] for name in ("data_id", "seed", "sequence_length"))
        self._origin = (step, position.get("window", step * position["global_batch_size"]) if same_order else 0)

    def _first_window(self, step: int) -> int:
        origin_step, origin_window = self._origin
        return origin_window + (step - origin_step) * self._shape[0]

    @property
    def directory(self) -> DataPath:
        """The directory of the data."""
        return self._split.directory

    def whole_batch(self, step: int) -> tuple[np.ndarray, Batch]:
        """The window numbers of a step, and its batch with the rows of all processes; numpy arrays."""
        windows = self._windows(step, np.arange(self._shape[0]))
        return windows, read_batch(self._split, windows, self._shape[1])

    def _windows(self, step: int, rows: np.ndarray) -> np.ndarray:
        return np.array([self._order[self._first_window(step) + int(row)] for row in rows])

    def _read(self, step: int) -> Batch:
        return read_batch(self._split, self._windows(step, self._rows), self._shape[1])


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

    batches = _read_ahead(split, read, range(num_batches), len(rows))
    return _on_device(_closing(batches), rows, shape, sharding)


def _read_ahead(split: Split, read: Callable[[int], Batch], batches: range, rows: int) -> grain.IterDataset[Batch]:
    """The batches with these numbers, of which each has `rows` windows to read. Threads read some of them ahead."""
    threads = min(max(split.concurrent_windows // rows, _MIN_THREADS), _MAX_THREADS)
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
    """Global arrays built from this process's rows, a few batches ahead, so that transfers overlap with compute."""

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
