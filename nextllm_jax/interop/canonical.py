"""Which configs describe the same model, and which external format can represent a model."""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from nextllm_jax.config.model import EXECUTION_FIELDS, TRAINING_FIELDS, LayerKind, ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.interop.huggingface_rope import scaling_fields
from nextllm_jax.ops import rope

Kind = TypeVar("Kind", bound=str)

_OF_EXPERTS = (
    "experts_per_token", "expert_mlp_dim", "mlp_pattern", "shared_expert_mlp_dim", "shared_expert_gate",
    "router_scores", "normalize_expert_weights", "expert_weight_scale", "selection_bias",
)  # fmt: skip
"""Fields that have no effect without experts."""
_WITHOUT_EFFECT = ("param_dtype", "zero_init_outputs", *TRAINING_FIELDS, *EXECUTION_FIELDS)
"""Fields that have no effect on logits, up to rounding."""


def shortest_pattern(kinds: list[Kind]) -> tuple[Kind, ...]:
    """The shortest prefix of the layers' kinds that gives all of them when it is repeated."""
    for size in range(1, len(kinds)):
        if all(kind == kinds[i % size] for i, kind in enumerate(kinds)):
            return tuple(kinds[:size])
    return tuple(kinds)


def first_that_fits(
    config: ModelConfig,
    candidates: Sequence[str],
    read: Callable[[str], ModelConfig],
    failure: str,
    same: Callable[[Any, Any], bool] = operator.eq,
) -> str:
    """The first candidate for which `read` returns the config of the same model.

    `read` reads back what would be written for a candidate. If none fits, raises InputError that begins with `failure`
    and names the fields in which the closest candidate differs.
    """
    differences: dict[str, list[str]] = {}
    refusals: dict[str, list[str]] = {}
    wanted = canonical(config)
    for candidate in candidates:
        try:
            found = canonical(read(candidate))
        except InputError as error:
            refusals[candidate] = [str(error)]
            continue
        differences[candidate] = [
            f"model.{field.name} {getattr(config, field.name)}"
            for field in dataclasses.fields(ModelConfig)
            if not same(getattr(found, field.name), getattr(wanted, field.name))
        ]
        if not differences[candidate]:
            return candidate
    differences = differences or refusals
    nearest = min(differences, key=lambda candidate: len(differences[candidate]))
    raise InputError(f"{failure}; the closest is {nearest}, which differs in {', '.join(differences[nearest])}")


def layer_kinds(config: ModelConfig) -> list[LayerKind]:
    """The kind of each layer."""
    pattern = config.layer_pattern
    return [pattern[layer % len(pattern)] for layer in range(config.num_layers)]


def canonical(config: ModelConfig) -> ModelConfig:
    """The config in a canonical form: two configs of the same model become equal.

    Fields that have no effect on logits get their defaults. None is replaced by the value that it stands for where that
    is a number.
    """
    kinds, plain = layer_kinds(config), ModelConfig()
    scale = config.attention_scale or 1 / math.sqrt(config.head_dim)
    attention_factor = config.rope_attention_factor or {
        "yarn": rope.yarn_attention_factor(config.rope_scaling_factor),
        "longrope": rope.longrope_attention_factor(config.rope_scaling_factor, config.rope_original_context_length),
    }.get(config.rope_scaling, 1.0)
    fields: dict[str, Any] = {
        "layer_pattern": shortest_pattern(kinds),
        "attention_scale": float(f"{scale:.9g}"),
        "embedding_scale": float(f"{config.embedding_scale:.9g}"),
        "rope_attention_factor": float(f"{attention_factor:.9g}"),
        "rotary_dim": None if config.rotary_dim == config.head_dim else config.rotary_dim,
        **{name: getattr(plain, name) for name in _WITHOUT_EFFECT},
    }
    ignored = [] if "local" in kinds else ["sliding_window", "rope_local_theta"]
    ignored += [] if config.qk_norm else ["qk_norm_over"]
    ignored += [] if config.num_experts else _OF_EXPERTS
    if config.num_experts:
        sparse = config.sparse_layers
        mlps = ["sparse" if layer in sparse else "dense" for layer in range(config.num_layers)]
        ignored += ["mlp_dim"] if len(sparse) == config.num_layers else []
        fields |= {"mlp_pattern": shortest_pattern(mlps), "expert_mlp_dim": config.expert_mlp_dim or config.mlp_dim}
    scaling = {name for field in dataclasses.fields(ModelConfig) if (name := field.name).startswith("rope_")}
    used = scaling_fields(config.rope_scaling).values()
    ignored += scaling - {"rope_theta", "rope_local_theta", "rope_scaling", *used}
    return dataclasses.replace(config, **fields | {name: getattr(plain, name) for name in ignored})
