"""Converts the config.json of a Hugging Face model to a ModelConfig and back.

Reading is strict. A key sets a field of ModelConfig, or must have a supported value, or is known not to affect the
logits; any other key is an error that names it, unless it is null or false. Missing keys have the defaults of
transformers. Writing is verified by reading: a family fits a ModelConfig if reading its config.json gives the same
model.
"""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from nextllm_jax.config.model import LayerKind, ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.interop.canonical import first_that_fits, layer_kinds, shortest_pattern
from nextllm_jax.interop.families import (
    ACTIVATIONS,
    COMMON,
    DEFAULTS,
    FAMILIES,
    FIXED,
    HARMLESS,
    HARMLESS_PREFIXES,
    SIZES,
    UNSUPPORTED,
    Family,
)
from nextllm_jax.interop.huggingface_experts import read_experts, write_experts
from nextllm_jax.interop.huggingface_rope import read_rope, write_rope
from nextllm_jax.interop.keys import Keys, agreed

_MULTIPLIERS = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention_scale": "attention_multiplier",
    "logit_divisor": "logits_scaling",
}
_WITHOUT_ATTENTION_BIAS = ("qwen2", "qwen2_moe", "mistral", "mixtral", "phi3")
"""Families without a choice in the key attention_bias."""


def read_model_config(values: dict[str, Any], where: str, ignore_keys: Collection[str] = ()) -> ModelConfig:
    """The ModelConfig that the content of a config.json describes; `where` names the file in errors.

    Unsupported keys in `ignore_keys` are ignored. Raises InputError, which names the key, for all others, for
    unsupported values, and for keys that contradict each other.
    """
    keys = Keys(values, {}, where)
    if reason := UNSUPPORTED.get(str(keys.get("model_type"))):
        raise keys.refusal("model_type", reason)
    model_type = keys.choice("model_type", FAMILIES)
    family = FAMILIES[model_type]
    if model_type == "gemma":  # early releases meant the tanh approximation by gelu
        tanh = {name: "gelu_pytorch_tanh" for name in ("hidden_act", "hidden_activation") if values.get(name) == "gelu"}
        values = values | tanh
    keys = Keys(values, {**DEFAULTS, **family.defaults}, where)
    _require_supported(keys, family, ignore_keys)
    fields: dict[str, Any] = {ours: keys.size(name) for name, ours in SIZES.items()}
    heads = fields["num_heads"]
    fields |= {
        "num_kv_heads": heads if keys.get("num_key_value_heads") is None else keys.size("num_key_value_heads"),
        "head_dim": fields["embed_dim"] // heads if keys.get("head_dim") is None else keys.size("head_dim"),
        "context_length": keys.size("max_position_embeddings"),
        "norm_eps": float(keys.number("rms_norm_eps")),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
        "attention_bias": keys.flag("attention_bias"),
        "attention_output_bias": keys.flag("attention_bias"),
        "init_std": float(keys.number("initializer_range")) or ModelConfig.init_std,
        "activation": _activation(keys, model_type, family),
    }
    fields |= _layers(keys, model_type, fields["num_layers"])
    fields |= read_experts(keys, family, fields["num_layers"])
    fields |= _special(keys, model_type, fields)
    fields |= read_rope(keys, model_type, fields["head_dim"], fields["context_length"])
    return ModelConfig(**fields)


def _require_supported(keys: Keys, family: Family, ignore_keys: Collection[str]) -> None:
    architectures = keys.get("architectures")
    if architectures is not None and not (isinstance(architectures, list) and family.architecture in architectures):
        raise keys.refusal("architectures", f"it must be {family.architecture}")
    harmless = [name for name in keys.names() if name in HARMLESS or name.startswith(HARMLESS_PREFIXES)]
    known = COMMON | {*family.keys, family.activation_key}
    keys.require_supported(known, FIXED, {*ignore_keys, *harmless})


def _activation(keys: Keys, model_type: str, family: Family) -> str:
    name = family.activation_key
    if model_type.startswith("gemma"):
        _, stated = agreed((keys, "hidden_activation"), (keys, "hidden_act"))
        name = stated if model_type == "gemma" else name  # only Gemma 1 was published with either key
    return ACTIVATIONS[keys.choice(name, ACTIVATIONS)]


