"""Loss, perplexity and bits per byte on a whole, fixed data set."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from nextllm_jax.errors import InputError
from nextllm_jax.model.objective import Batch, perplexity


class Evaluation(NamedTuple):
    """The result on a data set. It does not depend on the batch size or the number of devices."""

    loss: float
    """Mean negative log likelihood per scored token, in nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """Summed negative log likelihood in bits, divided by the UTF-8 bytes of the text; None if there are none."""
    num_tokens: int
    """Scored tokens."""


def evaluate(
    eval_step: Callable[[Any, Batch], tuple[jax.Array, jax.Array]],
    params: Any,
    batches: Iterable[Batch],
    num_bytes: int,
) -> Evaluation:
    """The evaluation of `params` on all batches, whose text has `num_bytes` bytes. Sums in float64 on the host.

    Raises InputError if no token of the batches is in the loss mask.
    """
    results = [eval_step(params, batch) for batch in batches]
    nll = float(np.sum([np.asarray(nll, np.float64) for nll, _ in results]))
    num_tokens = int(np.sum([np.asarray(count) for _, count in results]))
    if not num_tokens:
        raise InputError("the evaluation data has no token in its loss mask; use other data")
    loss = nll / num_tokens
    bits_per_byte = nll / math.log(2) / num_bytes if num_bytes else None
    return Evaluation(loss, perplexity(loss), bits_per_byte, num_tokens)
