"""Packs the token stream of a split into windows, with the start of each document.

Text is split into windows at fixed offsets. Conversations are kept whole: one that does not fit into the rest of a
window goes to the next window, and the rest is padding. Only a conversation longer than a window is split.
"""

import functools
import itertools

import numpy as np

from nextllm_jax.data.shards import Split
from nextllm_jax.model.objective import Batch

_SCAN_TOKENS = 1 << 24


def num_windows(num_tokens: int, sequence_length: int, *, partial: bool) -> int:
    """Number of windows in a stream: T + 1 tokens at stride T, so each token except the first is a target once.

    With `partial`, a shorter last window counts too.
    """
    targets = max(num_tokens - 1, 0)
    return -(-targets // sequence_length) if partial else targets // sequence_length


def count_windows(split: Split, sequence_length: int, *, partial: bool) -> int:
    """Number of windows of a split. With `partial`, a shorter last window of text counts too."""
    if split.holds_conversations:
        return len(_conversation_windows(split, sequence_length))
    return num_windows(split.num_tokens, sequence_length, partial=partial)


def describe_windows(split: Split, sequence_length: int) -> str | None:
    """How full the windows of conversations are, and how many conversations are too long for one; None for text."""
    if not split.holds_conversations:
        return None
    windows, lengths = _conversation_windows(split, sequence_length), np.diff(split.document_starts)
    filled = split.num_tokens / (max(len(windows), 1) * (sequence_length + 1))
    return (
        f"{split.num_documents:,} {split.name} conversations in {len(windows):,} windows, {filled:.0%} full; "
        f"{int((lengths > sequence_length + 1).sum()):,} are longer than data.sequence_length and are split"
    )


def has_targets(split: Split) -> bool:
    """Whether a split has a token in the loss mask.

    The first token of a document is never in it; in conversations only the assistant's tokens are.
    """
    for start in range(0, split.num_tokens, _SCAN_TOKENS):
        stop = min(start + _SCAN_TOKENS, split.num_tokens)
        in_loss = split.loss_mask(start, stop)
        first, last = np.searchsorted(split.document_starts, [start, stop])
        in_loss[split.document_starts[first:last] - start] = False
        if in_loss.any():
            return True
    return False


@functools.lru_cache(8)
def _conversation_windows(split: Split, sequence_length: int) -> np.ndarray:
    """Start and end of each window in the stream, int64 [W, 2]: as many whole conversations as fit, in order.

    A conversation of more than T + 1 tokens is split into pieces of T + 1 at stride T, so each token is a target once.
    """
    windows: list[tuple[int, int]] = []
    start, longest = 0, sequence_length + 1
    for begin, end in itertools.pairwise(split.document_starts.tolist()):
        if end - start > longest and begin > start:
            windows.append((start, begin))
            start = begin
        while end - start > longest:
            windows.append((start, start + longest))
            start += sequence_length
    return np.array([*windows, (start, split.num_tokens)], np.int64)


def _bounds(split: Split, window: int, sequence_length: int) -> tuple[int, int]:
    """(start, stop) of a window in the stream, where stop - 1 is its last target; an empty range past the end."""
    if split.holds_conversations:
        windows = _conversation_windows(split, sequence_length)
        return tuple(windows[window].tolist()) if window < len(windows) else (0, 0)
    start = window * sequence_length
    return start, min(start + sequence_length + 1, split.num_tokens)


def read_batch(split: Split, windows: np.ndarray, sequence_length: int) -> Batch:
    """The batch with the given windows of the split, one per row. Rows past the end of the split are padding."""
    shape = (len(windows), sequence_length)
    tokens, targets, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(4))
    batch = Batch(tokens, targets, segment_ids, positions, np.zeros(shape, np.bool_))
    bounds = [_bounds(split, int(window), sequence_length) for window in windows]
    bounds = [(start, stop) if stop - start > 1 else (0, 0) for start, stop in bounds]
    with split.fetching(bounds):
        for row, (start, stop) in enumerate(bounds):
            _fill_row(batch, row, split, start, stop)
    return batch


def _fill_row(batch: Batch, row: int, split: Split, start: int, stop: int) -> None:
    length = stop - start - 1
    if length < 1:
        return
    tokens = split.tokens(start, stop)
    offsets = np.arange(start, stop)
    # Numbered from 1 at the start of the stream.
    documents = np.searchsorted(split.document_starts, offsets, side="right")
    first_offsets = np.maximum(split.document_starts[documents - 1], start)
    batch.tokens_BT[row, :length] = tokens[:-1]
    batch.targets_BT[row, :length] = tokens[1:]
    batch.segment_ids_BT[row, :length] = (documents - documents[0] + 1)[:-1]
    batch.positions_BT[row, :length] = (offsets - first_offsets)[:-1]
    batch.loss_mask_BT[row, :length] = (documents[1:] == documents[:-1]) & split.loss_mask(start + 1, stop)
