"""How the weights of a deployed model are quantized. Importing this module does not import jax."""

import dataclasses
from typing import Any, Literal

from nextllm_jax.config.checks import check_types, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """Matrices are stored as small integers with scales; norms and biases are not quantized."""

    scheme: Literal["int8", "int4"]
    """8 or 4 bits per weight."""
    group_size: int | None = None
    """Consecutive inputs of a matrix that share a scale, at most the inputs from one head; none: 32 for int4, one scale
    per output for int8. A group size of 32 keeps the blocks of GGUF files bit for bit: Q8_0 as int8, Q4_0 and Q4_1 as
    int4."""
    symmetric: bool = False
    """Store int4 groups without a minimum: half a bit less per weight, but less exact. int8 never has a minimum."""
    embeddings: bool = False
    """Quantize the embedding and the head too."""

    def __post_init__(self) -> None:
        check_types(self, "")
        size = self.group_size
        require(size is None or (size > 0 and size % 2 == 0), f"group_size is {size}; it must be positive and even")
        require(
            self.scheme == "int4" or not self.symmetric,
            "symmetric applies to int4 only, since int8 is always symmetric; leave --symmetric out",
        )

    @property
    def inputs_per_scale(self) -> int | None:
        """The group size; None: all inputs of an output share a scale."""
        return 32 if self.group_size is None and self.scheme == "int4" else self.group_size

    @property
    def kinds(self) -> tuple[Literal["matrix", "embedding"], ...]:
        """The kinds of weights that are quantized."""
        return ("matrix", "embedding") if self.embeddings else ("matrix",)

    def __str__(self) -> str:
        """A description such as "int4 in groups of 32, asymmetric"."""
        if self.inputs_per_scale is None:
            return f"{self.scheme} by output channel"
        kind = {"int8": "", "int4": ", symmetric" if self.symmetric else ", asymmetric"}[self.scheme]
        return f"{self.scheme} in groups of {self.inputs_per_scale}{kind}"

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `Quantization(**values)` reads."""
        return dataclasses.asdict(self)
