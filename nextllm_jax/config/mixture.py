"""The sources of `data.mixture`, parsed from strings such as `data/web:0.3` and `stdlib:0.7:2`."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from nextllm_jax.config.checks import require
from nextllm_jax.errors import InputError

MAX_CYCLE = 100_000
"""The maximum sum of the weights as integers: the number of windows after which the order of the sources repeats."""
_NUMBER = r"(\d+\.?\d*|\.\d+)"
_ENTRY = re.compile(rf"(?P<address>.+?):(?P<weight>{_NUMBER})(:(?P<epochs>{_NUMBER}))?")
_UNUSABLE = re.compile(r"(:[-+]?(nan|inf|[\d.]+(e[-+]?\d+)?))*$", re.IGNORECASE)
"""Numbers at the end of an entry that are no weight, such as :-1 and :1e-3."""


class MixtureSource(NamedTuple):
    """A source of a mixture as the config states it."""

    address: str
    """A prepared directory, or a corpus as in data.corpus."""
    name: str
    """A short name, unique in the mixture."""
    weight: int
    """The weights are proportional to those in the config, with greatest common divisor 1."""
    epochs: Fraction | None
    """Epochs after which no more is drawn from the source; None: no limit."""


def parse_mixture(entries: Sequence[str]) -> list[MixtureSource]:
    """The sources of a mixture. Raises InputError, which names the entry and the fix."""
    require(
        len(entries) > 1, f"data.mixture is only {entries[0]}; give at least two sources, or set data.path or corpus"
    )
    addresses: list[str] = []
    weights: list[Fraction] = []
    limits: list[Fraction | None] = []
    for entry in entries:
        found = _ENTRY.fullmatch(entry)
        if found is None:
            source = _UNUSABLE.sub("", entry, count=1)
            raise InputError(
                f"data.mixture {entry} has no weight, a positive decimal number; write {source}:0.3, or "
                f"{source}:0.3:2 for at most 2 epochs"
            )
        addresses.append(found["address"])
        weights.append(Fraction(found["weight"]))
        limits.append(Fraction(found["epochs"]) if found["epochs"] else None)
        require(weights[-1] > 0, f"data.mixture {entry} has weight 0; leave the source out")
        require(limits[-1] != 0, f"data.mixture {entry} has a limit of 0 epochs; leave the source out")
        require(addresses.count(addresses[-1]) == 1, f"data.mixture has {addresses[-1]} twice; add up the weights")
    scale = math.lcm(*(weight.denominator for weight in weights))
    integers = reduced([int(weight * scale) for weight in weights])
    require(
        sum(integers) <= MAX_CYCLE,
        f"the weights of data.mixture are {' : '.join(map(str, integers))}, which add up to {sum(integers):,}; round "
        f"them to fewer digits, for a sum of at most {MAX_CYCLE:,}",
    )
    return [MixtureSource(*each) for each in zip(addresses, short_names(addresses), integers, limits, strict=True)]


def reduced(weights: Sequence[int]) -> list[int]:
    """The weights, divided by their greatest common divisor."""
    divisor = math.gcd(*weights)
    return [weight // divisor for weight in weights]


def short_names(addresses: Sequence[str]) -> list[str]:
    """The last part of each address, with a number if an earlier one has the same."""
    names: list[str] = []
    for address in addresses:
        last = address.rstrip("/").removeprefix("hf:").rpartition("/")[2]
        name = plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", last).strip("_.") or "source"
        number = 2
        while name in names:
            name, number = f"{plain}-{number}", number + 1
        names.append(name)
    return names
