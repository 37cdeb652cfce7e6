"""Arithmetic of parameters, FLOPs and cache bytes against the model itself."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import ModelConfig, OptimizerConfig
from nextllm_jax.diagnostics import reference
from nextllm_jax.model.accounting import active_parameter_count, flops_per_token, parameter_count, update_flops
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.model.weights import path_name

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "num_layers": 2,
    "embed_dim": 12,
    "mlp_dim": 20,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "mqa_with_bias_and_norm": {"num_kv_heads": 1, "attention_bias": True, "qk_norm": True},
    "sandwich_norms": {"norm_placement": "sandwich", "attention_bias": True, "attention_output_bias": True},
    "post_norms": {"norm_placement": "post", "qk_norm": True, "qk_norm_over": "projection"},
    "pattern": {"num_layers": 5, "layer_pattern": ("local", "local", "global_nope"), "sliding_window": 6},
    "experts": {
        "num_layers": 3,
        "mlp_pattern": ("dense", "sparse"),
        "num_experts": 6,
        "experts_per_token": 3,
        "expert_mlp_dim": 10,
        "shared_expert_mlp_dim": 7,
        "shared_expert_gate": True,
        "selection_bias": True,
    },
}


def make_config(case: str) -> ModelConfig:
    return ModelConfig(**SHAPE | CASES[case])


def abstract_params(config: ModelConfig) -> Any:
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    init = functools.partial(Transformer(config).init, jax.random.key(0), tokens_BT, tokens_BT)
    return nn.meta.unbox(jax.eval_shape(init))["params"]


@pytest.mark.parametrize("case", CASES)
def test_parameter_count_is_that_of_the_parameters(case: str) -> None:
    config = make_config(case)
    assert parameter_count(config) == sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


@pytest.mark.parametrize("case", CASES)
def test_flops_are_six_per_multiplying_weight_and_twelve_per_visible_score(case: str) -> None:
    config, time = make_config(case), 16
    params = abstract_params(config)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    experts = sum(leaf.size for path, leaf in leaves if "experts/" in path_name(path))
    kernels -= experts / 2  # of six experts three
    head = math.prod(params["embed" if config.tie_embeddings else "lm_head"]["embedding"].shape)
    pattern = [config.layer_pattern[layer % len(config.layer_pattern)] for layer in range(config.num_layers)]
    one_document = np.ones((1, time), np.int32)
    visible = sum(reference.visible(kind, one_document, config).sum() / time for kind in pattern)
    expected = 6 * (kernels + head) + 12 * config.num_heads * config.head_dim * visible
    assert flops_per_token(config, time) == pytest.approx(expected, rel=1e-12)


def test_active_parameters_are_those_of_the_chosen_experts() -> None:
    config = make_config("experts")
    assert active_parameter_count(config) == parameter_count(config) - 1 * 3 * (3 * 12 * 10)  # a layer, three experts
    assert active_parameter_count(make_config("plain")) == parameter_count(make_config("plain"))


def test_the_products_of_an_update() -> None:
    """Of each matrix, by the dimensions m <= n: X X^T, its square, and that times X, five times."""
    config = make_config("plain")
    embed, mlp = config.embed_dim, config.mlp_dim
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = [(embed, q), (embed, kv), (embed, kv), (q, embed), (embed, mlp), (embed, mlp), (mlp, embed)]
    products = sum(2 * m * m * n + 2 * m**3 + 2 * m * m * n for m, n in map(sorted, shapes))
    assert update_flops(config, OptimizerConfig(name="muon")) == 5 * config.num_layers * products
    assert update_flops(config, OptimizerConfig()) == 0
