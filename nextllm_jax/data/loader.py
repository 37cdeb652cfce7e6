"""Batches on devices: for training in an endless shuffled order, for validation once in stored order."""

import collections
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from nextllm_jax.data.packing import count_windows, read_batch
from nextllm_jax.data.shards import Split
from nextllm_jax.errors import InputError
from nextllm_jax.model.objective import Batch

_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
_BATCHES_ON_DEVICE = 2


class TrainLoader:
    """An endless supply of training batches, each a function of (data id, seed, step) alone.

    Every epoch is a new order of all windows. Each process reads only the rows that its devices hold. A run whose
    batch size, order or data changed on the way goes on from where `resume` puts it.
    `sharding` is that of [B, T] arrays. Raises InputError if the split is shorter than one window, or if the
    sharding does not divide the batch.
    """

    def __init__(
        self, split: Split, *, sequence_length: int, global_batch_size: int, seed: int, sharding: jax.sharding.Sharding
    ):
        windows = count_windows(split, sequence_length, partial=False)
        if windows == 0:
            raise InputError(
                f"data.sequence_length {sequence_length} is too long for the {split.name} split of "
                f"{split.num_tokens} tokens, which must hold one more; shorten it or bring more text"
            )
        self._split = split
        self._seed = seed
        self._shape = (global_batch_size, sequence_length)
        self._sharding = sharding
        self._rows = _local_rows(sharding, self._shape)
        digest = hashlib.sha256(f"{split.data_id}:{seed}".encode()).digest()
        order_seed = int.from_bytes(digest[:4], "big")
        self._order = grain.MapDataset.range(windows).shuffle(seed=order_seed).repeat()
        self._origin = (0, 0)  # a step, and the place in the order of its first window

    def batches(self, start_step: int) -> Iterator[Batch]:
        """The batches of `start_step`, `start_step` + 1, ... as global jax arrays; starting costs the same anywhere."""
        return _on_device(self.host_batches(start_step), self._rows, self._shape, self._sharding)

    def host_batches(self, start_step: int) -> Iterator[Batch]:
        """The same batches as numpy arrays, of this process's rows only, read ahead by threads."""
        iterator = iter(self.dataset(start_step))
        try:
            yield from iterator
        finally:
            iterator.close()

    def dataset(self, start_step: int) -> grain.IterDataset[Batch]:
        """The grain dataset of those batches."""
        return grain.MapDataset.range(start_step, sys.maxsize).map(self._read).to_iter_dataset(_READ_OPTIONS)

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint records so that training goes on at `step` with the same order; plain JSON values.

        `window` counts the windows of this order that the steps before have taken.
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
        """Go on from a recorded position: with the next window where the order is the same, else from its beginning.

        The order is that of (data id, seed, sequence length); the batch size may be another.
        """
        step, expected = position["step"], self.position(0)
        same_order = all(position[name] == expected[name] for name in ("data_id", "seed", "sequence_length"))
        self._origin = (step, position.get("window", step * position["global_batch_size"]) if same_order else 0)

    def _first_window(self, step: int) -> int:
        origin_step, origin_window = self._origin
        return origin_window + (step - origin_step) * self._shape[0]

    @property
    def directory(self) -> Path:
        """Where the data lie."""
        return self._split.directory

    def whole_batch(self, step: int) -> tuple[np.ndarray, Batch]:
        """The numbers of a step's windows, and the rows of all processes, as numpy arrays read anew."""
        windows = self._windows(step, np.arange(self._shape[0]))
        return windows, read_batch(self._split, windows, self._shape[1])

    def _windows(self, step: int, rows: np.ndarray) -> np.ndarray:
        return np.array([self._order[self._first_window(step) + int(row)] for row in rows])

    def _read(self, step: int) -> Batch:
        return read_batch(self._split, self._windows(step, self._rows), self._shape[1])


def validation_batches(
    split: Split, *, sequence_length: int, batch_size: int, sharding: jax.sharding.Sharding
) -> Iterator[Batch]:
    """The whole split once, in stored order, as global jax arrays; each target is unmasked in one batch at most.

    The last window and the last batch are padded with the mask False. Raises InputError like TrainLoader.
    """
    if split.num_tokens < 2:
        raise InputError(f"the {split.name} split has {split.num_tokens} tokens; bring more text")
    shape = (batch_size, sequence_length)
    rows = _local_rows(sharding, shape)
    starts = range(0, count_windows(split, sequence_length, partial=True), batch_size)
    return _on_device((read_batch(split, start + rows, sequence_length) for start in starts), rows, shape, sharding)


def _local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> np.ndarray:
    """The rows of a [B, T] array that this process's devices hold, sorted."""
    try:
        indices = sharding.addressable_devices_indices_map(shape).values()
    except ValueError as error:
        raise InputError(
            f"a batch of {shape[0]} sequences of {shape[1]} tokens cannot be divided by the mesh ({sharding}); "
            "change training.global_batch_size, training.evaluation_batch_size or mesh"
        ) from error
    rows = {row for index in indices if index is not None for row in range(*index[0].indices(shape[0]))}
    return np.array(sorted(rows))


def _on_device(
    batches: Iterable[Batch], rows: np.ndarray, shape: tuple[int, int], sharding: jax.sharding.Sharding
) -> Iterator[Batch]:
    """Global arrays made of this process's rows, a few batches ahead, so that transfers overlap with compute."""

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
