"""The train step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from nextllm_jax.model import layer_norms
from nextllm_jax.model.lora import Frozen
from nextllm_jax.model.moe import RouterSums
from nextllm_jax.model.objective import Batch, Metrics, Objective
from nextllm_jax.model.router_losses import with_moved_biases
from nextllm_jax.model.transformer import Transformer, abstract_params
from nextllm_jax.model.weights import of_kind, path_name
from nextllm_jax.sharding import also_over_data, constrain, is_over_data, sum_over_data
from nextllm_jax.training.state import TrainState
from nextllm_jax.training.update import make_update

SKIP_REASONS = ("none", "loss", "gradient", "update", "spike")
"""Why a step was skipped. loss, gradient: it (or its norm) is not finite; update: the learning rate or the parameters
are so large that updated parameters might not be finite; spike: the loss is a spike."""


class StepMetrics(NamedTuple):
    """Device values of one train step; reading one waits for the step."""

    nll_sum: jax.Array
    """float32: summed negative log likelihood, in nats."""
    num_tokens: jax.Array
    """int32: tokens in the loss mask."""
    grad_norm: jax.Array
    """float32: global norm of the accumulated gradient before clipping."""
    learning_rate: jax.Array
    """float32."""
    skipped: jax.Array
    """bool: parameters and optimizer state were not updated."""
    skipped_in_a_row: jax.Array
    """int32: number of consecutive skipped steps up to and including this one."""
    reason: jax.Array
    """int32: index in SKIP_REASONS of the first reason that applies."""
    loss_limit: jax.Array
    """float32: mean loss above which the step is a spike; NaN if there is no limit yet."""
    gradient_norms: jax.Array
    """float32 [P]: norm of the accumulated gradient of each of `layer_norms.places`, before clipping."""
    activation_rms: jax.Array
    """float32 [M]: root mean square of the residual stream after each of the first M of these places."""
    routing: RouterSums | None = None
    """What the routers recorded of the global batch, a row for each sparse layer; None without experts."""


class MeanGradient(NamedTuple):
    """The result of the forward and backward passes of a global batch."""

    loss: jax.Array
    """float32: summed loss, whose gradient is taken."""
    nll_sum: jax.Array
    """float32: summed negative log likelihood, in nats."""
    num_tokens: jax.Array
    """int32: tokens in the loss mask."""
    gradients: Any
    """Gradients of the mean loss over these tokens."""
    mean_squares: jax.Array
    """float32 [M]: mean squares of the residual stream, see `layer_norms.mean_squares`."""
    routing: RouterSums | None = None
    """What the routers recorded, see `router_losses.router_sums`."""


def _cast_matrices(model: Transformer, params: Any) -> Any:
    """The parameters, with the matrices of the layers cast to the matmul type, as the model would cast them."""
    names = of_kind(abstract_params(model.config), "matrix")

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype(model.dtype) if path_name(path) in names else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _sums(
    objective: Objective,
    model: Transformer,
    params: Any,
    batch: Batch,
    accumulation_steps: int,
    frozen: Frozen | None,
    gradients_over_data: bool,
) -> tuple[tuple[jax.Array, jax.Array, Metrics], Any]:
    """(result of the objective, its gradient), each summed over the microbatches of the batch.

    Matrices are cast before differentiation, so their gradients stay in the matmul type instead of a wider one.
    """
    params = _cast_matrices(model, params)

    def sums_and_gradient(weights: Any, microbatch: Batch) -> Any:
        params, frozen = weights

        def loss(params: Any) -> tuple[jax.Array, Any]:
            found = objective(model, params, microbatch, frozen)
            return found[0], found

        (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return found, gradient

    if accumulation_steps == 1:
        return sums_and_gradient((params, frozen), batch)

    def accumulated(weights: Any, batch: Batch) -> Any:
        def accumulate(sums: Any, microbatch: Batch) -> tuple[Any, None]:
            microbatch = jax.tree.map(lambda x: constrain(x, "batch", "seq"), microbatch)
            return jax.tree.map(lambda total, x: total + x, sums, sums_and_gradient(weights, microbatch)), None

        # Microbatch i has rows i, i + A, ..., so every device keeps the rows that it already holds.
        microbatches = jax.tree.map(
            lambda x: constrain(
                jnp.swapaxes(x.reshape(-1, accumulation_steps, *x.shape[1:]), 0, 1), None, "batch", "seq"
            ),
            batch,
        )
        shapes = jax.eval_shape(
            lambda batches: objective(model, weights[0], jax.tree.map(lambda x: x[0], batches), weights[1]),
            microbatches,
        )
        found = jax.tree.map(jnp.zeros_like, shapes)
        gradients = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), weights[0])
        return jax.lax.scan(accumulate, (found, gradients), microbatches)[0]

    # Gradients accumulate in one buffer. Each microbatch's gradient is reduced over the axes that shard the buffer:
    # "fsdp", and "data" if the gradients are also sharded over it. Otherwise they are summed over "data" once, at the
    # end.
    if gradients_over_data:
        return accumulated((params, frozen), batch)
    return sum_over_data(accumulated, (params, frozen), batch)


def mean_gradient(
    objective: Objective,
    model: Transformer,
    params: Any,
    batch: Batch,
    accumulation_steps: int,
    frozen: Frozen | None = None,
    *,
    gradients_over_data: bool = False,
) -> MeanGradient:
    """Loss and gradient of a global batch. The gradient is of the mean over all its tokens in the loss mask.

    So the number of microbatches does not matter. `gradients_over_data`: the caller also shards the gradients over
    "data".
    """
    (loss, num_tokens, metrics), gradients = _sums(
        objective, model, params, batch, accumulation_steps, frozen, gradients_over_data
    )
    scale = 1.0 / jnp.maximum(num_tokens, 1).astype(jnp.float32)
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradients)
    squares = metrics.mean_squares / len(batch.tokens_BT)
    return MeanGradient(loss, metrics.nll, num_tokens, gradients, squares, metrics.routing)


def _averaged(state: TrainState, params: Any, applied: jax.Array, ema_decay: float) -> Any:
    """The moving average of the state after a step that leads to `params`; unchanged if `applied` is false."""
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(applied, decay * old + (1 - decay) * new, old).astype(old.dtype)

    return jax.tree.map(average, state.average, params)


def _skip_reason(*found: jax.Array) -> jax.Array:
    """Index in SKIP_REASONS of the first flag in `found` that is true, which start after "none"; 0 if none is."""
    return jnp.where(jnp.any(jnp.stack(found)), jnp.argmax(jnp.stack(found)) + 1, 0).astype(jnp.int32)


def make_train_step(
    objective: Objective,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state_shardings: TrainState,
    *,
    accumulation_steps: int = 1,
    spike_factor: float = 0.0,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """A jitted `(state, batch) -> (state, metrics)` that donates the state. Call it under `jax.set_mesh`.

    The loss is the mean over all tokens in the loss mask of the global batch, independent of microbatches and devices.
    The gradient is clipped once, after accumulation. A step is skipped if the loss or the gradient is not finite, if
    the updated parameters might not be (see `Update.is_finite`), or if the mean loss exceeds `spike_factor` times the
    median of the state's full window of recent losses. A skipped step leaves parameters and optimizer state unchanged,
    but still counts. The moments need no check: if the gradient's norm is finite, so are the squares of its values. The
    state's moving average, if any, decays by `ema_decay`. `state_shardings` are the shardings of the state before and
    after the step (see `state.shardings_of`).
    """
    over_data = any(is_over_data(each) for each in jax.tree.leaves(state_shardings.opt_state))

    def sharded_like_moments(x: jax.Array, of_param: NamedSharding) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, also_over_data(of_param, x.shape) if over_data else of_param)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        total_loss, total_nll, num_tokens, gradients, mean_squares, routing = mean_gradient(
            objective,
            model,
            state.params,
            batch,
            accumulation_steps,
            state.frozen,
            gradients_over_data=over_data,
        )
        gradients = jax.tree.map(sharded_like_moments, gradients, state_shardings.params)
        grad_norm = optax.tree.norm(gradients)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        update = make_update(optimizer, learning_rate, gradients, grad_norm, state_shardings.opt_state)

        losses, loss_limit, spikes = state.recent_losses, jnp.asarray(jnp.nan, jnp.float32), jnp.asarray(False)
        loss = total_nll / jnp.maximum(num_tokens, 1)
        if losses is not None:
            loss_limit = spike_factor * jnp.median(losses)  # NaN, so never exceeded, until the window is full
            spikes = loss > loss_limit
        reason = _skip_reason(~jnp.isfinite(total_loss), ~jnp.isfinite(grad_norm), ~update.is_finite(state), spikes)
        applied = reason == 0
        params, opt_state = update.apply_if(applied, state)
        if model.config.selection_bias and routing is not None and state.frozen is None:
            params = with_moved_biases(model.config, params, routing, applied)
        if losses is not None:
            losses = jnp.where(jnp.isfinite(loss), jnp.append(losses[1:], loss), losses)
        skipped_in_a_row = jnp.where(applied, 0, state.skipped_in_a_row + 1)
        new_state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + (~applied).astype(jnp.int32),
            skipped_in_a_row=skipped_in_a_row,
            params=params,
            opt_state=opt_state,
            frozen=state.frozen,
            average=None if state.average is None else _averaged(state, params, applied, ema_decay),
            recent_losses=losses,
        )
        return new_state, StepMetrics(
            nll_sum=total_nll,
            num_tokens=num_tokens,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            skipped=~applied,
            skipped_in_a_row=skipped_in_a_row,
            reason=reason,
            loss_limit=loss_limit,
            # Replicated: each process reads them.
            gradient_norms=constrain(layer_norms.gradient_norms(model.config, gradients), None),
            activation_rms=constrain(jnp.sqrt(mean_squares), None),
            routing=jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), routing),
        )

    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, None))
