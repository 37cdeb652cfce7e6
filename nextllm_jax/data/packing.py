"""Fixed windows of a token stream, and where documents begin in them."""

from typing import Any, NamedTuple

import numpy as np

from nextllm_jax.data.shards import Split


class Batch(NamedTuple):
    """Windows of T tokens and the tokens that follow each; int32, and bool for the mask.

    `segment_ids_BT` number the documents of a window from 1 (0: padding), `positions_BT` restart at each
    document, and `loss_mask_BT` is False where the target opens another document, and on padding.
    """

    tokens_BT: Any
    targets_BT: Any
    segment_ids_BT: Any
    positions_BT: Any
    loss_mask_BT: Any


def num_windows(num_tokens: int, sequence_length: int, *, partial: bool) -> int:
    """Windows in a stream: T + 1 tokens at stride T, so that each token but the first is a target once.

    `partial` counts the last, shorter window too.
    """
    targets = max(num_tokens - 1, 0)
    return -(-targets // sequence_length) if partial else targets // sequence_length


def read_batch(split: Split, windows: np.ndarray, sequence_length: int) -> Batch:
    """The given windows of the split, one a row; past its end rows are padding."""
    shape = (len(windows), sequence_length)
    tokens, targets, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(4))
    batch = Batch(tokens, targets, segment_ids, positions, np.zeros(shape, np.bool_))
    for row, window in enumerate(windows):
        _fill_row(batch, row, split, int(window) * sequence_length, sequence_length)
    return batch


def _fill_row(batch: Batch, row: int, split: Split, start: int, sequence_length: int) -> None:
    stop = min(start + sequence_length + 1, split.num_tokens)
    length = stop - start - 1
    if length < 1:
        return
    tokens = split.tokens(start, stop)
    offsets = np.arange(start, stop)
    # The first document of the stream is number 1.
    documents = np.searchsorted(split.document_starts, offsets, side="right")
    first_offsets = np.maximum(split.document_starts[documents - 1], start)
    batch.tokens_BT[row, :length] = tokens[:-1]
    batch.targets_BT[row, :length] = tokens[1:]
    batch.segment_ids_BT[row, :length] = (documents - documents[0] + 1)[:-1]
    batch.positions_BT[row, :length] = (offsets - first_offsets)[:-1]
    batch.loss_mask_BT[row, :length] = documents[1:] == documents[:-1]
