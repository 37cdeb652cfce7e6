"""The optimizer's update: whether it is sure to be finite, and applying it, for all layers at once or one at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nextllm_jax.config.optimizer import LARGEST_DIRECTION
from nextllm_jax.model.weights import is_stacked
from nextllm_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Update:
    """An update of a state's parameters and optimizer state by a gradient."""

    optimizer: optax.GradientTransformation
    """See `make_optimizer`."""
    learning_rate: jax.Array
    """float32."""
    gradients: Any
    grad_norm: jax.Array
    """float32: global norm of the gradients, before clipping."""

    def apply(self, params: Any, opt_state: Any, gradients: Any) -> tuple[Any, Any]:
        """(parameters, optimizer state) after the update, finite or not, of all parameters or some."""
        with jax.named_scope("optimizer"):
            optimizer = optax.with_extra_args_support(self.optimizer)
            updates, opt_state = optimizer.update(gradients, opt_state, params, grad_norm=self.grad_norm)
            updates = jax.tree.map(lambda u: -self.learning_rate * u, updates)
            return optax.apply_updates(params, updates), opt_state

    def is_finite(self, state: TrainState) -> jax.Array:
        """Whether the updated parameters are sure to be finite, if the norm of the gradients is: a bool.

        This needs no update, so `apply_if` can write into the buffers of the old state. Optimizers compute from finite
        gradients and moments a direction d of at most LARGEST_DIRECTION, as the checks of the config ensure. The new
        parameter p - r (d + w p), with learning rate r and weight decay w, then stays below the bound computed here.
        """
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(p)).astype(jnp.float32) for p in jax.tree.leaves(state.params)]))
        return jnp.isfinite(2 * LARGEST_DIRECTION * (1 + self.learning_rate) * (1 + largest))

    def apply_if(self, applied: jax.Array, state: TrainState) -> tuple[Any, Any]:
        """(parameters, optimizer state) after the update if `applied` is true, else unchanged."""
        old = (state.params, state.opt_state)
        return _where(applied, self.apply(*old, self.gradients), old)


@dataclasses.dataclass(frozen=True)
class OffloadedUpdate(Update):
    """An update with moments in host memory. A device holds the moments of only a few layers at a time.

    The compiler prefetches as early as possible, but not across iterations of a loop. So a loop updates the stacked
    layers period by period. Moments that are not stacked (embedding, head, layers outside the scan) are transferred all
    at once.
    """

    def apply_if(self, applied: jax.Array, state: TrainState) -> tuple[Any, Any]:
        """As `Update.apply_if`."""
        rest, layers = _parts((state.params, state.opt_state, self.gradients))

        def updated_part(part: tuple[Any, Any, Any]) -> tuple[Any, Any]:
            params, opt_state, gradients = part
            old = params, in_memory(opt_state, jax.memory.Space.Device)
            params, opt_state = _where(applied, self.apply(*old, gradients), old)
            return params, in_memory(opt_state, jax.memory.Space.Host)

        def update(i: jax.Array, kept: tuple[Any, Any]) -> tuple[Any, Any]:
            return _with_layer(kept, updated_part(_layer((*kept, layers[2]), i)), i)

        updated = jax.lax.fori_loop(0, _num_layers(layers), update, layers[:2])
        updated_rest = updated_part(rest)
        return jax.tree.map(lambda a, b: b if _is_left_out(a) else a, updated_rest, updated, is_leaf=_is_left_out)


def make_update(
    optimizer: optax.GradientTransformation, learning_rate: Any, gradients: Any, grad_norm: Any, shardings: Any
) -> Update:
    """The update by a gradient, for an optimizer state with these shardings."""
    offloaded = any(sharding.memory_kind == "pinned_host" for sharding in jax.tree.leaves(shardings))
    kind = OffloadedUpdate if offloaded else Update
    return kind(optimizer, learning_rate, gradients, grad_norm)


def _parts(tree: Any) -> tuple[Any, Any]:
    """`tree` without its stacked layers, and `tree` with only those and scalars.

    `optax.MaskedNode` replaces what is left out, as where an optimizer has no state for a parameter.
    """

    def part(stacked: bool) -> Any:
        def keep(path: Any, leaf: jax.Array) -> Any:
            return leaf if is_stacked(path) == stacked or not leaf.ndim else optax.MaskedNode()

        return jax.tree_util.tree_map_with_path(keep, tree)

    return part(False), part(True)


def _is_left_out(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _num_layers(layers: Any) -> int:
    return max((len(leaf) for leaf in jax.tree.leaves(layers) if leaf.ndim), default=0)


def _layer(layers: Any, i: jax.Array) -> Any:
    """Layer `i` of stacked layers; scalars are unchanged."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False) if x.ndim else x, layers)


def _with_layer(layers: Any, layer: Any, i: jax.Array) -> Any:
    """Stacked layers in which layer `i` is replaced by `layer`; scalars are unchanged."""

    def put(stacked: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, x, i, 0) if stacked.ndim else stacked

    return jax.tree.map(put, layers, layer)


def in_memory(opt_state: Any, memory: Any) -> Any:
    """An optimizer state with its moments moved to this `jax.memory.Space`."""
    return jax.tree.map(lambda x: jax.device_put(x, memory) if x.ndim else x, opt_state)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)
