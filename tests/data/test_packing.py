"""Windows against a plain loop over documents."""

import contextlib
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextllm_jax.data.packing import num_windows, read_batch
from nextllm_jax.model.objective import Batch


class MemorySplit(types.SimpleNamespace):
    """A split held in memory, of conversations if it says what of them is in_loss."""

    name = "train"
    __hash__ = object.__hash__

    @property
    def holds_conversations(self):
        return self.mask is not None

    @property
    def num_documents(self):
        return len(self.document_starts) - 1

    def fetching(self, ranges):
        return contextlib.nullcontext()

    def tokens(self, start, stop):
        return self.stream[start:stop]

    def loss_mask(self, start, stop):
        return np.ones(stop - start, bool) if self.mask is None else self.mask[start:stop]


def make_split(lengths, in_loss=None) -> Any:
    stream = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    starts = np.cumsum([0, *lengths])
    return MemorySplit(stream=stream, num_tokens=len(stream), document_starts=starts, mask=in_loss)


def expected_rows(lengths, sequence_length):
    """Rows of (token, target, segment, position, mask), written out token by token."""
    owners = [number for number, length in enumerate(lengths) for _ in range(length)]
    rows = []
    for start in range(0, max(len(owners) - 1, 0), sequence_length):
        row, segment, position = [], 1, 0
        for i in range(start, start + sequence_length):
            if i + 1 >= len(owners):
                row.append((0, 0, 0, 0, False))
                continue
            if i > start and owners[i] != owners[i - 1]:
                segment, position = segment + 1, 0
            row.append((i + 1, i + 2, segment, position, owners[i] == owners[i + 1]))
            position += 1
        rows.append(row)
    return rows


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 9))
def test_windows_equal_a_plain_loop(lengths, sequence_length):
    split = make_split(lengths)
    rows = expected_rows(lengths, sequence_length)
    assert num_windows(split.num_tokens, sequence_length, partial=True) == len(rows)
    batch = read_batch(split, np.arange(len(rows)), sequence_length)
    for row, expected in enumerate(rows):
        assert list(zip(*(array[row].tolist() for array in batch), strict=True)) == expected
    whole = sum(all(segment for _, _, segment, _, _ in row) for row in rows)
    assert num_windows(split.num_tokens, sequence_length, partial=False) == whole


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 9))
def test_each_token_that_continues_a_document_is_scored_once(lengths, sequence_length):
    split = make_split(lengths)
    windows = num_windows(split.num_tokens, sequence_length, partial=True)
    batch = read_batch(split, np.arange(windows), sequence_length)
    scored = sorted(batch.targets_BT[batch.loss_mask_BT].tolist())
    firsts = set((split.document_starts[:-1] + 1).tolist())
    assert scored == [token for token in split.stream.tolist() if token not in firsts]


def test_types_and_rows_beyond_the_end():
    batch = read_batch(make_split([7, 4]), np.array([2, 9, 0]), 4)
    assert isinstance(batch, Batch)
    assert [array.dtype for array in batch] == [np.int32] * 4 + [np.bool_]
    assert all(array.shape == (3, 4) for array in batch)
    assert not any(array[1].any() for array in batch)
    assert batch.segment_ids_BT[0].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(("tokens", "whole", "partial"), [(0, 0, 0), (1, 0, 0), (4, 0, 1), (5, 1, 1), (6, 1, 2)])
def test_window_counts(tokens, whole, partial):
    assert num_windows(tokens, 4, partial=False) == whole
    assert num_windows(tokens, 4, partial=True) == partial
