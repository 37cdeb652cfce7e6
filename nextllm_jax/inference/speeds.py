"""`Speeds`: the throughput of an engine."""

import dataclasses
import operator


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Tokens and seconds of prefill and decode, excluding compilation."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second, summed over rows. Padding, cached tokens and the last of a prompt do not count."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second, summed over rows."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def __add__(self, other: "Speeds") -> "Speeds":
        return Speeds(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __sub__(self, other: "Speeds") -> "Speeds":
        return Speeds(*map(operator.sub, dataclasses.astuple(self), dataclasses.astuple(other)))
