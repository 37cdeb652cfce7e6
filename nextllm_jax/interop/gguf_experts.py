"""Reads and writes the metadata of a GGUF file about experts.

Whether the weights of the chosen experts are divided by their sum is not stored in files, but defined by llama.cpp's
code, as is the softmax over all experts. All layers of these architectures have experts.
"""

from typing import Any

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.interop.keys import Keys

COUNT, _USED, WIDTH, SHARED_WIDTH = (
    "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length",
)  # fmt: skip
EXPERTS = (COUNT, _USED, "expert_weights_norm", "expert_gating_func")
"""Keys of every architecture that can have experts."""
_NOT_NORMALIZED = ("olmoe", "qwen2moe")
_SOFTMAX = 1


def read_experts(keys: Keys, architecture: str, known: tuple[str, ...], mlp_dim: int) -> dict[str, Any]:
    """The fields of ModelConfig about experts, given the keys that the architecture has in addition to common ones.

    Raises InputError, which names the key, for wrong values.
    """
    if COUNT not in known or (architecture == "llama" and not keys.get(COUNT)):
        return {}
    fields: dict[str, Any] = {
        "num_experts": keys.size(COUNT),
        "experts_per_token": keys.size(_USED),
        "normalize_expert_weights": architecture not in _NOT_NORMALIZED,
    }
    if keys.get("expert_weights_norm") not in (None, fields["normalize_expert_weights"]):
        raise keys.refusal("expert_weights_norm", "llama.cpp ignores it in this architecture; remove it")
    if keys.get("expert_gating_func") not in (None, _SOFTMAX):
        raise keys.refusal("expert_gating_func", f"only {_SOFTMAX}, which is softmax, is supported")
    if WIDTH in known:
        fields["expert_mlp_dim"] = keys.size(WIDTH) if WIDTH in keys else mlp_dim // fields["experts_per_token"]
    if architecture == "qwen2moe":
        shared = keys.size(SHARED_WIDTH) if SHARED_WIDTH in keys else mlp_dim
        fields |= {"shared_expert_mlp_dim": shared, "shared_expert_gate": True}
    elif SHARED_WIDTH in known and keys.get(SHARED_WIDTH):
        fields["shared_expert_mlp_dim"] = keys.size(SHARED_WIDTH)
    return fields


def write_experts(config: ModelConfig, known: tuple[str, ...]) -> dict[str, Any]:
    """The metadata about experts of a model, in an architecture with the keys `known` in addition to common ones."""
    if COUNT not in known or not config.num_experts:
        return {}
    width = WIDTH if WIDTH in known else "feed_forward_length"
    values: dict[str, Any] = {
        COUNT: config.num_experts,
        _USED: config.experts_per_token,
        width: config.expert_mlp_dim or config.mlp_dim,
    }
    if SHARED_WIDTH in known and config.shared_expert_mlp_dim:
        values[SHARED_WIDTH] = config.shared_expert_mlp_dim
    return values
