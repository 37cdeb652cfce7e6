"""Finds where a bad step first becomes not finite, by checking every module in a forward and a backward pass.

The passes run the layers one by one, not as a scan, so each module has a name. The backward pass checks modules from
the loss backwards, and reports the first one whose own parameters have a gradient that is not finite.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nextllm_jax.config import Config, ModelConfig
from nextllm_jax.model.layers import Embed, Linear, RMSNorm
from nextllm_jax.model.lora import Frozen
from nextllm_jax.model.moe import ExpertMatrix, Experts, Router
from nextllm_jax.model.objective import Batch, Objective, next_token, token_scores
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.model.weights import layer_paths, subtree, unstack_layers
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.schedule import schedule
from nextllm_jax.training.state import TrainState
from nextllm_jax.training.step import mean_gradient
from nextllm_jax.training.update import Update, in_memory

HEAD_AND_LOSS = "head and loss"
_PARTS = ("attention_norm", "attention", "attention_post_norm", "mlp_norm", "mlp", "mlp_post_norm")
_SUMMED_PRODUCTS = {"attention/o": "attention logits and weighted values", "mlp/down": "activated gate * up"}


@flax.struct.dataclass
class _Seen:
    """The result of checking the arrays of one module."""

    name: str = flax.struct.field(pytree_node=False)
    finite: jax.Array
    """bool: all values are finite; for the matrices of experts, by expert."""
    squares_finite: jax.Array
    """bool: the squares of the values are finite too, if the model computes them."""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Where a step is first not finite, and the loss of each window."""

    direction: Literal["forward", "backward", "sum", "update"] | None
    """What is first not finite: a pass of a microbatch, the mean gradient, or the update; None: all are finite."""
    place: str | None
    """The first module that is not finite, such as "layer 3 mlp down"."""
    overflow: bool
    """Whether all values there are finite, but too large to be squared in a norm."""
    window_losses: tuple[float, ...]
    """Mean loss of each row of the global batch."""

    @property
    def layer(self) -> int | None:
        """The number of the layer in `place`; None if it is not in a layer."""
        words = (self.place or "").split()
        return int(words[words.index("layer") + 1]) if "layer" in words else None

    def __str__(self) -> str:
        """The diagnosis as a sentence."""
        if self.direction is None:
            return "every activation, gradient and parameter is finite"
        state = "has values too large to be squared in float32" if self.overflow else "is not finite"
        return {
            "forward": f"forward pass: the first activation that {state} is {self.place}",
            "backward": f"the forward pass is finite; backward pass: the first gradient that {state} is {self.place}",
            "sum": f"each microbatch is finite; mean gradient: the first that {state} is {self.place}",
            "update": f"gradients are finite; update: the first parameter that {state} is {self.place}",
        }[self.direction]


def _all_finite(*arrays: jax.Array) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(array)) for array in arrays]))


def _seen(name: str, *arrays: jax.Array, squares: jax.Array | float = 0.0) -> _Seen:
    return _Seen(name=name, finite=_all_finite(*arrays), squares_finite=_all_finite(jnp.asarray(squares)))


def _seen_experts(name: str, parts: list[jax.Array]) -> _Seen:
    """The check of the matrices of a layer's experts and of their adapters, or of the gradients of these."""
    finite = [jnp.all(jnp.isfinite(part.reshape(len(part), -1)), axis=1) for part in parts]
    return _Seen(name=name, finite=jnp.all(jnp.stack(finite), axis=0), squares_finite=jnp.asarray(True))


def _seen_input(config: ModelConfig, module: nn.Module, x: jax.Array) -> _Seen:
    """The check of a module's input. For a norm this includes the squares that it computes."""
    squares = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1) if isinstance(module, RMSNorm) else 0.0
    return _seen(_inputs_name(config, module.path), x, squares=squares)


