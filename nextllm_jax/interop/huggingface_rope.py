"""Reads and writes the RoPE settings of a config.json: the older rope_theta and rope_scaling, or rope_parameters."""

import math
from typing import Any

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.interop.keys import Keys, agreed

_ORIGINAL = "original_max_position_embeddings"
_FIELDS = {
    "factor": "rope_scaling_factor",
    _ORIGINAL: "rope_original_context_length",
    "attention_factor": "rope_attention_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "short_factor": "rope_short_factors",
    "long_factor": "rope_long_factors",
}
# The keys of each kind of scaling, in addition to its name and the base.
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"),
}
_GEMMA3 = "gemma3_text"


def scaling_fields(kind: str) -> dict[str, str]:
    """The ModelConfig field for each key of a kind of scaling, which is a value of `ModelConfig.rope_scaling`."""
    return {key: _FIELDS[key] for key in _KEYS.get(kind, ()) if key in _FIELDS}


def read_rope(keys: Keys, model_type: str, head_dim: int, context_length: int) -> dict[str, Any]:
    """The RoPE fields of ModelConfig.

    Raises InputError for an unsupported kind of scaling or key, and for two keys that contradict each other.
    """
    older, newer = keys.part("rope_scaling"), keys.part("rope_parameters")
    fields: dict[str, Any] = {}
    if model_type == _GEMMA3:
        if "rope_type" in newer:
            raise newer.refusal("rope_type", "this model_type needs full_attention and sliding_attention instead")
        local, newer = newer.part("sliding_attention"), newer.part("full_attention")
        source, name = agreed((local, "rope_theta"), (keys, "rope_local_base_freq"))
        fields["rope_local_theta"] = source.number(name)
        if _settings(local, local, model_type)[0] != "default":
            raise local.refusal("rope_type", "only default is supported for the local layers")
    kind, rope = _settings(newer, older, model_type)
    source, name = agreed((newer, "rope_theta"), (older, "rope_theta"), (keys, "rope_theta"))
    fields["rope_theta"] = source.number(name)
    fields |= _rotary_dim(keys, rope, model_type, head_dim)
    if kind == "default":
        return fields
    if model_type == "phi3" and kind != "longrope":
        raise rope.refusal("rope_type", "only default and longrope are supported for this model_type")
    original = context_length
    if kind != "linear":
        source, name = agreed((rope, _ORIGINAL), (keys, _ORIGINAL))
        original = source.size(name) if source.get(name) is not None else context_length
        fields["rope_original_context_length"] = original
    factor = rope.optional("factor") if kind in ("yarn", "longrope") else rope.number("factor")
    fields["rope_scaling"] = kind
    fields["rope_scaling_factor"] = context_length / original if factor is None else factor
    for key, ours in scaling_fields(kind).items():
        if ours in fields:
            continue
        if ours.endswith("_factors"):
            fields[ours] = rope.numbers(key)
        else:
            fields[ours] = rope.number(key) if kind == "llama3" else rope.optional(key) or getattr(ModelConfig, ours)
    if kind == "yarn" and fields["rope_attention_factor"] is None:
        fields["rope_attention_factor"] = _attention_factor(rope, fields["rope_scaling_factor"])
    return fields


def _settings(newer: Keys, older: Keys, model_type: str) -> tuple[str, Keys]:
    """(kind of scaling, settings) of two objects, which must agree.

    Raises InputError for an unsupported kind or key.
    """
    places = [(keys, name) for keys in (newer, older) for name in ("rope_type", "type")]
    source, name = agreed(*places)
    choices = [*_KEYS, "su"] if model_type == "phi3" else _KEYS
    kind = "default" if source.get(name) is None else source.choice(name, choices)
    if model_type == "phi3" and kind in ("su", "yarn"):  # the names of longrope in early releases
        kind = "longrope"
    for keys in (newer, older):
        for key in keys.names():
            if key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_KEYS[kind]):
                raise keys.refusal(key, f"this key is not supported for {kind}")
    stated = {key: agreed((newer, key), (older, key)) for key in (*older.names(), *newer.names())}
    values = {key: source.get(name) for key, (source, name) in stated.items()}
    rope = Keys(values, {}, newer.where if newer.names() else older.where)
    if kind == "yarn" and rope.get("truncate") not in (None, True):
        raise rope.refusal("truncate", "only true is supported")
    return kind, rope


def _rotary_dim(keys: Keys, rope: Keys, model_type: str, head_dim: int) -> dict[str, Any]:
    source, name = agreed((rope, "partial_rotary_factor"), (keys, "partial_rotary_factor"))
    share = source.optional(name)
    if share in (None, 1.0):
        return {}
    if model_type != "phi3":
        raise source.refusal(name, "only 1 is supported for this model_type")
    return {"rotary_dim": int(head_dim * share)}


def _attention_factor(rope: Keys, factor: float) -> float | None:
    """The attention factor of yarn from DeepSeek's mscale and mscale_all_dim; None if these are not set."""
    scales = rope.optional("mscale"), rope.optional("mscale_all_dim")
    if not all(scales) or factor <= 1:
        return None
    one, all_dim = (0.1 * (scale or 0) * math.log(factor) + 1 for scale in scales)
    return one / all_dim


def write_rope(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The RoPE keys of a config.json, in the older form, which every version of transformers reads."""
    values: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": _scaling(config, model_type)}
    if model_type == _GEMMA3 and config.rope_local_theta is not None:
        values["rope_local_base_freq"] = config.rope_local_theta
    if model_type == "phi3":
        values["partial_rotary_factor"] = (config.rotary_dim or config.head_dim) / config.head_dim
        if config.rope_scaling != "none":
            values[_ORIGINAL] = config.rope_original_context_length
    return values


def _scaling(config: ModelConfig, model_type: str) -> dict[str, Any] | None:
    kind = config.rope_scaling
    if kind == "none":
        return None
    found = {key: getattr(config, ours) for key, ours in scaling_fields(kind).items()}
    values: dict[str, Any] = {"rope_type": kind}
    values |= {key: list(x) if isinstance(x, tuple) else x for key, x in found.items() if x is not None}
    if model_type == "phi3":
        # Older readers of this family accept only these three keys here; the others are top-level keys.
        values = {"type": kind, **{name: value for name, value in values.items() if name.endswith("_factor")}}
        if not math.isclose(config.rope_scaling_factor, config.context_length / config.rope_original_context_length):
            values["factor"] = config.rope_scaling_factor
    return values
