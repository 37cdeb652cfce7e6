"""Tiny models of every family in transformers, with random weights that make logits of order 1, saved to disk."""

from pathlib import Path
from typing import Any

import pytest

TIME = 512

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
PHI3: dict[str, Any] = {"tie_word_embeddings": False, "head_dim": 8}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6, "logits_scaling": 1.7,
    "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "intermediate_size": 40}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_mha": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": False}),
    "llama_mqa_head_dim_24": ("Llama", {"num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True}),
    "llama3_tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_bias": ("Llama", {"attention_bias": True}),
    "mistral_window": ("Mistral", {"sliding_window": 100, "head_dim": 80}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}}),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "no_rope_layer_interval": 2}),
    "granite": ("Granite", GRANITE),
    "phi3_window": ("Phi3", {**PHI3, "sliding_window": 100}),
    "phi3_longrope_long": (
        "Phi3", {**PHI3, "rope_parameters": {**LONGROPE}, "original_max_position_embeddings": 128},
    ),
    "phi3_longrope_short_partial": (
        "Phi3",
        {
            "num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5}, "original_max_position_embeddings": 1024,
        },
    ),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 24, "sliding_window": 100, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 16, "num_hidden_layers": 7, "sliding_window": 100, "query_pre_attn_scalar": 20,
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
    "mixtral_window": (
        "Mixtral", {**EXPERTS, "num_local_experts": 4, "sliding_window": 100, "tie_word_embeddings": True},
    ),
    "olmoe": ("Olmoe", {**EXPERTS, "num_experts": 5, "attention_bias": True}),
    "qwen2_moe_window": (
        "Qwen2Moe",
        {
            **EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 56,
            "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **EXPERTS, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 24,
            "norm_topk_prob": True, "decoder_sparse_step": 2,
        },
    ),
    "granitemoe": ("GraniteMoe", {**EXPERTS, **GRANITE, "num_local_experts": 4}),
    "granitemoe_shared": (
        "GraniteMoeShared", {**EXPERTS, **GRANITE, "num_local_experts": 4, "shared_intermediate_size": 56},
    ),
}  # fmt: skip


def make_model(case: str) -> Any:
    """The transformers model of a case, in float32."""
    torch = pytest.importorskip("torch", reason="torch is missing; install the extra 'parity'")
    transformers = pytest.importorskip("transformers", reason="transformers is missing; install the extra 'parity'")
    family, changes = CASES[case]
    config = getattr(transformers, f"{family}Config")(**SIZES | changes, attn_implementation="eager")
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    offset = 0.0 if family.startswith("Gemma") else 1.0
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if name.endswith("norm.weight"):
            values = offset + 0.2 * values
        elif name.endswith("bias"):
            values = 0.2 * values
        else:
            values = values / weight.shape[-1] ** 0.5
        weight.data.copy_(values)
    return model


def save_model(case: str, directory: Path, **options: Any) -> Any:
    """Save the model of a case and return it."""
    model = make_model(case)
    model.save_pretrained(directory, **options)
    return model
