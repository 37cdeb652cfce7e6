"""How the next token is sampled. Importing this module does not import jax."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from nextllm_jax.config.checks import check_types, require

MAX_TOP_LOGPROBS = 20


def require_top_logprobs(count: int | None) -> None:
    """Raise InputError unless it is None, or a number of tokens whose log probabilities can be asked for."""
    require(
        count is None or 0 <= count <= MAX_TOP_LOGPROBS,
        f"top_logprobs is {count}; it must be in 0 to {MAX_TOP_LOGPROBS}",
    )


def bias_texts(biases: Mapping[Any, float]) -> tuple[str, ...]:
    """Biases by token id as `SamplingConfig.logit_bias` has them."""
    return tuple(f"{token}:{bias}" for token, bias in biases.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is sampled from the logits."""

    temperature: float = 0.8
    """The logits are divided by this; 0: take the most likely token."""
    top_k: int = 50
    """Keep only the k most likely tokens; 0: all."""
    top_p: float = 0.95
    """Keep only the smallest set of most likely tokens whose probabilities add up to this; 1: all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely token's probability; 0: none."""
    repetition_penalty: float = 1.0
    """For tokens that are already in the prompt or the text, positive logits are divided by this and negative ones are
    multiplied by it; 1: off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are already in the new text; 0: off."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token as many times as the new text has it; 0: off."""
    min_new_tokens: int = 0
    """Number of tokens before which no stop token is sampled. Stop strings end a text at any time."""
    logit_bias: tuple[str, ...] = ()
    """Numbers that are added to the logits of tokens, each as ID:BIAS, such as 198:-5. 198:-inf bans a token."""
    json_schema: str | None = None
    """The new text is JSON of this schema, which is itself JSON; {} is any JSON. None: no schema."""
    regex: str | None = None
    """The whole new text matches this regular expression. None: no such restriction."""
    grammar: str | None = None
    """The whole new text follows this grammar in the Lark syntax of llguidance. None: no grammar."""

    @property
    def is_constrained(self) -> bool:
        """Whether the new text must follow a schema, a regular expression or a grammar."""
        return (self.json_schema, self.regex, self.grammar) != (None, None, None)

    @property
    def adjusts_logits(self) -> bool:
        """Whether there are penalties or biases."""
        off = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty, self.logit_bias) == (1, 0, 0, ())
        return not off

    @functools.cached_property  # read for each token of a row with a grammar
    def biases(self) -> dict[int, float]:
        """`logit_bias` as numbers by token id."""
        return {int(token): float(bias) for token, bias in (text.split(":") for text in self.logit_bias)}

    def __post_init__(self) -> None:
        check_types(self, "")
        constraints = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        require(len(constraints) <= 1, f"there are {' and '.join(constraints)}; give only one of them")
        require(
            0 <= self.temperature < 1e30, f"temperature is {self.temperature}; it must be at least 0 and less than 1e30"
        )
        for name in ("top_k", "min_new_tokens"):
            value = getattr(self, name)
            require(0 <= value < 2**31, f"{name} is {value}; it must be in 0 to {2**31 - 1}")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be greater than 0 and at most 1")
        require(0 <= self.min_p <= 1, f"min_p is {self.min_p}; it must be between 0 and 1")
        penalty = self.repetition_penalty
        require(penalty > 0, f"repetition_penalty is {penalty}; it must be positive")
        require(1e-30 < penalty < 1e30, f"repetition_penalty is {penalty}; it must be between 1e-30 and 1e30")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(abs(value) < 1e30, f"{name} is {value}; it must be between -1e30 and 1e30")
        for text in self.logit_bias:
            require(_is_bias(text), f"logit_bias has {text!r:.80}; it must be ID:BIAS, such as 198:-5 or 198:-inf")


def _is_bias(text: str) -> bool:
    """Whether a text is a token id, a colon, and a number that float32 can hold or -inf."""
    token, _, bias = text.partition(":")
    try:
        return token.isdecimal() and int(token) < 2**31 and (abs(float(bias)) < 1e30 or float(bias) == -math.inf)
    except ValueError:
        return False
