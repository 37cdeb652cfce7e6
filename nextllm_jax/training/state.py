"""The training state, made sharded: abstract shapes, then shardings, then one jitted initialisation."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nextllm_jax.model.transformer import Transformer
from nextllm_jax.sharding import tree_shardings


@flax.struct.dataclass
class TrainState:
    """What training carries from step to step and saves."""

    step: jax.Array
    """int32: global batches consumed, skipped updates included."""
    skipped: jax.Array
    """int32: updates skipped for a non-finite loss or gradient, in all."""
    skipped_in_a_row: jax.Array
    """int32: of these, the ones without a good update since."""
    params: Any
    opt_state: Any


def _initial_state(model: Transformer, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state of step 0 with parameters and moments in Flax boxes that hold their logical axes."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    params = model.init(jax.random.key(seed), tokens_BT, tokens_BT)["params"]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero, skipped=zero, skipped_in_a_row=zero, params=params, opt_state=optimizer.init(params))


def abstract_state(model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as shapes, types and shardings, without a byte of it: what a checkpoint is restored into.

    Raises InputError if a parameter's axis cannot be divided over the mesh.
    """
    boxed = jax.eval_shape(lambda: _initial_state(model, optimizer, 0))
    shardings = tree_shardings(mesh, boxed)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings,
    )


def shardings_of(tree: Any) -> Any:
    """The sharding of each leaf of a tree of arrays or abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def create_state(model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """The state of step 0, each array born on its own shard.

    The values depend on the seed alone, not on the mesh.
    """
    shardings = shardings_of(abstract_state(model, optimizer, mesh))
    make = jax.jit(lambda: nn.meta.unbox(_initial_state(model, optimizer, seed)), out_shardings=shardings)
    return make()
