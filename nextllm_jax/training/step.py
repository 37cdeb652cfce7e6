"""The loss, the train step and the evaluation step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nextllm_jax.data.packing import Batch
from nextllm_jax.model.transformer import Transformer, head_embedding
from nextllm_jax.ops.cross_entropy import cross_entropy
from nextllm_jax.sharding import RULES, constrain
from nextllm_jax.training.state import TrainState


class StepMetrics(NamedTuple):
    """Device scalars of one train step; reading one waits for the step."""

    nll_sum: jax.Array
    """float32: summed negative log likelihood, in nats."""
    num_tokens: jax.Array
    """int32: loss-bearing tokens."""
    grad_norm: jax.Array
    """float32: global norm of the accumulated gradient before clipping."""
    learning_rate: jax.Array
    """float32."""
    skipped: jax.Array
    """bool: loss or gradient was not finite and nothing was updated."""
    skipped_in_a_row: jax.Array
    """int32: skipped steps up to and with this one."""


def nll_sum(model: Transformer, params: Any, batch: Batch) -> jax.Array:
    """float32 scalar: negative log likelihood in nats, summed over the batch's loss-bearing tokens."""
    hidden_BTD, _ = model.apply({"params": params}, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
    head_VD = head_embedding(model.config, params).astype(model.dtype)
    with jax.named_scope("loss"):
        return cross_entropy(
            hidden_BTD,
            head_VD,
            batch.targets_BT,
            batch.loss_mask_BT,
            logit_divisor=model.config.logit_divisor,
            soft_cap=model.config.logit_soft_cap,
            batch_axes=RULES["batch"],
        )


def _gradients(model: Transformer, params: Any, batch: Batch, accumulation_steps: int) -> tuple[jax.Array, Any]:
    """Summed nll and its gradient over the batch, cut into microbatches that share one buffer."""
    value_and_grad = jax.value_and_grad(lambda p, microbatch: nll_sum(model, p, microbatch))
    if accumulation_steps == 1:
        return value_and_grad(params, batch)

    def accumulate(sums: tuple[jax.Array, Any], microbatch: Batch) -> tuple[tuple[jax.Array, Any], None]:
        microbatch = jax.tree.map(lambda x: constrain(x, "batch", "seq"), microbatch)
        return jax.tree.map(lambda total, x: total + x, sums, value_and_grad(params, microbatch)), None

    # Microbatch i takes rows i, i + A, ...: so every device keeps the rows that it already holds.
    microbatches = jax.tree.map(
        lambda x: constrain(jnp.swapaxes(x.reshape(-1, accumulation_steps, *x.shape[1:]), 0, 1), None, "batch", "seq"),
        batch,
    )
    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params))
    return jax.lax.scan(accumulate, zeros, microbatches)[0]


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state_shardings: TrainState,
    *,
    accumulation_steps: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """A jitted `(state, batch) -> (state, metrics)` that donates the state.

    The loss is the mean over all loss-bearing tokens of the global batch, whatever the microbatches and
    devices; the gradient is clipped once, after accumulation. If loss or gradient is not finite, parameters
    and optimizer state stay as they were, and the step still counts. `state_shardings` is the layout of the
    state on both sides (see `state.shardings_of`). Call it under `jax.set_mesh`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        total_nll, gradients = _gradients(model, state.params, batch, accumulation_steps)
        num_tokens = jnp.sum(batch.loss_mask_BT, dtype=jnp.int32)
        scale = 1.0 / jnp.maximum(num_tokens, 1).astype(jnp.float32)
        gradients = jax.tree.map(lambda g: g * scale, gradients)
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(total_nll) & jnp.isfinite(grad_norm)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            updates = jax.tree.map(lambda u: -learning_rate * u, updates)
            params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        skipped_in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        new_state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + (~finite).astype(jnp.int32),
            skipped_in_a_row=skipped_in_a_row,
            params=params,
            opt_state=opt_state,
        )
        return new_state, StepMetrics(total_nll, num_tokens, grad_norm, learning_rate, ~finite, skipped_in_a_row)

    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, None))


def make_eval_step(model: Transformer) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted `(params, batch) -> (summed nll in nats, loss-bearing tokens)`."""

    def eval_step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return nll_sum(model, params, batch), jnp.sum(batch.loss_mask_BT, dtype=jnp.int32)

    return jax.jit(eval_step)
