"""The training state. It is created sharded: first abstract shapes, then shardings, then a jitted initialization."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from nextllm_jax.config import Config, LoraConfig, ModelConfig, OptimizerConfig
from nextllm_jax.errors import InputError
from nextllm_jax.model import lora as adapters
from nextllm_jax.model.transformer import Transformer, abstract_params
from nextllm_jax.sharding import also_over_data, placed


@flax.struct.dataclass
class TrainState:
    """The state that each train step updates and that checkpoints save."""

    step: jax.Array
    """int32: global batches consumed, including skipped steps."""
    skipped: jax.Array
    """int32: total number of skipped steps (see `step.SKIP_REASONS`)."""
    skipped_in_a_row: jax.Array
    """int32: number of consecutive skipped steps up to now."""
    params: Any
    """The trained parameters: the model's or, if these are frozen, their adapters'."""
    opt_state: Any
    frozen: adapters.Frozen | None = None
    """The frozen base weights, which are saved once, not in checkpoints; None if all parameters are trained."""
    average: Any | None = None
    """The moving average of the parameters, which is evaluated and is the item "params" of checkpoints; None if
    training.ema_decay is 0."""
    recent_losses: jax.Array | None = None
    """float32 [W]: the last W finite losses, oldest first, padded with NaN at the start; None if spikes are not
    skipped. Saved in a checkpoint's record instead of its arrays: W may change."""

    @property
    def evaluated_params(self) -> Any:
        """The parameters to evaluate, save and export."""
        return self.params if self.average is None else self.average


def require_finite(state: TrainState, where: str) -> None:
    """Raise InputError, which names the first bad array, if parameters or optimizer state are not finite.

    Otherwise training would just skip every step. `where` is the run directory.
    """
    arrays = {"params": state.params, "opt_state": state.opt_state, "frozen": state.frozen, "average": state.average}
    flags = jax.device_get(jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree))(arrays))
    for path, finite in jax.tree_util.tree_leaves_with_path(flags):
        if not finite:
            name, step = jax.tree_util.keystr(path, simple=True, separator="/"), int(state.step)
            raise InputError(
                f"{name} of checkpoint {step} in {where} is not finite; move that checkpoint away to use another"
                if step
                else f"{name} is not finite before the first step; lower model.init_std so that weights fit float32"
            )


def with_recent_losses(state: TrainState, losses: Sequence[float] | None, window_steps: int, mesh: Mesh) -> TrainState:
    """The state whose window of recent losses holds the last `window_steps` of `losses`; no window if that is 0.

    If `losses` is None, the window is a ShapeDtypeStruct, for an abstract state.
    """
    if not window_steps:
        return dataclasses.replace(state, recent_losses=None)
    everywhere = NamedSharding(mesh, PartitionSpec())
    if losses is None:
        abstract: Any = jax.ShapeDtypeStruct((window_steps,), jnp.float32, sharding=everywhere)
        return dataclasses.replace(state, recent_losses=abstract)
    window = np.full(window_steps, np.nan, np.float32)
    recent = list(losses)[-window_steps:]
    window[window_steps - len(recent) :] = recent
    return dataclasses.replace(state, recent_losses=jax.device_put(window, everywhere))


def with_average(state: TrainState) -> TrainState:
    """The state whose moving average starts as a copy of its parameters, which may be abstract."""

    def copied(leaf: Any) -> Any:
        return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.copy(leaf)

    return dataclasses.replace(state, average=jax.tree.map(copied, state.params))


def recent_losses(state: TrainState) -> list[float]:
    """The losses in the window, as JSON values for `with_recent_losses`, exactly. Waits for the state."""
    if state.recent_losses is None:
        return []
    window = np.asarray(state.recent_losses)
    return [float(loss) for loss in window[~np.isnan(window)]]


