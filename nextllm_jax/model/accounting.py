"""What a model costs, by arithmetic alone: parameters, FLOPs and cache bytes."""

from nextllm_jax.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model, padded vocabulary included; a tied embedding counts once."""
    tables = 1 if config.tie_embeddings else 2
    return tables * config.vocab_size * config.embed_dim + config.num_layers * _matrices(config) + _vectors(config)


def _matrices(config: ModelConfig) -> int:
    """Weights of one layer that multiply."""
    attention = config.embed_dim * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    return attention + 3 * config.embed_dim * config.mlp_dim


def _vectors(config: ModelConfig) -> int:
    """Scales of all norms and all biases."""
    embed, heads, kv_heads, head = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    layer = embed * (4 if config.norm_placement == "sandwich" else 2)
    layer += head * (heads + 2 * kv_heads) if config.attention_bias else 0
    layer += embed if config.attention_output_bias else 0
    if config.qk_norm:
        layer += 2 * head if config.qk_norm_over == "head" else head * (heads + kv_heads)
    return config.num_layers * layer + embed


def parameter_bytes(config: ModelConfig) -> int:
    """Bytes of the parameters as they are kept."""
    return parameter_count(config) * _width(config.param_dtype)


def moment_bytes(config: ModelConfig, first_moment_dtype: str = "float32") -> int:
    """Bytes of AdamW's two moments, the second of which is kept as the parameters are."""
    return parameter_count(config) * (_width(first_moment_dtype) + _width(config.param_dtype))


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs per token: 6 per weight that multiplies (2 forward, 4 backward) plus attention.

    The embedding lookup multiplies nothing; the head does. Attention counts the causal half of the
    scores: 12 N H S / 2 per layer and token (2 products, forward and backward), fewer in local layers.
    Source: the accounting of Chowdhery et al. 2022 (PaLM, appendix B), with causality.
    """
    weights = config.num_layers * _matrices(config) + config.vocab_size * config.embed_dim
    pattern = config.layer_pattern
    visible = 0.0
    for layer in range(config.num_layers):
        local = pattern[layer % len(pattern)] == "local"
        visible += _mean_visible(sequence_length, config.sliding_window if local else sequence_length)
    return 6.0 * weights + 12.0 * config.num_heads * config.head_dim * visible


def _mean_visible(sequence_length: int, window: int) -> float:
    """Mean number of positions that a query sees, itself included."""
    window = min(window, sequence_length)
    return window - window * (window - 1) / (2 * sequence_length)


def kv_cache_bytes(config: ModelConfig, *, batch_size: int, length: int, bytes_per_value: int) -> int:
    """Bytes of a KV cache for `batch_size` rows of `length` positions."""
    values = 2 * config.num_layers * batch_size * length * config.num_kv_heads * config.head_dim
    return values * bytes_per_value
