"""The supported Hugging Face model types, with the defaults and the supported values of their config.json keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nextllm_jax.interop.names import GRANITE_MOE, MIXTRAL, PHI3

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "initializer_range": 0.02,
    "sliding_window": None,
}
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192}
_WINDOWED = {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type: its class in transformers, its defaults, and the keys that not all model types have."""

    architecture: str
    defaults: dict[str, Any]
    keys: tuple[str, ...] = ()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names of tensors that differ from those of most families, by ours."""
    activation_key: str = "hidden_act"
    experts_key: str | None = None
    """The key of the number of experts; None: the layers are dense."""

    @property
    def fused(self) -> set[str]:
        """The modules, such as q, whose matrices files store in one tensor with others."""
        shared = [name for name in self.names.values() if [*self.names.values()].count(name) > 1]
        return {ours.split("/")[-2] for ours, name in self.names.items() if name in shared}


_LAYERED = ("layer_types", "sliding_window")
_QWEN = (*_LAYERED, "use_sliding_window", "max_window_layers")
_MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
_QWEN_MOE = (
    "use_sliding_window", "sliding_window", "max_window_layers", "num_experts", "num_experts_per_tok",
    "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
)  # fmt: skip
_GRANITE_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", {}),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
        ("sliding_window",),
    ),
    "qwen2": Family("Qwen2ForCausalLM", {**_WINDOWED, "num_key_value_heads": 32}, _QWEN),
    "qwen3": Family("Qwen3ForCausalLM", {**_WINDOWED, "num_key_value_heads": 32, "head_dim": 128}, _QWEN),
    "olmo2": Family("Olmo2ForCausalLM", {"rms_norm_eps": 1e-5}),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "rope_theta": 2_000_000.0,
            "use_sliding_window": False,
        },
        (*_QWEN, "no_rope_layers", "no_rope_layer_interval"),
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {},
        _MULTIPLIERS,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        ("sliding_window",),
        names=PHI3,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        {**_GEMMA, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
        ("hidden_activation",),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **_GEMMA,
            "num_key_value_heads": 4,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        (*_LAYERED, "hidden_act", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        activation_key="hidden_activation",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **_GEMMA,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "final_logit_softcapping": None,
        },
        (
            *_LAYERED, "hidden_act", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
            "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern",
        ),
        activation_key="hidden_activation",
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
            "num_local_experts": 8, "num_experts_per_tok": 2,
        },
        ("sliding_window", "num_experts", "num_local_experts", "num_experts_per_tok"),
        names=MIXTRAL,
        experts_key="num_local_experts",
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        ("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"),
        experts_key="num_experts",
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        {
            **_WINDOWED, "num_key_value_heads": 16, "qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        (*_QWEN_MOE, "layer_types", "qkv_bias", "shared_expert_intermediate_size"),
        experts_key="num_experts",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            **_WINDOWED, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
            "moe_intermediate_size": 768, "norm_topk_prob": False, "decoder_sparse_step": 1,
        },
        (*_QWEN_MOE, "num_local_experts"),
        experts_key="num_experts",
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM", _GRANITE_EXPERTS, (*_MULTIPLIERS, *_GRANITE_EXPERTS), names=GRANITE_MOE,
        experts_key="num_local_experts",
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedForCausalLM",
        {**_GRANITE_EXPERTS, "shared_intermediate_size": 0},
        (*_MULTIPLIERS, *_GRANITE_EXPERTS, "shared_intermediate_size"),
        names=GRANITE_MOE,
        experts_key="num_local_experts",
    ),
}  # fmt: skip
UNSUPPORTED = {"gpt_oss": "attention sinks, biases of experts and MXFP4 weights are not supported"}
"""Why the models of well-known model types are refused."""

# Keys that every family supports.
COMMON = {
    *SIZES, "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings",
    "tie_word_embeddings", "attention_bias", "initializer_range", "rope_theta", "rope_scaling", "rope_parameters",
    "partial_rotary_factor", "original_max_position_embeddings", "model_type", "architectures",
}  # fmt: skip
# Keys that are ignored if they have one of these values. Any other value would change the results.
FIXED: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None),
    "use_bidirectional_attention": (False, None),
    "attn_logit_softcapping": (None,),  # transformers ignores it in the families whose `keys` lack it
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_decoder": (True, False, None),
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "sliding_window": (None,),
    "layer_types": (None,),
    "hidden_activation": (None,),
    "clip_qkv": (None,),
}
# Keys that do not affect the logits: bookkeeping, training, generation.
HARMLESS = {
    "_name_or_path", "_attn_implementation_autoset", "attn_implementation", "auto_map", "transformers_version",
    "torch_dtype", "dtype", "use_cache", "cache_implementation", "is_llama_config", "transformers.js_config",
    "pretraining_tp", "attention_dropout", "embd_pdrop", "resid_pdrop", "hidden_dropout", "classifier_dropout",
    "output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "gradient_checkpointing",
    "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class", "prefix",
    "finetuning_task", "chunk_size_feed_forward", "pruned_heads", "tie_encoder_decoder", "tf_legacy_loss",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "unk_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "remove_invalid_values", "exponential_decay_length_penalty", "cross_attention_hidden_size", "unsloth_version",
    "unsloth_fixed", "max_sequence_length", "neftune_noise_alpha", "gradient_checkpointing_kwargs",
    "initializer_factor", "hidden_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop", "dropout", "ffn_dropout",
    "embedding_dropout", "residual_dropout", "classifier_bias", "label_smoothing", "loss_type", "ignore_index",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "model_max_length",
    "padding_side", "use_flash_attention", "use_flash_attention_2", "use_flash_attn",
    "_flash_attn_2_enabled", "flash_attn", "use_sdpa", "model_name", "license",
}  # fmt: skip
HARMLESS_PREFIXES = ("lora_",)
"""Beginnings of other keys that concern only training."""
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
