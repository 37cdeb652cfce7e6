"""Experts on meshes of eight simulated devices against one device: losses, gradients, updates, metrics and traffic."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import MeshConfig, ModelConfig
from nextllm_jax.model.moe import MixtureOfExperts
from nextllm_jax.plan.collectives import Collective, collectives
from nextllm_jax.sharding import make_mesh, sharding
from tests.training import test_step
from tests.training.test_step import B, T, assert_same

CONFIG = ModelConfig(
    vocab_size=64, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=8, num_kv_heads=8, head_dim=8, context_length=16,
    num_experts=8, experts_per_token=3, expert_mlp_dim=24, shared_expert_mlp_dim=16, shared_expert_gate=True,
    mlp_pattern=("sparse", "dense"), selection_bias=True, load_balance_weight=0.1, router_z_weight=0.1,
)  # fmt: skip
AXES = ("data", "fsdp", "sequence", "tensor", "expert")
FACTORIZATIONS = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=5) if np.prod(sizes) == 8]
COVERING = [(1, 2, 1, 2, 2), (2, 1, 2, 1, 2), (1, 1, 1, 1, 8)]  # expert with each other axis; the rest is slow


@functools.cache
def on_one_device(accumulation_steps=1):
    return test_step.run(MeshConfig(data=1), config=CONFIG, accumulation_steps=accumulation_steps)


def mesh_of(sizes):
    return MeshConfig(**dict(zip(AXES, sizes, strict=True)))


@pytest.mark.parametrize(
    "sizes", [each if each in COVERING else pytest.param(each, marks=pytest.mark.slow) for each in FACTORIZATIONS]
)
def test_every_mesh_gives_what_one_device_gives(sizes):
    found, expected = test_step.run(mesh_of(sizes), config=CONFIG), on_one_device()
    assert_same(found, expected)
    pair = [metrics.routing for _, metrics, _ in (found, expected) if metrics]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *pair)


@pytest.mark.parametrize("sizes", [(2, 1, 1, 2, 2), pytest.param((2, 1, 2, 1, 2), marks=pytest.mark.slow)])
def test_microbatches_on_a_mesh_have_the_losses_of_all_devices_together(sizes):
    """The load-balancing loss is not linear in the batch, so devices along data must add up their statistics."""
    recomputed = dataclasses.replace(CONFIG, remat="full")
    assert_same(test_step.run(mesh_of(sizes), config=recomputed, accumulation_steps=2), on_one_device(2))


def value_and_gradients_of_a_layer(shape):
    """A jitted function of parameters and tokens [B, T, D], and these."""
    layer, rng = MixtureOfExperts(CONFIG, jnp.dtype("float32")), np.random.default_rng(0)
    x_BTD = rng.normal(size=(*shape, CONFIG.embed_dim)).astype(np.float32)
    shapes = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), x_BTD, None)["params"])
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    squares = lambda params, x_BTD: jnp.sum(jnp.square(layer.apply({"params": params}, x_BTD, None)))  # noqa: E731
    return jax.jit(jax.value_and_grad(squares, argnums=(0, 1))), params, x_BTD


def test_tokens_that_a_mesh_does_not_shard_evenly_give_what_one_device_gives():
    function, *arguments = value_and_gradients_of_a_layer((3, 5))
    expected = function(*arguments)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, expert=2))):
        found = function(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_devices_along_expert_scatter_results_and_gradients_instead_of_sharing_them_whole():
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    function, params, x_BTD = value_and_gradients_of_a_layer((B, T))
    with jax.set_mesh(mesh):
        x_BTD = jax.device_put(x_BTD, sharding(mesh, "batch", "seq", "activation_embed"))
        hlo = function.lower(params, x_BTD).compile().as_text() or ""
    found = collectives(hlo, mesh.shape).traffic[Collective("reduce-scatter", "expert", "f32")]
    # The results, and the gradients of the tokens and of the weights of their experts.
    widths = 2 * CONFIG.embed_dim + CONFIG.experts_per_token
    assert (found.count, found.sent_bytes) == (3, B * T // 2 * widths * 4 * 3 / 4)