def _initial_state(model: Transformer, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state of step 0, with parameters and moments in Flax boxes that hold their logical axes."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    return _at_start(optimizer, model.init(jax.random.key(seed), tokens_BT, tokens_BT)["params"])


def _at_start(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero, skipped=zero, skipped_in_a_row=zero, params=params, opt_state=optimizer.init(params))


def abstract_state(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    placement: OptimizerConfig | None = None,
    lora: LoraConfig | None = None,
) -> TrainState:
    """The shapes, types and shardings of the state; nothing is allocated. Checkpoints are restored into it.

    `placement` determines the shardings of the moments; None: the same as those of the parameters.

    Raises InputError if an axis of a parameter cannot be sharded over the mesh.
    """
    boxed = abstract_params(model.config)
    if lora is None or not lora.rank:
        state = placed(mesh, jax.eval_shape(functools.partial(_at_start, optimizer), boxed))
    else:
        state = jax.eval_shape(lambda: _at_start(optimizer, adapters.create(lora, boxed, jax.random.key(0))))
        frozen = adapters.abstract_frozen(lora, boxed, placed(mesh, boxed))
        state = dataclasses.replace(placed(mesh, state), frozen=adapters.Frozen(frozen, lora.scale))
    return state if placement is None else _place_moments(state, placement)


def _place_moments(state: TrainState, config: OptimizerConfig) -> TrainState:
    """An abstract state whose moments are also sharded over "data", or are in host memory, as the config says."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding
        if config.shard_over_data and leaf.ndim:
            sharding = also_over_data(sharding, leaf.shape)
        if config.offload_state and leaf.ndim:
            sharding = sharding.with_memory_kind("pinned_host")
        return leaf.update(sharding=sharding)

    return dataclasses.replace(state, opt_state=jax.tree.map(place, state.opt_state))


def shardings_of(tree: Any) -> Any:
    """The sharding of each leaf of a tree of arrays or abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def create_state(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    placement: OptimizerConfig | None = None,
) -> TrainState:
    """The state of step 0, with each array created in its sharding; see `abstract_state`.

    The values depend only on the seed, not on the mesh.
    """
    shardings = shardings_of(abstract_state(model, optimizer, mesh, placement))
    make = jax.jit(lambda: nn.meta.unbox(_initial_state(model, optimizer, seed)), out_shardings=shardings)
    return make()


def state_from(
    params: Any,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    config: Config,
    trained_adapters: Any = None,
) -> TrainState:
    """The state of step 0 with these parameters, which are donated.

    With a LoRA rank they become the frozen base weights of `trained_adapters`, or else of new adapters, and must have
    the form of `lora.abstract_frozen`.
    """
    lora, seed = config.lora, config.seed
    shardings = shardings_of(abstract_state(model, optimizer, mesh, config.optimizer, lora))
    if not lora.rank:
        return jax.jit(lambda params: _at_start(optimizer, params), out_shardings=shardings, donate_argnums=0)(params)
    boxed = abstract_params(model.config)

    def start(trained: Any) -> TrainState:
        new = adapters.create(lora, boxed, jax.random.key(seed)) if trained is None else trained
        return nn.meta.unbox(_at_start(optimizer, new))

    state = jax.jit(start, out_shardings=dataclasses.replace(shardings, frozen=None))(trained_adapters)
    frozen = jax.device_put(dataclasses.replace(shardings.frozen, params=params), shardings.frozen)
    return dataclasses.replace(state, frozen=frozen)


def whole_params(state: TrainState, config: ModelConfig, mesh: Mesh) -> Any:
    """The parameters of the complete model; adapters are merged into a copy of the frozen base weights."""
    if state.frozen is None:
        return state.evaluated_params
    shardings = shardings_of(placed(mesh, abstract_params(config)))
    merge = functools.partial(adapters.merge, abstract_params(config), dtype=jnp.dtype(config.param_dtype))
    return jax.jit(merge, out_shardings=shardings)(state.evaluated_params, state.frozen)
