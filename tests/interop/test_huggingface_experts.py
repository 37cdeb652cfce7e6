"""What configs of sparse families say about experts: published ones, and keys that must be refused."""

import re
from typing import Any

import pytest

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.interop.huggingface_config import read_model_config, write_model_config

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": False,
    "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.1, "sliding_window": None,
}  # fmt: skip
OLMOE: dict[str, Any] = {
    "model_type": "olmoe", "clip_qkv": None, "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8,
    "attention_bias": False,
}  # fmt: skip
QWEN2_MOE: dict[str, Any] = {
    "model_type": "qwen2_moe", "decoder_sparse_step": 1, "max_window_layers": 21, "moe_intermediate_size": 1408,
    "norm_topk_prob": False, "num_experts": 60, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768, "use_sliding_window": False,
}  # fmt: skip
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
    "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_experts": 128, "num_experts_per_tok": 8, "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
GRANITE_MOE: dict[str, Any] = {
    "model_type": "granitemoe", "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 6.0,
    "residual_multiplier": 0.22, "num_local_experts": 32, "num_experts_per_tok": 8, "tie_word_embeddings": True,
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral 8x7b": (
        MIXTRAL,
        {"num_experts": 8, "experts_per_token": 2, "rope_theta": 1e6, "norm_eps": 1e-5, "layer_pattern": ("global",)},
    ),
    "olmoe 1b 7b": (
        OLMOE,
        {
            "num_experts": 64, "experts_per_token": 8, "normalize_expert_weights": False, "qk_norm": True,
            "qk_norm_over": "projection", "norm_placement": "pre",
        },
    ),
    "qwen 1.5 moe a2.7b": (
        QWEN2_MOE,
        {
            "num_experts": 60, "expert_mlp_dim": 1408, "shared_expert_mlp_dim": 5632, "shared_expert_gate": True,
            "attention_bias": True, "attention_output_bias": False, "layer_pattern": ("global",),
        },
    ),
    "qwen3 30b a3b": (
        QWEN3_MOE,
        {
            "num_experts": 128, "experts_per_token": 8, "expert_mlp_dim": 768, "mlp_dim": 128, "head_dim": 128,
            "normalize_expert_weights": True, "mlp_pattern": ("sparse",), "qk_norm_over": "head",
        },
    ),
    "granite 3.0 1b a400m": (
        GRANITE_MOE,
        {
            "num_experts": 32, "experts_per_token": 8, "attention_scale": 1 / 64, "logit_divisor": 6.0,
            "normalize_expert_weights": True, "shared_expert_mlp_dim": 0,
        },
    ),
    "a first layer and every second one without experts": (
        {**QWEN3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
        {"mlp_pattern": ("dense", "dense", "dense", "sparse")},
    ),
    "the number of experts as transformers saves it": (
        {"model_type": "qwen3_moe", "num_local_experts": 16}, {"num_experts": 16, "normalize_expert_weights": False},
    ),
    "windows in all layers": (
        {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
        {"layer_pattern": ("local",), "sliding_window": 64},
    ),
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "num_local_experts": {**MIXTRAL, "num_local_experts": 0},
    "num_experts_per_tok": {**MIXTRAL, "num_experts_per_tok": "2"},
    "moe_intermediate_size": {**MIXTRAL, "moe_intermediate_size": 32},
    "attention_bias": {**MIXTRAL, "attention_bias": True},
    "clip_qkv": {**OLMOE, "clip_qkv": 8.0},
    "head_dim": {**OLMOE, "head_dim": 32},
    "shared_expert_intermediate_size": {**QWEN2_MOE, "shared_expert_intermediate_size": 0},
    "qkv_bias": {**QWEN2_MOE, "qkv_bias": 1},
    "norm_topk_prob": {**QWEN3_MOE, "norm_topk_prob": "yes"},
    "mlp_only_layers": {**QWEN3_MOE, "mlp_only_layers": [4]},
    "decoder_sparse_step": {**QWEN3_MOE, "decoder_sparse_step": 5},
    "max_window_layers": {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 64},
    "n_routed_experts": {**QWEN3_MOE, "n_routed_experts": 8},
    "shared_intermediate_size": {**GRANITE_MOE, "shared_intermediate_size": 32},
    "num_experts": {**GRANITE_MOE, "num_experts": 32},
    "model_type": {"model_type": "gpt_oss"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    changes, expected = PUBLISHED[name]
    config = read_model_config(SIZES | changes, "config.json")
    assert {field: getattr(config, field) for field in expected} == expected
    assert read_model_config(write_model_config(config, model_type=changes["model_type"]), "config.json") == config


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(key):
    with pytest.raises(InputError, match=rf"config\.json.*\b{key} is "):
        read_model_config(SIZES | REFUSED[key], "config.json")


def test_gpt_oss_is_refused_with_the_reason():
    with pytest.raises(InputError, match=r"'gpt_oss'; attention sinks, biases of experts and MXFP4 .* not supported"):
        read_model_config({"model_type": "gpt_oss"}, "config.json")


def test_two_numbers_of_experts_are_both_named():
    with pytest.raises(InputError, match=r"num_experts is 8; but .* num_local_experts is 16"):
        read_model_config(SIZES | OLMOE | {"num_experts": 8, "num_local_experts": 16}, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection_bias": True}, "the closest is mixtral, which differs in model.selection_bias True"),
        ({"router_scores": "sigmoid"}, "the closest is mixtral, which differs in model.router_scores sigmoid"),
        ({"expert_weight_scale": 2.5}, "the closest is mixtral, which differs in model.expert_weight_scale 2.5"),
        ({"mlp_pattern": ("dense", "sparse")}, "model.mlp_pattern ('dense', 'sparse')"),
    ],
)
def test_what_no_family_has_is_refused_by_field(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        write_model_config(ModelConfig(vocab_size=64, num_experts=4, **changes))


def test_a_dense_model_is_not_compared_with_sparse_families():
    with pytest.raises(InputError, match=r"differs in model\.logit_soft_cap 3\.0"):
        write_model_config(ModelConfig(vocab_size=64, logit_soft_cap=3.0))
    with pytest.raises(InputError, match="num_local_experts is 0"):
        write_model_config(ModelConfig(vocab_size=64), model_type="mixtral")
