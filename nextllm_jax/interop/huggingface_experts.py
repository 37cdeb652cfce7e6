"""Reads and writes the keys of a config.json that say which layers have experts, and how these are chosen."""

from typing import Any

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.interop.canonical import shortest_pattern
from nextllm_jax.interop.families import Family
from nextllm_jax.interop.keys import Keys, agreed

_COUNTS = ("num_experts", "num_local_experts")
"""Keys of the number of experts; transformers reads both in some families."""


def read_experts(keys: Keys, family: Family, num_layers: int) -> dict[str, Any]:
    """The fields of ModelConfig about experts; none in a family of dense models.

    Raises InputError, which names the key, for wrong values.
    """
    if family.experts_key is None:
        return {}
    others = [name for name in _COUNTS if name in family.keys and name != family.experts_key]
    source, name = agreed(*((keys, name) for name in (*others, family.experts_key)))
    fields: dict[str, Any] = {
        "num_experts": source.size(name),
        "experts_per_token": keys.size("num_experts_per_tok"),
        "normalize_expert_weights": "norm_topk_prob" not in family.keys or keys.flag("norm_topk_prob"),
    }
    if "moe_intermediate_size" in family.keys:
        fields["expert_mlp_dim"] = keys.size("moe_intermediate_size")
    if "shared_expert_intermediate_size" in family.keys:
        fields |= {
            "shared_expert_mlp_dim": keys.size("shared_expert_intermediate_size"), "shared_expert_gate": True
        }  # fmt: skip
    if "shared_intermediate_size" in family.keys and keys.get("shared_intermediate_size") != 0:
        fields["shared_expert_mlp_dim"] = keys.size("shared_intermediate_size")
    if "mlp_only_layers" in family.keys:
        sparse = _sparse_layers(keys, num_layers)
        fields["mlp_pattern"] = shortest_pattern(["sparse" if is_sparse else "dense" for is_sparse in sparse])
    return fields


def _sparse_layers(keys: Keys, num_layers: int) -> list[bool]:
    """Whether each layer has experts."""
    dense, step = keys.get("mlp_only_layers") or [], keys.size("decoder_sparse_step")
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < num_layers for layer in dense):
        raise keys.refusal("mlp_only_layers", f"it must list numbers of layers, which are below {num_layers}")
    sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]
    if not any(sparse):
        name = "mlp_only_layers" if dense else "decoder_sparse_step"
        raise keys.refusal(name, f"it leaves none of {num_layers} layers with experts")
    return sparse


def write_experts(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys about experts of a config.json; none in a family of dense models."""
    if family.experts_key is None:
        return {}
    expert_mlp_dim = config.expert_mlp_dim or config.mlp_dim
    has_width = "moe_intermediate_size" in family.keys
    values: dict[str, Any] = {
        family.experts_key: config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size" if has_width else "intermediate_size": expert_mlp_dim,
    }
    if "norm_topk_prob" in family.keys:
        values["norm_topk_prob"] = config.normalize_expert_weights
    for name in ("shared_expert_intermediate_size", "shared_intermediate_size"):
        if name in family.keys:
            values[name] = config.shared_expert_mlp_dim
    if "mlp_only_layers" in family.keys:
        dense = [layer for layer in range(config.num_layers) if layer not in config.sparse_layers]
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return values
