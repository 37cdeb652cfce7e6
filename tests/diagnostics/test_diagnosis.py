"""The first place that is not finite, where it is known: one that was spoilt by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from nextllm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from nextllm_jax.diagnostics.diagnosis import diagnose
from nextllm_jax.model.objective import Batch
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.sharding import make_mesh, sharding
from nextllm_jax.training.program import build_program

CONFIG = Config(
    model=ModelConfig(vocab_size=320, num_layers=3, embed_dim=16, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
                      context_length=8, layer_pattern=("local", "global"), tie_embeddings=False, remat="full"),
    data=DataConfig(vocab_size=320, sequence_length=8),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, eps=1e-30),
    training=TrainingConfig(steps=30, global_batch_size=4, accumulation_steps=2),
)  # fmt: skip
SCAN, REST = ("layers", "block_1"), ("remainder_0",)  # layers 1 and 2


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def state(mesh):
    return jax.device_get(build_program(CONFIG, mesh).create_state())


def make_batch():
    tokens, targets = np.random.default_rng(0).integers(0, 320, (2, 4, 8), np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), tokens.shape)
    return Batch(tokens, targets, np.ones_like(tokens), positions, np.ones_like(tokens, dtype=bool))


def diagnosed(mesh, state, spoilt=(), config=CONFIG):
    """The diagnosis with some parameters multiplied: (path, factor)."""
    params = jax.tree.map(np.copy, state.params)
    for path, factor in spoilt:
        *path, last = path
        node = params
        for part in path:
            node = node[part]
        with np.errstate(all="ignore"):
            node[last] = node[last] * np.float32(factor)
    state = dataclasses.replace(state, params=params)
    with jax.set_mesh(mesh):
        return diagnose(config, Transformer(config.model), state, make_batch(), sharding(mesh, "batch", "seq"))


def test_a_healthy_step_has_no_such_place(mesh, state):
    found = diagnosed(mesh, state)
    assert (found.direction, found.place, found.layer) == (None, None, None)
    np.testing.assert_allclose(found.window_losses, np.log(320), rtol=0.05)


FORWARD = {
    "embedding": [(("embed", "embedding"), np.inf)],
    "layer 1 attention q": [((*SCAN, "attention", "q", "kernel"), np.inf)],
    "layer 1 attention (attention logits and weighted values)": [
        ((*SCAN, "attention", "q", "kernel"), 1e22),
        ((*SCAN, "attention", "k", "kernel"), 1e22),
    ],
    "layer 1 attention o": [((*SCAN, "attention", "o", "kernel"), np.nan)],
    "layer 1 mlp (activated gate * up)": [
        ((*SCAN, "mlp", "gate", "kernel"), 1e25),
        ((*SCAN, "mlp", "up", "kernel"), 1e25),
    ],
    "layer 1 mlp down": [((*SCAN, "mlp", "down", "kernel"), np.inf)],
    "layer 1 mlp (residual stream after it)": [((*SCAN, "mlp", "down", "kernel"), 1e28)],
    "layer 2 attention norm": [((*REST, "attention_norm", "scale"), np.nan)],
    "layer 2 attention (residual stream after it)": [((*REST, "attention", "o", "kernel"), 1e25)],
    "layer 2 mlp up": [((*REST, "mlp", "up", "kernel"), np.inf)],
    "final norm": [(("final_norm", "scale"), np.inf)],
    "head and loss": [(("lm_head", "embedding"), np.nan)],
}


@pytest.mark.parametrize("place", FORWARD)
def test_the_forward_pass_names_the_place_that_was_spoilt(mesh, state, place):
    found = diagnosed(mesh, state, FORWARD[place])
    assert (found.direction, found.place) == ("forward", place)
    assert found.layer == (int(place.split()[1]) if place.startswith("layer") else None)
    assert found.overflow == ("residual stream" in place)
    assert place in str(found)


def test_the_backward_pass_names_the_last_layer_whose_gradient_overflows(mesh, state):
    """The gradient is huge, and gate's is up's times that; forward the tiny gate and the huge up cancel."""
    huge = [(("lm_head", "embedding"), 1e15), (("final_norm", "scale"), 1e12)]
    cancelling = [((*SCAN, "mlp", "gate", "kernel"), 1e-20), ((*SCAN, "mlp", "up", "kernel"), 1e20)]
    found = diagnosed(mesh, state, [*huge, *cancelling])
    assert (found.direction, found.place, found.layer) == ("backward", "layer 1 mlp gate", 1)
    assert np.isfinite(found.window_losses).all()


def test_an_expert_that_is_not_finite_is_named(mesh):
    model = dataclasses.replace(CONFIG.model, num_layers=2, layer_pattern=("global",), num_experts=4, remat="none")
    config = dataclasses.replace(CONFIG, model=model)
    state = jax.device_get(build_program(config, mesh).create_state())
    found = diagnosed(mesh, state, config=config)
    assert (found.direction, found.place) == (None, None), str(found)
    kernel = ("layers", "block_0", "mlp", "experts", "up", "kernel")
    factors = np.ones((2, 4, 1, 1))
    factors[1, 2] = np.inf  # as many layers, as many experts
    spoilt = diagnosed(mesh, state, [(kernel, factors)], config=config)
    assert (spoilt.direction, spoilt.place, spoilt.layer) == ("forward", "layer 1 mlp experts up of expert 2", 1)


@pytest.mark.parametrize("offload_state", [False, True])
def test_an_update_that_overflows_is_named(mesh, state, offload_state):
    settings = {"learning_rate": 3e38, "weight_decay": 1e4, "offload_state": offload_state}
    rate = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, **settings))
    if offload_state:
        state = build_program(rate, mesh).create_state()
    found = diagnosed(mesh, state, config=rate)
    assert (found.direction, found.place) == ("update", "layer 0 attention"), str(found)


def test_a_sum_that_overflows_is_named(mesh, state):
    """Gradients of 1e20 have squares, and so a norm, that float32 does not hold."""
    found = diagnosed(mesh, state, [(("lm_head", "embedding"), 1e22)])
    assert found.direction == "sum"
    assert found.overflow
    assert found.place == "final norm", str(found)
