"""The program of a config: the model, its train and evaluation steps, and the layout of the training state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from nextllm_jax.checkpoint.base import restore_base
from nextllm_jax.checkpoint.saved_steps import SavedSteps
from nextllm_jax.config import Config
from nextllm_jax.model.attention_kernel import choose_kernel
from nextllm_jax.model.objective import Batch, Objective, make_eval_step, next_token
from nextllm_jax.model.transformer import Transformer, resolve_dtype
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.schedule import schedule
from nextllm_jax.training.state import (
    TrainState,
    abstract_state,
    create_state,
    recent_losses,
    shardings_of,
    state_from,
    with_average,
    with_recent_losses,
)
from nextllm_jax.training.step import StepMetrics, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """The model, its jitted steps, and the functions that create and restore the training state."""

    model: Transformer
    objective: Objective
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    eval_step: Callable[..., tuple[jax.Array, jax.Array]]
    abstract_state: TrainState
    create_state: Callable[[], TrainState]
    """The state of step 0 with random parameters."""
    state_from: Callable[..., TrainState]
    """The state of step 0 with the given parameters, which are donated, and perhaps with the given adapters."""
    restore_state: Callable[[SavedSteps, int], tuple[TrainState, dict[str, Any]]]
    """The state and the record of a checkpoint. Raises as `SavedSteps.restore` and `restore_base` do."""


def build_program(config: Config, mesh: Mesh, objective: Objective = next_token) -> Program:
    """The program of a config on a mesh. Nothing is compiled or computed yet."""
    platform = mesh.devices.flat[0].platform  # not jax.default_backend(): the mesh may be of absent devices
    dtype = resolve_dtype(config.model.dtype, platform, training=True)
    model = Transformer(config.model, dtype, kernel=choose_kernel(config, mesh, dtype))
    optimizer = make_optimizer(config.optimizer, config.model)
    arrays = abstract_state(model, optimizer, mesh, config.optimizer, config.lora)
    training = config.training
    window_steps = training.spike_window_steps if training.spike_factor else 0
    arrays = with_average(arrays) if training.ema_decay else arrays

    def begin(state: TrainState) -> TrainState:
        state = with_average(state) if training.ema_decay else state
        return with_recent_losses(state, [], window_steps, mesh)

    def create() -> TrainState:
        return begin(create_state(model, optimizer, mesh, config.seed, config.optimizer))

    def start_from(params: Any, trained_adapters: Any = None) -> TrainState:
        return begin(state_from(params, model, optimizer, mesh, config, trained_adapters))

    def restore(checkpoints: SavedSteps, step: int) -> tuple[TrainState, dict[str, Any]]:
        state = TrainState(**checkpoints.restore(step, "rest", _rest(arrays)))
        evaluated = "average" if training.ema_decay else "params"
        state = dataclasses.replace(state, **{evaluated: checkpoints.restore(step, "params", arrays.params)})
        if arrays.frozen is not None:
            params = restore_base(checkpoints, step, arrays.frozen.params)
            state = dataclasses.replace(state, frozen=dataclasses.replace(arrays.frozen, params=params))
        record = checkpoints.record(step)
        return with_recent_losses(state, record.get("recent_losses", []), window_steps, mesh), record

    abstract = with_recent_losses(arrays, None, window_steps, mesh)
    train_step = make_train_step(
        objective,
        model,
        optimizer,
        schedule(config.optimizer, training.steps),
        shardings_of(abstract),
        accumulation_steps=training.accumulation_steps,
        spike_factor=training.spike_factor,
        ema_decay=training.ema_decay,
    )
    return Program(
        model=model,
        objective=objective,
        train_step=train_step,
        eval_step=make_eval_step(objective, model.clone(config=config.model.for_inference())),
        abstract_state=abstract,
        create_state=create,
        state_from=start_from,
        restore_state=restore,
    )


def to_save(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The items of a checkpoint, and additional entries for its record. `Program.restore_state` reads both."""
    items = {"params": state.evaluated_params, "rest": _rest(state)}
    return items, {"recent_losses": recent_losses(state)} if state.recent_losses is not None else {}


def _rest(state: TrainState) -> dict[str, Any]:
    """The fields of the state that the item "rest" of a checkpoint holds; fields that are saved elsewhere are None."""
    names = (field.name for field in dataclasses.fields(state) if field.name not in ("frozen", "average"))
    params = None if state.average is None else state.params
    return {name: getattr(state, name) for name in names} | {"params": params, "recent_losses": None}