def _name(path: tuple[str, ...]) -> str:
    """The readable name of a module's path: ("remainder_3", "mlp", "up") is "layer 3 mlp up"."""
    known = {"embed": "embedding", "lm_head": "head", "final_norm": "final norm"}
    layer = path[0].removeprefix("remainder_")
    first = f"layer {layer}" if layer != path[0] else known.get(path[0], path[0])
    return " ".join([first, *(part.replace("_", " ") for part in path[1:])])


def _inputs_name(config: ModelConfig, path: tuple[str, ...]) -> str:
    """The readable name of a module's input."""
    layer = path[0].removeprefix("remainder_")
    for module, words in _SUMMED_PRODUCTS.items():
        if "/".join(path[1:]) == module:
            return f"layer {layer} {path[1]} ({words})"
    if path[-1] == "mlp_norm":
        return f"layer {layer} attention (residual stream after it)"
    if path[-1] in ("attention_norm", "final_norm"):
        before = config.num_layers - 1 if path[-1] == "final_norm" else int(layer) - 1
        return f"layer {before} mlp (residual stream after it)" if before >= 0 else "embedding"
    return f"input of {_name(path)}"


def _at(tree: Any, path: tuple[str, ...]) -> list[jax.Array]:
    """The leaves of a module; empty for a module that has no adapters, in a tree of adapters."""
    return jax.tree.leaves(subtree(tree, "/".join(path)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _passes(
    objective: Objective, model: Transformer, params: Any, frozen: Frozen | None, batch: Batch
) -> tuple[list[_Seen], list[_Seen], jax.Array]:
    """The checks of the forward and the backward pass of a microbatch, in order, and the summed nll of each row.

    With tied embeddings, the head's gradient counts as the embedding's. The nll needs another forward pass.
    """
    config = model.config
    paths: list[tuple[str, ...]] = []

    def loss(params: Any, zeros_BTD: jax.Array) -> tuple[jax.Array, list[_Seen]]:
        """`zeros_BTD` is added to the last hidden states; its gradient is theirs."""
        seen: list[_Seen] = []
        paths.clear()

        def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            result = call(*args, **kwargs)
            module = context.module
            if context.method_name != "__call__":
                return result
            if isinstance(module, ExpertMatrix):
                leaves = [leaf for part, _ in result for leaf in jax.tree.leaves(part)]
                arrays = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
                seen.append(_seen_experts(_name(module.path), arrays))
                paths.append(module.path)
            elif isinstance(module, Router):
                seen.append(_seen(_name(module.path), result.weight_BTK))
                paths.append(module.path)
            elif isinstance(module, Experts):
                seen.append(_seen(_name(module.path), result))
            elif isinstance(module, Embed | Linear | RMSNorm):
                if not isinstance(module, Embed):
                    seen.append(_seen_input(config, module, args[0]))
                seen.append(_seen(_name(module.path), result))
                paths.append(module.path)
                if module.path == ("final_norm",):
                    result = result + zeros_BTD
            return result

        with nn.intercept_methods(look):
            total, _, _ = objective(model, params, batch, frozen)
        seen.append(_seen(HEAD_AND_LOSS, total))
        return total, seen

    params = unstack_layers(config, params)
    if frozen is not None:
        frozen = dataclasses.replace(frozen, params=unstack_layers(config, frozen.params))
    zeros_BTD = jnp.zeros((*batch.tokens_BT.shape, config.embed_dim), model.dtype)
    (_, forward), (gradients, d_hidden_BTD) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, zeros_BTD)
    backward = [_seen(HEAD_AND_LOSS, d_hidden_BTD, *_at(gradients, ("lm_head",)))]
    trained = [path for path in reversed(paths) if _at(gradients, path)]
    for path in trained:
        check = _seen_experts if "experts" in path else lambda name, leaves: _seen(name, *leaves)
        backward.append(check(_name(path), _at(gradients, path)))
    logprobs_BT, _ = token_scores(model, params, batch, frozen)
    return forward, backward, -jnp.sum(jnp.where(batch.loss_mask_BT, logprobs_BT, 0), axis=1)


def _first(seen: list[_Seen]) -> tuple[str, bool] | None:
    """The first module that is not finite or overflows when squared, and whether it only overflows when squared."""
    for each in seen:
        if np.ndim(each.finite) and not np.all(each.finite):
            return f"{each.name} of expert {int(np.argmin(each.finite))}", False
        if not (np.all(each.finite) and each.squares_finite):
            return each.name, bool(each.finite)
    return None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sum_and_update(
    objective: Objective, config: Config, model: Transformer, state: TrainState, batch: Batch
) -> tuple[Any, Any]:
    """The checks of the global batch's gradient, and of the parameters after an update with it."""
    optimizer = make_optimizer(config.optimizer, config.model)
    learning_rate = jnp.asarray(schedule(config.optimizer, config.training.steps)(state.step), jnp.float32)
    steps = config.training.accumulation_steps
    gradients = mean_gradient(objective, model, state.params, batch, steps, state.frozen).gradients
    update = Update(optimizer, learning_rate, gradients, optax.tree.norm(gradients))
    params, _ = update.apply(state.params, in_memory(state.opt_state, jax.memory.Space.Device), gradients)
    trees = [unstack_layers(config.model, tree) for tree in (gradients, params)]
    summed, after = (_modules(config.model, tree) for tree in trees)
    backward = [_seen(name, *leaves, squares=optax.tree.norm(leaves)) for name, leaves in reversed(summed)]
    leaves = jax.tree.leaves(gradients)
    backward.append(_seen("norm over all gradients", *leaves, squares=optax.tree.norm(leaves)))
    return backward, [_seen(name, *leaves) for name, leaves in after]


def _modules(config: ModelConfig, tree: Any) -> list[tuple[str, list[jax.Array]]]:
    """The name and parameters of each module of an unstacked tree, roughly in forward order."""
    parts = [(block, part) for block, _ in layer_paths(config, stacked=False) for part in _PARTS]
    paths = [("embed",), *parts, ("final_norm",), ("lm_head",)]
    return [(_name(path), leaves) for path in paths if (leaves := _at(tree, path))]


def diagnose(
    config: Config,
    model: Transformer,
    state: TrainState,
    batch: Batch,
    sharding: jax.sharding.Sharding,
    objective: Objective = next_token,
) -> Diagnosis:
    """Where a train step from `state` on `batch` (the global batch, in numpy) is first not finite.

    `sharding` is the sharding of [B, T] arrays. Call it under `jax.set_mesh`. It needs memory for a second copy of the
    parameters.
    """
    # Without remat, which traces the layers: their arrays could not be checked.
    open_model = model.clone(config=config.model.without_remat(), scan_layers=False)
    parts = config.training.accumulation_steps
    row_losses = np.zeros(len(batch.tokens_BT))
    found: dict[str, tuple[str, bool]] = {}
    for part in range(parts):
        rows = slice(part, None, parts)  # the same split into microbatches as in the train step
        microbatch = Batch(*(array[rows] for array in batch))
        forward, backward, row_nll_B = jax.device_get(
            _passes(objective, open_model, state.params, state.frozen, jax.device_put(microbatch, sharding))
        )
        row_losses[rows] = row_nll_B / np.maximum(microbatch.loss_mask_BT.sum(1), 1)
        for direction, seen in (("forward", forward), ("backward", backward)):
            if (first := _first(seen)) is not None:
                found.setdefault(direction, first)
    losses = tuple(row_losses.tolist())
    if "forward" in found:
        return Diagnosis("forward", *found["forward"], losses)
    if "backward" in found:
        return Diagnosis("backward", *found["backward"], losses)
    whole = _sum_and_update(objective, config, model, state, jax.device_put(batch, sharding))
    summed, after = jax.device_get(whole)
    if (first := _first(summed)) is not None:
        return Diagnosis("sum", *first, losses)
    if (first := _first(after)) is not None:
        return Diagnosis("update", *first, losses)
    return Diagnosis(None, None, False, losses)
