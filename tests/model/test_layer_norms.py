"""Norms by layer against each layer's own, taken from a model without a scan."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import ModelConfig
from nextllm_jax.model import layer_norms
from nextllm_jax.model.objective import Batch, next_token
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.model.weights import unstack_layers
from nextllm_jax.training.step import mean_gradient

WIDTHS = {"vocab_size": 31, "embed_dim": 16, "mlp_dim": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
PATTERN = ModelConfig(
    **WIDTHS, num_layers=5, layer_pattern=("local", "global_nope"), sliding_window=3, qk_norm=True,
    tie_embeddings=False, remat="full", norm_placement="sandwich",
)  # fmt: skip
PLAIN = ModelConfig(**WIDTHS, num_layers=1, layer_pattern=("local", "global"), norm_placement="post")


def make_batch(rows=4, length=8):
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 31, (2, rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return Batch(tokens, targets, np.ones_like(tokens), positions, rng.random(tokens.shape) < 0.8)


def shapes_of(model):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return nn.meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, tokens))["params"])


@pytest.mark.parametrize(("config", "accumulation_steps"), [(PATTERN, 2), (PLAIN, 1)])
def test_each_place_has_the_norms_of_its_own_parameters_and_activations(config, accumulation_steps):
    batch, model = make_batch(), Transformer(config)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes_of(model))
    found = jax.jit(mean_gradient, static_argnums=(0, 1, 4))(next_token, model, params, batch, accumulation_steps)
    gradient_norms = layer_norms.gradient_norms(config, found.gradients)

    by_layer = unstack_layers(config, found.gradients)
    apply = jax.jit(functools.partial(Transformer(config, scan_layers=False).apply, mutable=["intermediates"]))
    inputs = batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT
    _, recorded = apply({"params": unstack_layers(config, params)}, *inputs)
    seen = recorded["intermediates"]
    rms = [seen["before_final_norm"]]
    norms = [by_layer["embed"]]
    for layer in reversed(range(config.num_layers)):
        block = seen[f"remainder_{layer}"]
        rms = [block["before_attention"], block["before_mlp"], *rms]
    for layer in range(config.num_layers):
        block = by_layer[f"remainder_{layer}"]
        for part in ("attention", "mlp"):
            norms.append([block[name] for name in (f"{part}_norm", part, f"{part}_post_norm") if name in block])
    norms += [by_layer[name] for name in ("final_norm", "lm_head") if name in by_layer]
    assert len(layer_norms.places(config)) == len(norms) == len(gradient_norms)
    expected = [np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree))) for tree in norms]
    np.testing.assert_allclose(gradient_norms, expected, rtol=1e-4)
    np.testing.assert_allclose(found.mean_squares, [np.mean(x[0]) for x in rms], rtol=1e-4)
    assert np.all(np.diff(found.mean_squares) != 0)


def test_places_are_in_forward_order():
    names = ["embedding", "layer 0 attention", "layer 0 mlp", "final norm"]
    assert layer_norms.places(PLAIN) == names
    assert layer_norms.places(PATTERN)[-2:] == ["final norm", "head"]
    assert layer_norms.places(PATTERN)[9:11] == ["layer 4 attention", "layer 4 mlp"]


def test_one_value_that_is_not_finite_shows_in_its_place_alone():
    config = ModelConfig(**WIDTHS, num_layers=2)
    gradients = jax.tree.map(lambda leaf: np.ones(leaf.shape), shapes_of(Transformer(config)))
    gradients["layers"]["block_0"]["mlp"]["up"]["kernel"][1, 0, 0] = np.inf
    finite = np.isfinite(jax.jit(layer_norms.gradient_norms, static_argnums=0)(config, gradients))
    assert [name for name, good in zip(layer_norms.places(config), finite, strict=True) if not good] == ["layer 1 mlp"]
