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
    embeddings: Literal["none", "int8", "int4"] = "none"
    """Quantize the embedding and the head too, with the same group size. int8 rounds them far less than int4."""

    def __post_init__(self) -> None:
        check_types(self, "")
        size = self.group_size
        require(size is None or (size > 0 and size % 2 == 0), f"group_size is {size}; it must be positive and even")
        require(
            "int4" in (self.scheme, self.embeddings) or not self.symmetric,
            "symmetric applies to int4 only, since int8 is always symmetric; leave --symmetric out",
        )

    @property
    def inputs_per_scale(self) -> int | None:
        """The group size; None: all inputs of an output share a scale."""
        return 32 if self.group_size is None and self.scheme == "int4" else self.group_size

    def of_kind(self, kind: str) -> "Quantization | None":
        """How weights of a kind, such as "embedding", are quantized: its `scheme` is theirs. None: they are not."""
        schemes: dict[str, Literal["none", "int8", "int4"]] = {"matrix": self.scheme, "embedding": self.embeddings}
        scheme = schemes.get(kind, "none")
        if scheme == "none":
            return None
        return Quantization(scheme=scheme, group_size=self.group_size, symmetric=self.symmetric and scheme == "int4")

    @property
    def by_channel(self) -> "Quantization":
        """int8 by output channel, for the same kinds of weights."""
        return Quantization(scheme="int8", embeddings="none" if self.embeddings == "none" else "int8")

    def __str__(self) -> str:
        """A description such as "int4 in groups of 32, asymmetric; embeddings int8 by output channel"."""
        text: str = self.scheme
        if self.inputs_per_scale is None:
            text += " by output channel"
        else:
            text += f" in groups of {self.inputs_per_scale}"
            text += {"int8": "", "int4": ", symmetric" if self.symmetric else ", asymmetric"}[self.scheme]
        embeddings = self.of_kind("embedding")
        return text if embeddings is None else f"{text}; embeddings {embeddings}"

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return dataclasses.asdict(self)

    @staticmethod
    def upgraded(values: dict[str, Any]) -> dict[str, Any]:
        """The JSON object in today's form. Earlier, `embeddings` said whether they have the scheme of the matrices."""
        if not isinstance(values.get("embeddings"), bool):
            return values
        return values | {"embeddings": values.get("scheme") if values["embeddings"] else "none"}
