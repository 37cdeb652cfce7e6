"""Sparse layers against the numpy Llama's loop over tokens and experts, the routers' losses, and the selection bias."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from nextllm_jax.config import MeshConfig, ModelConfig
from nextllm_jax.diagnostics import reference
from nextllm_jax.model.objective import next_token
from nextllm_jax.model.transformer import Transformer, abstract_params
from nextllm_jax.model.weights import unstack_layers
from tests.parameters import random_params
from tests.training import test_step

WIDTHS: dict[str, Any] = {
    "vocab_size": 64, "num_layers": 3, "embed_dim": 16, "mlp_dim": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "context_length": 32, "dtype": "float32", "num_experts": 8, "expert_mlp_dim": 12,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "normalized": {"experts_per_token": 2},
    "every option of softmax": {
        "experts_per_token": 3,
        "normalize_expert_weights": False,
        "mlp_pattern": ("dense", "sparse"),
        "layer_pattern": ("local", "global", "global_nope"),
        "sliding_window": 6,
        "shared_expert_mlp_dim": 20,
        "shared_expert_gate": True,
        "activation": "gelu_tanh",
    },
    "sigmoid with a bias": {
        "router_scores": "sigmoid",
        "selection_bias": True,
        "expert_weight_scale": 2.5,
        "shared_expert_mlp_dim": 12,
        "norm_placement": "sandwich",
    },
    "capacity": {"capacity_factor": 1.0},
}


def make_config(name: str) -> ModelConfig:
    return ModelConfig(**WIDTHS | CASES[name])


def make_params(config: ModelConfig) -> Any:
    return random_params(nn.meta.unbox(abstract_params(config)))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_loop_over_tokens_and_experts(name: str) -> None:
    config, batch = make_config(name), test_step.make_batch()
    params, model = make_params(config), Transformer(make_config(name))

    @jax.jit
    def logits(params: Any) -> Any:
        context = batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT
        hidden_BTD, _ = model.apply({"params": params}, *context)
        return model.apply({"params": params}, hidden_BTD, method="logits")

    expected = reference.forward(params, config, batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT)
    np.testing.assert_allclose(logits(params), expected, atol=1e-4)


def test_losses_of_the_routers_follow_their_definitions_and_leave_the_reported_loss_alone() -> None:
    config = dataclasses.replace(make_config("every option of softmax"), load_balance_weight=0.3, router_z_weight=0.07)
    batch, params = test_step.make_batch(), make_params(config)
    batch.segment_ids_BT[0, 9:] = 0  # padding
    counted_BT = batch.segment_ids_BT > 0
    model = Transformer(config)
    loss, num_tokens, metrics = jax.jit(next_token, static_argnums=0)(model, params, batch)

    layer = unstack_layers(config, params)["remainder_1"]  # the sparse one
    routed = Transformer(config, scan_layers=False)
    apply = functools.partial(
        routed.apply, mutable=["intermediates"], capture_intermediates=lambda module, _: module.name == "mlp_norm"
    )
    context = batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT
    _, seen = jax.jit(apply)({"params": unstack_layers(config, params)}, *context)
    (x_BTD,) = seen["intermediates"]["remainder_1"]["mlp_norm"]["__call__"]
    logits_ME = np.asarray(x_BTD[counted_BT], np.float64) @ layer["mlp"]["router"]["kernel"]
    chosen_MK = np.argsort(-logits_ME, axis=1)[:, : config.experts_per_token]
    tokens_E = np.bincount(chosen_MK.reshape(-1), minlength=config.num_experts)
    p = reference.softmax(logits_ME)
    balance = config.num_experts * tokens_E / chosen_MK.size @ p.mean(axis=0)
    z = np.mean(np.log(np.exp(logits_ME).sum(axis=-1)) ** 2)
    assert config.sparse_layers == (1,)
    assert float(loss - metrics.nll) == pytest.approx((0.3 * balance + 0.07 * z) * int(num_tokens), rel=1e-3)

    plain = dataclasses.replace(config, load_balance_weight=0.0, router_z_weight=0.0)
    found = jax.jit(next_token, static_argnums=0)(Transformer(plain), params, batch)[0]
    assert float(found) == pytest.approx(float(metrics.nll), rel=1e-5)
    np.testing.assert_array_equal(metrics.routing.tokens_E, [tokens_E])
    np.testing.assert_allclose(metrics.routing.entropy, [-(p * np.log(p)).sum()], rtol=1e-4)


def test_the_balance_of_equal_loads_is_one_and_pulls_towards_it() -> None:
    config = dataclasses.replace(make_config("normalized"), load_balance_weight=1.0, router_z_weight=0.0)
    batch, params = test_step.make_batch(), make_params(config)

    def balance(params: Any) -> jax.Array:
        loss, num_tokens, metrics = next_token(Transformer(config), params, batch)
        return (loss - metrics.nll) / num_tokens

    found = jax.jit(jax.value_and_grad(balance))
    first, gradient = found(params)
    value, moved = first, params
    for _ in range(5):
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, moved, gradient)
        value, gradient = found(moved)
    assert 1.0 < float(value) < float(first) - 0.01
    for layer in params["layers"].values():  # equal probabilities
        layer["mlp"]["router"]["kernel"] *= 0
    assert float(found(params)[0]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_selection_bias_follows_the_load_of_the_global_batch(accumulation_steps: int) -> None:
    config = dataclasses.replace(make_config("sigmoid with a bias"), selection_bias_rate=0.125)
    _, metrics, state = test_step.run(MeshConfig(data=1), config=config, steps=1, accumulation_steps=accumulation_steps)
    assert metrics is not None
    assert metrics.routing is not None
    tokens_SE = metrics.routing.tokens_E
    assert tokens_SE.sum() == 3 * 8 * 16 * config.experts_per_token
    expected = 0.125 * np.sign(tokens_SE.mean(axis=1, keepdims=True) - tokens_SE)
    bias_SE = state.params["layers"]["block_0"]["mlp"]["router"]["selection_bias"]
    np.testing.assert_array_equal(bias_SE, expected)
    assert (np.abs(expected).sum(axis=1) > 0).all()
