"""The optimizer's update: whether it is finite, and taking it; of all layers at once, or of one after another."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nextllm_jax.model.weights import is_stacked
from nextllm_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Update:
    """What moves the parameters of a state."""

    optimizer: optax.GradientTransformation
    """See `make_optimizer`."""
    learning_rate: jax.Array
    """float32."""
    gradients: Any
    grad_norm: jax.Array
    """float32: global norm of the gradients, before clipping."""

    def apply(self, params: Any, opt_state: Any, gradients: Any) -> tuple[Any, Any]:
        """(parameters, optimizer state) after the update, finite or not; of all parameters or of some."""
        with jax.named_scope("optimizer"):
            optimizer = optax.with_extra_args_support(self.optimizer)
            updates, opt_state = optimizer.update(gradients, opt_state, params, grad_norm=self.grad_norm)
            updates = jax.tree.map(lambda u: -self.learning_rate * u, updates)
            return optax.apply_updates(params, updates), opt_state

    def is_finite(self, state: TrainState) -> jax.Array:
        """Whether the update gives finite parameters: a bool.

        It is computed apart from the update that is taken, which then goes straight into the buffers of the old
        state; one computation for both would hold all of the new parameters beside the old ones until this is known.
        """
        held = jax.lax.optimization_barrier((state.params, state.opt_state, self.gradients))
        return _all_finite(self.apply(*held)[0])

    def take(self, state: TrainState, taken: jax.Array) -> tuple[Any, Any]:
        """(parameters, optimizer state) after the update if it is `taken`, else as they were."""
        old = (state.params, state.opt_state)
        return _where(taken, self.apply(*old, self.gradients), old)


@dataclasses.dataclass(frozen=True)
class OffloadedUpdate(Update):
    """An update with moments in the host's memory, of which a device holds only a few layers' at a time.

    The compiler fetches what it can as early as it can, but nothing of a later turn of a loop; so the stacked layers
    are updated period by period, and their moments come twice, for the check and for the update that is taken. What
    is not stacked (embedding, head, layers outside the scan) comes whole.
    """

    def is_finite(self, state: TrainState) -> jax.Array:
        """As `Update.is_finite`."""
        params, gradients = jax.lax.optimization_barrier((state.params, self.gradients))
        rest, layers = _parts((params, state.opt_state, gradients))
        params, _ = self._apply_fetched(rest)[0]

        def check(i: jax.Array, finite: jax.Array) -> jax.Array:
            params, _ = self._apply_fetched(_layer(layers, i))[0]
            return finite & _all_finite(params)

        return jax.lax.fori_loop(0, _num_layers(layers), check, _all_finite(params))

    def take(self, state: TrainState, taken: jax.Array) -> tuple[Any, Any]:
        """As `Update.take`."""
        rest, layers = _parts((state.params, state.opt_state, self.gradients))

        def taken_from(part: tuple[Any, Any, Any]) -> tuple[Any, Any]:
            params, opt_state = _where(taken, *self._apply_fetched(part))
            return params, in_memory(opt_state, jax.memory.Space.Host)

        def update(i: jax.Array, kept: tuple[Any, Any]) -> tuple[Any, Any]:
            return _with_layer(kept, taken_from(_layer((*kept, layers[2]), i)), i)

        updated = jax.lax.fori_loop(0, _num_layers(layers), update, layers[:2])
        return jax.tree.map(lambda a, b: b if a is None else a, taken_from(rest), updated, is_leaf=lambda x: x is None)

    def _apply_fetched(self, part: tuple[Any, Any, Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """(parameters, optimizer state) of some (parameters, optimizer state, gradients) after the update and before.

        All are in the device's memory.
        """
        params, opt_state, gradients = part
        old = params, in_memory(opt_state, jax.memory.Space.Device)
        return self.apply(*old, gradients), old


def make_update(
    optimizer: optax.GradientTransformation, learning_rate: Any, gradients: Any, grad_norm: Any, places: Any
) -> Update:
    """The update by a gradient, of an optimizer state with the shardings `places`."""
    offloaded = any(place.memory_kind == "pinned_host" for place in jax.tree.leaves(places))
    kind = OffloadedUpdate if offloaded else Update
    return kind(optimizer, learning_rate, gradients, grad_norm)


def _parts(tree: Any) -> tuple[Any, Any]:
    """`tree` with None for the stacked layers, and with None for all else but scalars."""

    def part(stacked: bool) -> Any:
        def keep(path: Any, leaf: jax.Array) -> jax.Array | None:
            return leaf if is_stacked(path) == stacked or not leaf.ndim else None

        return jax.tree_util.tree_map_with_path(keep, tree)

    return part(False), part(True)


def _num_layers(layers: Any) -> int:
    return max((len(leaf) for leaf in jax.tree.leaves(layers) if leaf.ndim), default=0)


def _layer(layers: Any, i: jax.Array) -> Any:
    """Number `i` of stacked layers; scalars are as they were."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False) if x.ndim else x, layers)


def _with_layer(layers: Any, layer: Any, i: jax.Array) -> Any:
    """Stacked layers with `layer` as number `i`; scalars are as they were."""

    def put(stacked: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, x, i, 0) if stacked.ndim else stacked

    return jax.tree.map(put, layers, layer)


def in_memory(opt_state: Any, memory: Any) -> Any:
    """An optimizer state with its moments in this `jax.memory.Space`."""
    return jax.tree.map(lambda x: jax.device_put(x, memory) if x.ndim else x, opt_state)


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _where(taken: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(taken, new, old), new, old)
