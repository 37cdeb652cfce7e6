"""Full-forward logits against the numpy Llama and against HF transformers, with the same random weights."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import ModelConfig
from nextllm_jax.diagnostics import reference
from nextllm_jax.model.transformer import Transformer
from tests import parameters

TIME = 512
TOLERANCE = 1e-4  # logits have standard deviation 1

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "num_layers": 2,
    "embed_dim": 64,
    "mlp_dim": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,  # not embed_dim / num_heads
    "rope_scaling_factor": 4.0,
    "rope_original_context_length": 128,
    "sliding_window": 100,
}
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "mqa": {"num_kv_heads": 1},
    "untied": {"tie_embeddings": False},
    "theta": {"rope_theta": 500_000.0},
    "linear": {"rope_scaling": "linear"},
    "llama3": {"rope_scaling": "llama3"},
    "yarn": {"rope_scaling": "yarn"},
    "yarn_attention_factor": {"rope_scaling": "yarn", "rope_attention_factor": 0.7, "rope_beta_fast": 16.0},
    "qk_norm": {"qk_norm": True},
    "bias": {"attention_bias": True, "num_kv_heads": 1},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "geglu_and_offset": {"activation": "gelu_tanh", "norm_scale_offset": 0.5, "embedding_scale": 2.0},
    "post_norms": {"norm_placement": "post", "qk_norm": True, "qk_norm_over": "projection"},
    "sandwich": {
        "norm_placement": "sandwich",
        "qk_norm": True,
        "attention_soft_cap": 1.0,
        "logit_soft_cap": 3.0,
        "num_layers": 3,
        "layer_pattern": ("local", "global"),
        "rope_local_theta": 100.0,
        "rope_scaling": "linear",
    },
    "multipliers": {"attention_scale": 0.3, "residual_scale": 0.7, "embedding_scale": 3.0, "logit_divisor": 2.0},
    "output_bias": {"attention_bias": True, "attention_output_bias": True},
    "longrope_long": {
        "rope_scaling": "longrope",
        "rotary_dim": 24,
        "rope_short_factors": (1.0,) * 12,
        "rope_long_factors": tuple(1 + i / 4 for i in range(12)),
    },
}
PATTERNS: dict[str, dict[str, Any]] = {
    "local_and_nope": {"num_layers": 4, "layer_pattern": ("local", "global_nope")},
    "remainder": {"num_layers": 5, "layer_pattern": ("local", "global_nope", "global")},
    "remainder_alone": {"num_layers": 1, "layer_pattern": ("global_nope", "local")},
    "every_option": {
        "num_layers": 3,
        "layer_pattern": ("global", "local"),
        "qk_norm": True,
        "attention_bias": True,
        "tie_embeddings": False,
        "rope_scaling": "yarn",
    },
}


def make_config(case: str) -> ModelConfig:
    return ModelConfig(**SMALL | (CASES | VARIANTS | PATTERNS)[case])


def random_params(config: ModelConfig) -> Any:
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    init = functools.partial(Transformer(config).init, jax.random.key(0), tokens_BT, tokens_BT)
    return parameters.random_params(nn.meta.unbox(jax.eval_shape(init))["params"])


def random_tokens(config: ModelConfig, batch: int, time: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, time), np.int32)


def our_logits(config: ModelConfig, params: Any, tokens_BT: np.ndarray, segment_ids_BT=None, positions_BT=None):
    model = Transformer(config)
    if positions_BT is None:
        positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)

    @jax.jit
    def logits(params: Any) -> Any:
        hidden_BTD, _ = model.apply({"params": params}, tokens_BT, positions_BT, segment_ids_BT)
        return model.apply({"params": params}, hidden_BTD, method="logits")

    return np.asarray(logits(params))


@functools.cache
def full_forward(case: str) -> tuple[ModelConfig, Any, np.ndarray, np.ndarray]:
    config = make_config(case)
    params, tokens_BT = random_params(config), random_tokens(config, 2, TIME)
    return config, params, tokens_BT, our_logits(config, params, tokens_BT)


@pytest.mark.parametrize("case", CASES | VARIANTS | PATTERNS)
def test_logits_equal_the_numpy_reference(case: str) -> None:
    config, params, tokens_BT, logits_BTV = full_forward(case)
    assert 0.5 < logits_BTV.std() < 2  # else the tolerance would mean something else
    expected_BTV = reference.forward(params, config, tokens_BT)
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["gqa", "remainder"])
def test_logits_of_packed_documents_equal_the_numpy_reference(case: str) -> None:
    config, params, tokens_BT, _ = full_forward(case)
    tokens_BT = tokens_BT[:, :100]
    lengths = ([30, 1, 49, 20], [100])
    segment_ids_BT = np.array([np.repeat(np.arange(len(row)) + 1, row) for row in lengths], np.int32)
    segment_ids_BT[0, 80:] = 0  # padding
    positions_BT = np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths], np.int32)
    logits_BTV = our_logits(config, params, tokens_BT, segment_ids_BT, positions_BT)
    expected_BTV = reference.forward(params, config, tokens_BT, segment_ids_BT, positions_BT)
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=TOLERANCE, rtol=0)


def transformers_model(config: ModelConfig, params: Any) -> Any:
    """The same model in transformers: Llama, or Qwen2 for the bias, or Qwen3 for the QK norm."""
    torch = pytest.importorskip("torch", reason="torch is missing; install the extra 'parity'")
    transformers = pytest.importorskip("transformers", reason="transformers is missing; install the extra 'parity'")
    family = "Qwen2" if config.attention_bias else "Qwen3" if config.qk_norm else "Llama"
    hf_config = getattr(transformers, f"{family}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=TIME,
        rms_norm_eps=config.norm_eps,
        rope_parameters=transformers_rope(config),
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
    )
    model = getattr(transformers, f"{family}ForCausalLM")(hf_config).eval()
    weights = {name: torch.from_numpy(value.copy()) for name, value in transformers_weights(config, params).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    return model


def transformers_rope(config: ModelConfig) -> dict[str, Any]:
    kind = {"none": "default"}.get(config.rope_scaling, config.rope_scaling)
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": config.rope_theta}
    if kind != "default":
        rope["factor"] = config.rope_scaling_factor
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = config.rope_original_context_length
    if kind == "llama3":
        rope |= {"low_freq_factor": config.rope_low_freq_factor, "high_freq_factor": config.rope_high_freq_factor}
    if kind == "yarn":
        rope |= {"beta_fast": config.rope_beta_fast, "beta_slow": config.rope_beta_slow}
        rope |= {"attention_factor": config.rope_attention_factor} if config.rope_attention_factor else {}
    return rope


def transformers_weights(config: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Torch's layout: [out, in], heads flattened."""
    params = jax.tree.map(np.asarray, params)
    embed = config.embed_dim
    weights = {"model.embed_tokens.weight": params["embed"]["embedding"]}
    weights["model.norm.weight"] = params["final_norm"]["scale"]
    if not config.tie_embeddings:
        weights["lm_head.weight"] = params["lm_head"]["embedding"]
    for layer, block in enumerate(reference.unstack(params, config)):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.input_layernorm.weight"] = block["attention_norm"]["scale"]
        weights[f"{prefix}.post_attention_layernorm.weight"] = block["mlp_norm"]["scale"]
        attention = block["attention"]
        for name in "qkv":
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = attention[name]["kernel"].reshape(embed, -1).T
            if config.attention_bias:
                weights[f"{prefix}.self_attn.{name}_proj.bias"] = attention[name]["bias"].reshape(-1)
        weights[f"{prefix}.self_attn.o_proj.weight"] = attention["o"]["kernel"].reshape(-1, embed).T
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            weights[f"{prefix}.self_attn.{name}.weight"] = attention[name]["scale"]
        for name, projection in block["mlp"].items():
            weights[f"{prefix}.mlp.{name}_proj.weight"] = projection["kernel"].T
    return weights


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is missing; install the extra 'parity'")
    config, params, tokens_BT, logits_BTV = full_forward(case)
    model = transformers_model(config, params)
    with torch.no_grad():
        expected_BTV = model(torch.from_numpy(tokens_BT).long()).logits.numpy()
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=TOLERANCE, rtol=0)