def _layers(keys: Keys, model_type: str, num_layers: int) -> dict[str, Any]:
    """The fields layer_pattern and sliding_window."""
    window = keys.get("sliding_window")
    if model_type in ("mistral", "mixtral", "phi3"):
        local = [window is not None] * num_layers
    elif model_type == "qwen3_moe":
        local = [_has_window_everywhere(keys)] * num_layers
    elif model_type in ("qwen2", "qwen2_moe", "qwen3", "smollm3", "gemma2", "gemma3_text"):
        local = _local_layers(keys, model_type, num_layers)
    else:
        local = [False] * num_layers
    kinds: list[LayerKind] = ["local" if is_local else "global" for is_local in local]
    if model_type == "smollm3":
        for layer, has_rope in enumerate(_rope_layers(keys, num_layers)):
            if not has_rope and local[layer]:
                raise keys.refusal("use_sliding_window", "a window on a layer without RoPE is not supported")
            kinds[layer] = kinds[layer] if has_rope else "global_nope"
    fields: dict[str, Any] = {"layer_pattern": shortest_pattern(kinds)}
    return fields | ({"sliding_window": keys.size("sliding_window")} if "local" in kinds else {})


def _has_window_everywhere(keys: Keys) -> bool:
    """Whether use_sliding_window is set, for a family that has windows in all layers or in none."""
    if not keys.flag("use_sliding_window") or keys.get("sliding_window") is None:
        return False
    if keys.get("max_window_layers") not in (None, 0):
        raise keys.refusal("max_window_layers", "transformers ignores it in this family; set it to 0")
    return True


def _local_layers(keys: Keys, model_type: str, num_layers: int) -> list[bool]:
    """Whether each layer has a window: by layer_types, or by the older keys, which must agree with it."""
    types = keys.get("layer_types")
    older, stated_by = _local_layers_by_pattern(keys, model_type, num_layers)
    if types is None:
        return older
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in [*known] for kind in types):
        raise keys.refusal("layer_types", f"it must list {' or '.join(known)} for each of {num_layers} layers")
    layers = [known[kind] for kind in types]
    if stated_by is not None and layers != older:
        raise keys.refusal("layer_types", f"it contradicts {stated_by} {json.dumps(keys.get(stated_by))}")
    return layers


def _local_layers_by_pattern(keys: Keys, model_type: str, num_layers: int) -> tuple[list[bool], str | None]:
    """Whether each layer has a window by the keys that are older than layer_types, and the key that states it."""
    if model_type in ("gemma2", "gemma3_text"):
        source, name = agreed((keys, "_sliding_window_pattern"), (keys, "sliding_window_pattern"))
        is_stated = model_type == "gemma3_text" and source.get(name) is not None
        period = source.size(name) if is_stated else 2 if model_type == "gemma2" else 6
        return [(layer + 1) % period != 0 for layer in range(num_layers)], name if is_stated else None
    if not keys.flag("use_sliding_window"):
        return [False] * num_layers, "use_sliding_window"
    if keys.get("sliding_window") is None:
        return [False] * num_layers, None
    if model_type == "smollm3":
        return [not has_rope for has_rope in _rope_layers(keys, num_layers)], None
    is_stated = keys.get("max_window_layers") is not None
    first = keys.number("max_window_layers") if is_stated else 28
    if model_type == "qwen2_moe":  # every second layer, up to the first without a window
        return [layer % 2 == 0 and layer < first for layer in range(num_layers)], None
    return [layer >= first for layer in range(num_layers)], "max_window_layers" if is_stated else None


def _rope_layers(keys: Keys, num_layers: int) -> list[bool]:
    """Whether each layer has RoPE: by no_rope_layers, or by no_rope_layer_interval, which must agree with it."""
    flags, is_stated = keys.get("no_rope_layers"), keys.get("no_rope_layer_interval") is not None
    interval = keys.size("no_rope_layer_interval") if is_stated else 4
    older = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if flags is None:
        return older
    if not isinstance(flags, list) or len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        raise keys.refusal("no_rope_layers", f"it must list 1 (RoPE) or 0 for each of {num_layers} layers")
    layers = [bool(flag) for flag in flags[:num_layers]]
    if is_stated and layers != older:
        raise keys.refusal("no_rope_layers", f"it contradicts no_rope_layer_interval {interval}")
    return layers


