"""From which source each training window comes.

In a cycle of sum(weights) windows, each source has as many windows as its weight says. The order within the cycle is
an earliest-deadline schedule: the window number j of a source with share w (j from 0) may not come before position
floor(j / w), and not after position ceil((j + 1) / w) - 1. Such a schedule always exists, and the earliest deadline
first finds it (Baruah et al., Proportionate progress, 1996). So after any number n of windows, each source has
contributed more than n * w - 1 and fewer than n * w + 1.
"""

import bisect
import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from nextllm_jax.config.mixture import reduced
from nextllm_jax.data.shards import Dataset


class Source(NamedTuple):
    """A source of training and validation data that is open."""

    dataset: Dataset
    name: str = ""
    """A short name, unique in the mixture; empty if it is the only source."""
    weight: int = 1
    epochs: Fraction | None = None
    """Epochs after which no more training windows are drawn from it; None: no limit."""


def data_id(sources: Sequence[Source]) -> str:
    """The id of the data of all sources, without their weights."""
    ids = [source.dataset.data_id for source in sources]
    return ids[0] if len(ids) == 1 else hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


class _Phase(NamedTuple):
    """Windows between two exhaustions, in which the sources alternate in one cycle."""

    start: int
    """Its first window."""
    counts: np.ndarray
    """The windows of each source before `start`."""
    cycle: np.ndarray
    """The source at each position of the cycle."""
    ranks: np.ndarray
    """How many earlier positions of the cycle have the same source."""
    per_cycle: np.ndarray
    """The windows of each source in a cycle."""

    def counts_at(self, window: int) -> np.ndarray:
        """The windows of each source before `window`, which is in this phase or ends it."""
        rounds, rest = divmod(window - self.start, len(self.cycle))
        return self.counts + rounds * self.per_cycle + np.bincount(self.cycle[:rest], minlength=len(self.counts))

    def position_of(self, source: int, number: int) -> int:
        """The window that is the given one, counted from 0 in this phase, of a source."""
        places = np.flatnonzero(self.cycle == source)
        rounds, rest = divmod(number, len(places))
        return self.start + rounds * len(self.cycle) + int(places[rest])


class Mixture:
    """The source of each window of an endless sequence, and the window's number in that source.

    `limits` are the windows after which each source is exhausted; None: never. The weight of an exhausted source is
    distributed over the others in proportion to their weights.
    """

    def __init__(self, weights: Sequence[int], limits: Sequence[int | None]):
        self.ends: list[tuple[int, int]] = []
        """(source, window) for each source that is exhausted: from that window on, it gives none."""
        self.length: int | None = None
        """The number of windows until all sources are exhausted; None if one has no limit."""
        self._num_sources = len(weights)
        self._phases: list[_Phase] = []
        start, counts = 0, np.zeros(len(weights), np.int64)
        left = list(range(len(weights)))
        for source, limit in enumerate(limits):
            if limit == 0:
                self.ends.append((source, 0))
                left.remove(source)
        while left:
            cycle = np.array(left)[_cycle(reduced([weights[source] for source in left]))]
            per_cycle = np.bincount(cycle, minlength=len(weights))
            ranks = np.zeros(len(cycle), np.int64)
            for source in left:
                ranks[cycle == source] = np.arange(per_cycle[source])
            phase = _Phase(start, counts, cycle, ranks, per_cycle)
            self._phases.append(phase)
            limited = [(limit, source) for source in left if (limit := limits[source]) is not None]
            if not limited:
                return
            start, ended = min((phase.position_of(i, limit - int(counts[i]) - 1) + 1, i) for limit, i in limited)
            counts = phase.counts_at(start)
            self.ends.append((ended, start))
            left.remove(ended)
        self.length = start

    def locate(self, window: int) -> tuple[int, int]:
        """The source of a window, and the window's number in that source."""
        phase = self._phase(window)
        rounds, rest = divmod(window - phase.start, len(phase.cycle))
        source = int(phase.cycle[rest])
        return source, int(phase.counts[source] + rounds * phase.per_cycle[source] + phase.ranks[rest])

    def counts(self, window: int) -> list[int]:
        """How many of the windows before `window` come from each source."""
        window = window if self.length is None else min(window, self.length)
        if window == 0:
            return [0] * self._num_sources
        return self._phase(window).counts_at(window).tolist()

    def _phase(self, window: int) -> _Phase:
        return self._phases[bisect.bisect_right(self._phases, window, key=lambda phase: phase.start) - 1]


def _cycle(weights: Sequence[int]) -> np.ndarray:
    """The source at each position of a cycle of sum(weights) positions."""
    length, counts, order = sum(weights), [0] * len(weights), []
    for position in range(length):
        released = [i for i, weight in enumerate(weights) if counts[i] * length < (position + 1) * weight]
        source = min(released, key=lambda i: -(-(counts[i] + 1) * length // weights[i]))
        counts[source] += 1
        order.append(source)
    return np.array(order)
