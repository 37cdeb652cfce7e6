"""completep: rates and initial weights against factors computed by hand, and the sizes of activations over shapes."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nextllm_jax.config import ModelConfig, OptimizerConfig
from nextllm_jax.model.layers import Linear
from nextllm_jax.model.transformer import Block, Transformer, abstract_params
from nextllm_jax.model.weights import by_name
from nextllm_jax.training.optimizers import make_optimizer
from nextllm_jax.training.optimizers.parts import rate_factor

ADAMW = OptimizerConfig(learning_rate=0.004)
MUON = OptimizerConfig(name="muon", learning_rate=0.02, adamw_learning_rate=0.01)
BASE_WIDTH, BASE_DEPTH = 64, 2
V, B, T, STEPS = 64, 8, 32, 5


def make_config(width: int, depth: int, parametrization: str = "completep", **changes: Any) -> ModelConfig:
    base = {"base_width": BASE_WIDTH, "base_depth": BASE_DEPTH} if parametrization == "completep" else {}
    shape = {"embed_dim": width, "mlp_dim": 2 * width, "num_heads": width // 16, "num_kv_heads": width // 32}
    values = {"num_layers": depth, "head_dim": 16, "qk_norm": True, "parametrization": parametrization}
    return ModelConfig(vocab_size=V, **(shape | base | values | changes))


EVERY_KIND = make_config(
    256, 4, tie_embeddings=False, attention_bias=True, attention_output_bias=True, num_experts=2, experts_per_token=1,
    mlp_pattern=("dense", "sparse"), shared_expert_mlp_dim=64, shared_expert_gate=True, selection_bias=True,
)  # fmt: skip
"""4 times as wide as the base, and 2 times as deep."""


@pytest.mark.parametrize(("optimizer", "matrix"), [(MUON, 1 / 2), (ADAMW, 1 / 4)], ids=["muon", "adamw"])
def test_rates_of_every_kind_of_weight(optimizer, matrix):
    """The rate of a matrix falls with the width, or with its square root for Muon; that of an output with the depth."""
    by_suffix = {
        "gate/kernel": matrix, "up/kernel": matrix, "down/kernel": matrix / 2,
        "attention/q/kernel": matrix, "attention/k/kernel": matrix, "attention/v/kernel": matrix,
        "attention/o/kernel": matrix / 2, "attention/o/bias": 1 / 2,
        "router/kernel": 1 / 4, "shared_gate/kernel": 1 / 4, "final_norm/scale": 1 / 4,
    }  # fmt: skip
    weights, unused = by_name(abstract_params(EVERY_KIND)), set(by_suffix)
    for name, weight in weights.items():
        (*_, suffix) = [suffix for suffix in by_suffix if name.endswith(suffix)] or [""]
        unused.discard(suffix)
        assert rate_factor(optimizer, EVERY_KIND, name, weight) == by_suffix.get(suffix, 1.0), name
    assert not unused


def test_the_factor_applies_to_the_direction_and_not_to_the_decay():
    scaled, standard = make_config(32, 4), make_config(32, 4, "standard")
    params = initial(standard)
    gradients = jax.tree.map(lambda p: jnp.sin(30 * p + 1), params)

    def update(config: OptimizerConfig, model: ModelConfig, decay: float) -> dict[str, Any]:
        optimizer = make_optimizer(dataclasses.replace(config, weight_decay=decay), model)
        return by_name(jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0])

    for config in (MUON, ADAMW):
        plain, decayed, found = update(config, standard, 0), update(config, standard, 0.5), update(config, scaled, 0.5)
        for name, weight in by_name(abstract_params(scaled)).items():
            expected = rate_factor(config, scaled, name, weight) * plain[name] + decayed[name] - plain[name]
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def initial(config: ModelConfig) -> Any:
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    return nn.meta.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), tokens_BT, tokens_BT)["params"])


def test_initial_weights():
    """4 times as wide as the base and 4 times as deep; at the shape of the base, they are the standard ones."""
    deviations = {
        "embed/embedding": 0.02, "q/kernel": 0.01, "gate/kernel": 0.01, "router/kernel": 0.005,
        "o/kernel": 0.01 / 8, "down/kernel": 0.01 / 8,
    }  # fmt: skip
    changes: dict[str, Any] = {"num_experts": 2, "experts_per_token": 1, "norm_scale_offset": 0.5}
    params = by_name(initial(make_config(256, 8, **changes)))
    for suffix, expected in deviations.items():
        (found,) = [leaf for name, leaf in params.items() if name.endswith(suffix)]
        np.testing.assert_allclose(found.std(), expected, rtol=0.06, err_msg=suffix)
    assert np.unique(params["final_norm/scale"]) == [0.25 - 0.5]
    assert np.unique(params["layers/block_0/mlp_norm/scale"]) == [1 - 0.5]
    base = [initial(make_config(BASE_WIDTH, BASE_DEPTH, name, **changes)) for name in ("completep", "standard")]
    jax.tree.map(np.testing.assert_array_equal, *base)


@functools.cache
def sizes(config: ModelConfig, optimizer: OptimizerConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(root mean squares at the start, those of the changes by a few steps) of activations of each layer, by name."""
    model, update, rng = Transformer(config), make_optimizer(optimizer, config), np.random.default_rng(0)
    tokens_BT1 = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    tokens_BT, positions_BT = tokens_BT1[:, :-1], np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))

    def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        (hidden_BTD, _), recorded = model.apply(
            {"params": params},
            tokens_BT,
            positions_BT,
            mutable=["intermediates"],
            capture_intermediates=lambda module, method: method == "__call__" and isinstance(module, Block | Linear),
        )
        logits_BTV: Any = model.apply({"params": params}, hidden_BTD, method="logits")
        nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT1[:, 1:])
        block = recorded["intermediates"]["layers"]["block_0"]
        inner = {name: block["attention"][name] for name in "qkv"} | {
            name: block["mlp"][name] for name in ("gate", "up")
        }
        found = {"residual stream": block["__call__"][0][0], "logits": logits_BTV[None]}
        return jnp.mean(nll_BT), found | {name: each["__call__"][0] for name, each in inner.items()}

    def step(state: tuple[Any, Any], _: Any) -> tuple[tuple[Any, Any], dict[str, jax.Array]]:
        params, opt_state = state
        gradients, activations = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = update.update(gradients, opt_state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -optimizer.learning_rate * u, updates))
        return (params, opt_state), activations

    def rms(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(jnp.square(x), axis=range(1, x.ndim)))

    @jax.jit
    def measure(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        _, found = jax.lax.scan(step, (params, update.init(params)), length=STEPS + 1)
        return jax.tree.map(lambda x: rms(x[0]), found), jax.tree.map(lambda x: rms(x[-1] - x[0]), found)

    return jax.device_get(measure(initial(config)))


def spread(optimizer: OptimizerConfig, configs: list[ModelConfig]) -> dict[str, float]:
    """The greatest ratio between models of the size of an activation at the start, and of its change, by name.

    Sizes of layers are averaged, except for the residual stream, which is measured after the last one.
    """
    found = {}
    start, change = zip(*(sizes(config, optimizer) for config in configs), strict=True)
    for name in start[0]:
        for kind, measured in (("start", start), ("change", change)):
            values = [each[name][-1] if name == "residual stream" else np.mean(each[name]) for each in measured]
            found[f"{name}, {kind}"] = max(values) / min(values)
    return found


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("optimizer", "zero_init_outputs", "widths", "depths"),
    [
        pytest.param(MUON, True, (64, 128, 256), (2, 4, 8), id="muon"),
        pytest.param(MUON, False, (64, 512, 1024), (2, 16), marks=SLOW, id="muon, outputs, large"),
        pytest.param(MUON, True, (64, 512, 1024), (2, 16), marks=SLOW, id="muon, large"),
        pytest.param(ADAMW, True, (64, 256), (2, 8), marks=SLOW, id="adamw"),
        pytest.param(ADAMW, False, (64, 512, 1024), (2, 16), marks=SLOW, id="adamw, outputs, large"),
    ],
)
def test_activations_and_their_changes_keep_their_sizes(optimizer, zero_init_outputs, widths, depths):
    """A coordinate check: with completep, they do over widths and depths; with standard, they do not."""
    make = functools.partial(make_config, zero_init_outputs=zero_init_outputs)
    over_width = spread(optimizer, [make(width, BASE_DEPTH) for width in widths])
    over_depth = spread(optimizer, [make(BASE_WIDTH, depth) for depth in depths])
    assert max((over_width | over_depth).values()) < 1.4, (over_width, over_depth)
    base = make(BASE_WIDTH, BASE_DEPTH)
    over_width = spread(optimizer, [base, make(widths[-1], BASE_DEPTH, "standard")])
    over_depth = spread(optimizer, [base, make(BASE_WIDTH, depths[-1], "standard")])
    assert min(size for name, size in over_width.items() if name.endswith("change")) > 1.6, over_width
    assert over_depth["residual stream, change"] > 1.4, over_depth
