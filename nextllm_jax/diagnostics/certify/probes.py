"""The token sequences on which models are compared."""

import math
from typing import NamedTuple

import numpy as np

from nextllm_jax.config import ModelConfig

KEPT = 32
"""Number of last positions whose logits are compared."""
LONGEST = 640
"""Default length of the longest probe."""
_SHORT, _LONG = 64, 192
_BEYOND = 32
"""Positions by which the longer probe exceeds the original context or the window."""


class Probe(NamedTuple):
    """Token ids and their positions."""

    tokens: list[int]
    positions: list[int]

    @property
    def is_plain(self) -> bool:
        """Whether the positions are 0, 1, 2, ..."""
        return self.positions == [*range(len(self.tokens))]

    @property
    def prompt(self) -> list[int]:
        """The tokens without those that another program may choose instead."""
        return self.tokens[: 1 - KEPT]

    def continued(self, tokens: list[int]) -> "Probe":
        """The probe with these tokens, KEPT - 1 of them, after the prompt."""
        return Probe([*self.prompt, *tokens], self.positions)

    def __str__(self) -> str:
        return f"{len(self.tokens)} tokens" + ("" if self.is_plain else f" up to position {self.positions[-1]:,}")


def scaled_beyond(config: ModelConfig) -> int | None:
    """The number of positions from which the scaling of RoPE matters; None if it is not scaled."""
    if config.rope_scaling == "none":
        return None
    if config.rope_scaling == "linear":
        return max(1, int(config.context_length / config.rope_scaling_factor))
    return config.rope_original_context_length


def make_probes(config: ModelConfig, rows: int, longest: int = LONGEST) -> list[Probe]:
    """A short probe of random ids below `rows`, and a longer one, as far as the context of the model permits.

    The longer probe reaches beyond the original context if RoPE is scaled, and beyond the window of local layers. If
    that takes more than `longest` tokens, its positions have gaps instead.
    """
    context, beyond = config.context_length, scaled_beyond(config)
    wanted = _LONG if beyond is None else beyond + _BEYOND
    if "local" in config.layer_pattern and config.sliding_window + _BEYOND <= longest:
        wanted = max(wanted, config.sliding_window + _BEYOND)
    last = min(wanted, context)
    short = min(_SHORT, context, _SHORT if beyond is None else max(beyond, KEPT + 8))
    lengths = {short: short, min(last, longest): last}
    rng = np.random.default_rng(0)
    probes = []
    for length, end in sorted(lengths.items()):
        positions = range(length) if end == length else (math.floor(x) for x in np.linspace(0, end - 1, length))
        probes.append(Probe(rng.integers(0, rows, length).tolist(), [*positions]))
    return probes