def _special(keys: Keys, model_type: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that only some families set."""
    embed_dim = sizes["embed_dim"]
    if model_type == "qwen2":
        return {"attention_bias": True, "attention_output_bias": False}
    if model_type == "qwen2_moe":
        return {"attention_bias": keys.flag("qkv_bias"), "attention_output_bias": False}
    if model_type in ("qwen3", "qwen3_moe"):
        return {"qk_norm": True}
    if model_type == "olmoe":
        if sizes["head_dim"] * sizes["num_heads"] != embed_dim:
            raise keys.refusal("head_dim", f"it must be hidden_size / num_attention_heads in {model_type}")
        return {"qk_norm": True, "qk_norm_over": "projection"}
    if model_type == "olmo2":
        return {"norm_placement": "post", "qk_norm": True, "qk_norm_over": "projection"}
    if model_type in ("mistral", "mixtral", "phi3") and keys.flag("attention_bias"):
        raise keys.refusal("attention_bias", "only False is supported for this model_type")
    if model_type.startswith("granite"):
        return {ours: float(keys.number(name)) if name in keys else 1.0 for ours, name in _MULTIPLIERS.items()}
    if not model_type.startswith("gemma"):
        return {}
    fields: dict[str, Any] = {"norm_scale_offset": 1.0, "embedding_scale": math.sqrt(embed_dim)}
    if model_type == "gemma":
        return fields
    fields |= {"norm_placement": "sandwich", "attention_scale": keys.positive("query_pre_attn_scalar") ** -0.5}
    fields["logit_soft_cap"] = keys.optional("final_logit_softcapping")
    if model_type == "gemma2":
        return fields | {"attention_soft_cap": keys.optional("attn_logit_softcapping")}
    if keys.get("attn_logit_softcapping") is not None:
        raise keys.refusal("attn_logit_softcapping", "transformers does not apply it in this family; set it to null")
    return fields | {"qk_norm": True}


def write_model_config(config: ModelConfig, *, model_type: str | None = None) -> dict[str, Any]:
    """The config.json for a model, of the family `model_type` or else of the first family that fits.

    Raises InputError, which names the fields, if no family can represent the model.
    """
    sparse = config.num_experts > 0
    candidates = [name for name, family in FAMILIES.items() if sparse == (family.experts_key is not None)]
    candidates = [model_type] if model_type else candidates
    read = lambda candidate: read_model_config(_values(config, candidate), "its config.json")  # noqa: E731
    failure = "no Hugging Face model_type can represent this model"
    return _values(config, first_that_fits(config, candidates, read, failure))


def _values(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The config.json for a model in a family, as close as possible."""
    if model_type not in FAMILIES:
        raise InputError(f"model_type is {model_type!r}; there are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    activation = {ours: name for name, ours in ACTIVATIONS.items()}[config.activation]
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        **{name: getattr(config, ours) for name, ours in SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        "max_position_embeddings": config.context_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias and model_type not in _WITHOUT_ATTENTION_BIAS,
        **write_rope(config, model_type),
        **write_experts(config, family),
    }
    if family.activation_key != "hidden_act":
        values[family.activation_key] = activation
    kinds = layer_kinds(config)
    if "sliding_window" in family.keys:
        values["sliding_window"] = config.sliding_window if "local" in kinds else None
    if "use_sliding_window" in family.keys:
        values["use_sliding_window"] = "local" in kinds
        first = [*kinds, "local"].index("local")
        if set(kinds[first:]) <= {"local"}:
            values["max_window_layers"] = first
    if "layer_types" in family.keys:
        values["layer_types"] = ["sliding_attention" if kind == "local" else "full_attention" for kind in kinds]
    if "no_rope_layers" in family.keys:
        values["no_rope_layers"] = [int(kind != "global_nope") for kind in kinds]
    if "query_pre_attn_scalar" in family.keys:
        scalar = (config.attention_scale or config.head_dim**-0.5) ** -2
        values["query_pre_attn_scalar"] = round(scalar) if math.isclose(scalar, round(scalar)) else scalar
        values["final_logit_softcapping"] = config.logit_soft_cap
        values["attn_logit_softcapping"] = config.attention_soft_cap if model_type == "gemma2" else None
    if "qkv_bias" in family.keys:
        values["qkv_bias"] = config.attention_bias
    if model_type.startswith("granite"):
        values |= {name: getattr(config, ours) or config.head_dim**-0.5 for ours, name in _MULTIPLIERS.items()}
    return values
