"""Batches, training objectives, and log probabilities of tokens."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nextllm_jax.model.layer_norms import mean_squares
from nextllm_jax.model.lora import Frozen, variables, weights
from nextllm_jax.model.moe import RouterSums
from nextllm_jax.model.router_losses import router_loss, router_sums
from nextllm_jax.model.transformer import Transformer, head_embedding
from nextllm_jax.ops.cross_entropy import Layout, cross_entropy
from nextllm_jax.ops.quantized import dequantize
from nextllm_jax.sharding import RULES

_LOSS_LAYOUT = Layout(RULES["batch"], RULES["seq"], RULES["vocab"], RULES["embed"])
"""Sharding of hidden states and head."""

LOGITS_AT_ONCE = 1 << 26
"""Upper limit on the logits that scoring tokens holds at once."""


class Batch(NamedTuple):
    """Windows of T tokens and the tokens that follow each; int32, and bool for the mask.

    `segment_ids_BT` number the documents of a window from 1 (0: padding). `positions_BT` restart at each document.
    `loss_mask_BT` is False on padding, where the target belongs to the next document, and in conversations where the
    target is not part of an assistant's message.
    """

    tokens_BT: Any
    targets_BT: Any
    segment_ids_BT: Any
    positions_BT: Any
    loss_mask_BT: Any


class Metrics(NamedTuple):
    """What an objective measures in addition to its loss; each value is a sum over the rows of the batch."""

    nll: jax.Array
    """float32: negative log likelihood in nats of the tokens in the loss mask, without auxiliary terms."""
    mean_squares: jax.Array
    """float32 [M]: mean square of a row's residual stream, see `layer_norms.mean_squares`."""
    routing: RouterSums | None = None
    """What the routers recorded, see `router_losses.router_sums`; None for a model without experts."""


Objective = Callable[[Transformer, Any, Batch, Frozen | None], tuple[jax.Array, jax.Array, Metrics]]
"""`(model, params, batch, frozen) -> (summed loss, number of tokens in the loss mask, metrics)`.

`params` are the trained parameters: the model's or, with `frozen` base weights, their adapters. The summed loss
(float32) is differentiated. Reported losses come from `metrics.nll`.
"""


def next_token(
    model: Transformer, params: Any, batch: Batch, frozen: Frozen | None = None
) -> tuple[jax.Array, jax.Array, Metrics]:
    """The objective of language models: the negative log likelihood of each next token, plus the routers' losses."""
    hidden_BTD, recorded = _hidden(model, params, batch, frozen)
    head_VD = dequantize(head_embedding(model.config, weights(params, frozen)), model.dtype)
    with jax.named_scope("loss"):
        nll = cross_entropy(
            hidden_BTD,
            head_VD,
            batch.targets_BT,
            batch.loss_mask_BT,
            logit_divisor=model.config.logit_divisor,
            soft_cap=model.config.logit_soft_cap,
            layout=_LOSS_LAYOUT,
        )
    squares = len(batch.tokens_BT) * mean_squares(model.config, recorded)
    num_tokens = jnp.sum(batch.loss_mask_BT, dtype=jnp.int32)
    routing = router_sums(model.config, recorded)
    loss = nll if routing is None else nll + router_loss(model.config, routing, num_tokens)
    return loss, num_tokens, jax.lax.stop_gradient(Metrics(nll, squares, routing))


def _hidden(model: Transformer, params: Any, batch: Batch, frozen: Frozen | None) -> tuple[jax.Array, Any]:
    """Hidden states [B, T, D] after the final norm, and the intermediates that the model records."""
    (hidden_BTD, _), recorded = model.apply(
        variables(params, frozen), batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, mutable=["intermediates"]
    )
    return hidden_BTD, recorded["intermediates"]


def make_eval_step(objective: Objective, model: Transformer) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A jitted `(params, batch, frozen=None) -> (summed nll in nats, number of tokens in the loss mask)`."""

    def eval_step(params: Any, batch: Batch, frozen: Frozen | None = None) -> tuple[jax.Array, jax.Array]:
        _, num_tokens, metrics = objective(model, params, batch, frozen)
        return metrics.nll, num_tokens

    return jax.jit(eval_step)


def perplexity(nll: float) -> float:
    """exp(nll) of a mean negative log likelihood in nats; inf where that overflows."""
    return math.inf if nll >= 700 else math.exp(nll)


def token_scores(
    model: Transformer, params: Any, batch: Batch, frozen: Frozen | None = None, *, vocab_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """(log probability in nats, whether it is the argmax) of each target; float32 and bool, [B, T].

    The argmax is over the first `vocab_size` tokens; None: over all.
    """
    hidden_BTD, _ = _hidden(model, params, batch, frozen)
    whole = {"params": weights(params, frozen)}

    def score(column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_BD, targets_B = column
        logits_B1V: Any = model.apply(whole, hidden_BD[:, None], method="logits")
        logits_BV = logits_B1V[:, 0]
        logprobs_B = jnp.take_along_axis(logits_BV, targets_B[:, None], axis=1)[:, 0]
        greedy_B = jnp.argmax(logits_BV[:, :vocab_size], axis=1) == targets_B
        return logprobs_B - jax.nn.logsumexp(logits_BV, axis=1), greedy_B

    # The loop runs over time, since the rows are sharded.
    B, T = batch.targets_BT.shape
    at_once = max(1, min(T, LOGITS_AT_ONCE // (B * model.config.vocab_size)))
    columns = hidden_BTD.swapaxes(0, 1), batch.targets_BT.T
    logprobs_TB, greedy_TB = jax.lax.map(score, columns, batch_size=at_once)
    return logprobs_TB.T, greedy_TB.T


def text_batch(tokens_BS: np.ndarray) -> Batch:
    """A batch whose rows are one document each. T = S - 1; every token except the first is a target."""
    tokens_BT, targets_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    return Batch(tokens_BT, targets_BT, np.ones_like(tokens_BT), positions_BT, np.ones(tokens_BT.shape, bool))
