"""`Slot`: what the host keeps of a slot of the engine, and its row in the arrays of a program."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from nextllm_jax.inference.decode import Rows
from nextllm_jax.inference.request import MAX_STOP_IDS, Constraint, Request
from nextllm_jax.inference.sampling import Penalties, Settings

IDLE = Rows(
    slot_B=np.int32(0),
    token_B=np.int32(0),
    position_B=np.int32(0),
    done_B=np.bool_(True),
    remaining_B=np.int32(0),
    min_left_B=np.int32(0),
    stop_ids_BK=np.full(MAX_STOP_IDS, -1, np.int32),
    seed_B=np.uint32(0),
    sample_B=np.int32(0),
    dropped_B=np.int32(0),
    adjusts_B=np.bool_(False),
    logprobs_B=np.bool_(False),
    constrained_B=np.bool_(False),
    settings=Settings(np.float32(0), np.int32(1), np.float32(1), np.float32(0)),
    penalties=Penalties(np.float32(1), np.float32(0), np.float32(0)),
)
"""The row of a slot without a request, without the axis B."""


def stacked(rows: Sequence[Rows]) -> Rows:
    """Rows without the axis B, stacked along it, with the dtypes of IDLE."""
    return jax.tree.map(lambda idle, *values: np.asarray(values, idle.dtype), IDLE, *rows)


@dataclasses.dataclass
class Slot:
    """A slot on the host."""

    request: Request | None = None
    """None: the slot is free."""
    constraint: Constraint | None = None
    """What the next tokens of the request may be; None: any."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    """The tokens of the row from position 0 on. All but the last are cached before it is decoded."""
    prompt: list[int] = dataclasses.field(default_factory=list)
    """The tokens of the request that were kept when it began."""
    new_tokens: list[int] = dataclasses.field(default_factory=list)
    dropped: int = 0
    """Number of tokens before position 0, with `slide`."""
    cached: list[int] = dataclasses.field(default_factory=list)
    """The tokens whose keys and values are in the cache."""
    written: int = 0
    """Upper bound on the positions written to the cache since position 0 was last written; all are less than this."""
    placed: bool = False
    """Whether the cache and the settings on the devices are those of the request."""
    used: int = 0
    """When the slot was last used, counted in calls."""

    @property
    def missing(self) -> list[int]:
        """The tokens to read before the row can be decoded."""
        return self.tokens[len(self.cached) : -1]

    @property
    def reads(self) -> bool:
        """Whether it has a request whose prompt is not read yet."""
        return self.request is not None and not self.decodes

    @property
    def decodes(self) -> bool:
        """Whether it has a request whose prompt is read."""
        return self.request is not None and self.placed and not self.missing

    def remaining(self, context_length: int) -> int:
        """Number of tokens that the row may get before it ends or slides."""
        assert self.request is not None
        room = context_length - len(self.tokens) + 1
        return min(self.request.max_new_tokens - len(self.new_tokens), room)

    def slide(self, context_length: int) -> None:
        """Keep only the last tokens if they exceed the context. They are then read again, from position 0 on."""
        if len(self.tokens) > context_length:
            keep = max(context_length // 2, 1)
            self.dropped += len(self.tokens) - keep
            self.tokens, self.placed = self.tokens[-keep:], False

    def adjustments(self, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of `State.counts_NV` and `State.bias_NV`, [V] each."""
        counts_V = 2 * np.bincount(np.asarray(self.new_tokens, np.int64), minlength=vocab_size).astype(np.int32)
        counts_V[self.prompt] += 1
        bias_V = np.zeros(vocab_size, np.float32)
        for token, bias in self.request.sampling.biases.items() if self.request else ():
            bias_V[token] = bias
        return counts_V, bias_V

    def allowed(self, num_words: int) -> np.ndarray:
        """The tokens that a constrained row may get, as bits, uint32 [num_words]; neither banned nor too early."""
        assert self.request is not None
        assert self.constraint is not None
        sampling = self.request.sampling
        banned = [token for token, bias in sampling.biases.items() if bias == -math.inf]
        if len(self.new_tokens) < sampling.min_new_tokens:
            banned += self.request.stop_ids
        allowed_W = np.zeros(num_words, np.uint32)
        self.constraint.fill(allowed_W)
        for token in banned:
            allowed_W[token // 32] &= ~np.uint32(1 << token % 32)
        return allowed_W

    def row(self, context_length: int) -> Rows:
        """The row of the slot's request, without the axis B; `slot_B` is not set."""
        request = self.request
        assert request is not None
        sampling = request.sampling
        return Rows(
            slot_B=0,
            token_B=self.tokens[-1],
            position_B=len(self.tokens) - 1,
            done_B=False,
            remaining_B=self.remaining(context_length),
            min_left_B=sampling.min_new_tokens - len(self.new_tokens),
            stop_ids_BK=[*request.stop_ids, *[-1] * (MAX_STOP_IDS - len(request.stop_ids))],
            seed_B=request.seed,
            sample_B=request.sample,
            dropped_B=self.dropped,
            adjusts_B=sampling.adjusts_logits,
            logprobs_B=request.top_logprobs is not None,
            constrained_B=self.constraint is not None,
            settings=Settings(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p),
            penalties=Penalties(sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty),
        )
