"""A request to continue tokens, and what the engine returns for it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from nextllm_jax.config import SamplingConfig
from nextllm_jax.config.checks import require, require_integer, require_seed
from nextllm_jax.config.sampling import require_top_logprobs

FinishReason = Literal["stop", "length"]

MAX_STOP_IDS = 16


class Constraint(Protocol):
    """Which tokens a text may continue with, such as those of a grammar; one for each text."""

    def fill(self, allowed_W: np.ndarray) -> None:
        """Set the bits of the tokens that may follow, uint32 [ceil(V / 32)], the lowest bit first."""

    def accept(self, token: int) -> None:
        """Continue the text with a token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Tokens to continue. The random key of a new token is a function of `seed`, `sample` and its position.

    Raises InputError for a setting that is out of range.
    """

    tokens: Sequence[int]
    """The prompt, at least one id."""
    max_new_tokens: int
    sampling: SamplingConfig
    seed: int = 0
    """From 0 to 2^32 - 1."""
    sample: int = 0
    """Index among the samples of the prompt."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end the text, at most MAX_STOP_IDS."""
    top_logprobs: int | None = None
    """Return the log probability of each new token, and of this many most likely tokens; None: no log probabilities."""
    constraint: Callable[[], Constraint] | None = None
    """Creates what restricts the new tokens; None: any token may follow."""
    slide: bool = False
    """Continue beyond the context C: whenever the tokens exceed C, only the last C // 2 are kept and read again."""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("a prompt must have at least one token")
        require_integer("max_new_tokens", self.max_new_tokens)
        require_seed(self.seed)
        require(
            len(self.stop_ids) <= MAX_STOP_IDS, f"there are {len(self.stop_ids)} stop ids; at most {MAX_STOP_IDS} fit"
        )
        require_top_logprobs(self.top_logprobs)

    def finish_reason(self, new_tokens: Sequence[int]) -> FinishReason | None:
        """Why the request ends, given all of its new tokens so far; None if it goes on."""
        if not new_tokens:
            return None
        if new_tokens[-1] in self.stop_ids:
            return "stop"
        return "length" if len(new_tokens) >= self.max_new_tokens else None


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """The log probability of a new token, and of the most likely tokens at its position.

    They are those of the model's logits, before temperature, penalties, biases and truncation.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(id, log probability), the most likely first."""


def token_logprobs(
    tokens: Sequence[int], K: int, logprob_T: np.ndarray, top_logprob_TK: np.ndarray, top_id_TK: np.ndarray
) -> list[TokenLogprob]:
    """The log probabilities of T or fewer tokens, each with those of the first K of the most likely ones."""
    tops = [zip(top_id_TK[i, :K].tolist(), top_logprob_TK[i, :K].tolist(), strict=True) for i in range(len(tokens))]
    return [TokenLogprob(int(token), float(logprob_T[i]), tuple(tops[i])) for i, token in enumerate(tokens)]


@dataclasses.dataclass(frozen=True)
class NextToken:
    """A token that may follow a prompt."""

    id: int
    text: str
    """Its text; bytes that are not a whole character appear as U+FFFD."""
    probability: float


@dataclasses.dataclass(frozen=True)
class Output:
    """New tokens of a request."""

    tokens: list[int]
    finish_reason: FinishReason | None
    """None: more tokens follow. stop: the last token is one of the stop_ids. length: max_new_tokens are reached, or no
    token is allowed to follow."""
    logprobs: list[TokenLogprob]
    """One for each token if the request asks for them, otherwise empty."""
    accepted: int | None = None
    """Number of the tokens that were drafted; None without drafts."""
