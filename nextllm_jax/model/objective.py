"""What is trained: batches, and the summed next-token loss of a model on them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nextllm_jax.model.lora import Frozen, variables, weights
from nextllm_jax.model.transformer import Transformer, head_embedding
from nextllm_jax.ops.cross_entropy import Layout, cross_entropy
from nextllm_jax.sharding import RULES

LOSS_LAYOUT = Layout(RULES["batch"], RULES["seq"], RULES["vocab"], RULES["embed"])
"""How hidden states and head lie on the mesh."""


class Batch(NamedTuple):
    """Windows of T tokens and the tokens that follow each; int32, and bool for the mask.

    `segment_ids_BT` number the documents of a window from 1 (0: padding), `positions_BT` restart at each
    document, and `loss_mask_BT` is False where the target opens another document, on padding, and in conversations
    where the target is not what the assistant says.
    """

    tokens_BT: Any
    targets_BT: Any
    segment_ids_BT: Any
    positions_BT: Any
    loss_mask_BT: Any


def nll_sum(model: Transformer, params: Any, batch: Batch, frozen: Frozen | None = None) -> jax.Array:
    """float32 scalar: negative log likelihood in nats, summed over the batch's loss-bearing tokens.

    Here and below `params` are adapters if there are `frozen` weights.
    """
    hidden_BTD, _ = model.apply(variables(params, frozen), batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
    return head_nll(model, weights(params, frozen), hidden_BTD, batch)


def head_nll(model: Transformer, params: Any, hidden_BTD: jax.Array, batch: Batch) -> jax.Array:
    """float32 scalar: `nll_sum` of the hidden states that the model gives for the batch; `params` are whole weights."""
    head_VD = head_embedding(model.config, params).astype(model.dtype)
    with jax.named_scope("loss"):
        return cross_entropy(
            hidden_BTD,
            head_VD,
            batch.targets_BT,
            batch.loss_mask_BT,
            logit_divisor=model.config.logit_divisor,
            soft_cap=model.config.logit_soft_cap,
            layout=LOSS_LAYOUT,
        )


def make_eval_step(model: Transformer) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A jitted `(params, batch, frozen=None) -> (summed nll in nats, loss-bearing tokens)`."""

    def eval_step(params: Any, batch: Batch, frozen: Frozen | None = None) -> tuple[jax.Array, jax.Array]:
        return nll_sum(model, params, batch, frozen), jnp.sum(batch.loss_mask_BT, dtype=jnp.int32)

    return jax.jit(eval_step)
