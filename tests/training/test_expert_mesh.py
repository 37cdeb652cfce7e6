"""Experts on meshes of eight simulated devices against one device: losses, gradients, updates, metrics and traffic."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import MeshConfig, ModelConfig
from nextllm_jax.model.objective import next_token
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.plan.collectives import Collective, collectives
from nextllm_jax.sharding import make_mesh, sharding
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.schedule import schedule
from nextllm_jax.training.state import abstract_state, shardings_of
from nextllm_jax.training.step import make_train_step
from tests.training import test_step
from tests.training.test_step import OPTIMIZER, B, T, assert_same, make_batch

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


def test_an_exchange_of_tokens_sends_what_arithmetic_says():
    """Per sparse layer, the tokens are gathered and the results scattered along expert, forward and backward."""
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    model, optimizer = Transformer(CONFIG, jnp.dtype("float32")), make_optimizer(OPTIMIZER, CONFIG)
    with jax.set_mesh(mesh):
        state = abstract_state(model, optimizer, mesh)
        step = make_train_step(next_token, model, optimizer, schedule(OPTIMIZER, 10), shardings_of(state))
        batch = jax.device_put(make_batch(), sharding(mesh, "batch", "seq"))
        hlo = step.lower(state, batch).compile().as_text() or ""
    traffic = collectives(hlo, mesh.shape).traffic
    tokens = B * T // 2 * CONFIG.embed_dim * 4  # of the devices along expert, in float32
    least = tokens * 3 / 4
    scattered = traffic[Collective("reduce-scatter", "expert", "f32")].sent_bytes
    assert 2 * least <= scattered
    assert Collective("ragged-all-to-all", "expert", "f32") not in traffic
