"""The rotary part of a config.json, in its older form (rope_theta, rope_scaling) and its newer (rope_parameters)."""

import math
from typing import Any

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.interop.keys import Keys

_ORIGINAL = "original_max_position_embeddings"
# The keys of each kind of scaling, besides its name and the base.
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": (
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", _ORIGINAL,
    ),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", _ORIGINAL),
}  # fmt: skip
_GEMMA3 = "gemma3_text"


def read_rope(keys: Keys, model_type: str, head_dim: int, context_length: int) -> dict[str, Any]:
    """The rotary fields of ModelConfig. Raises InputError for a kind or a key that is not supported."""
    name = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    rope = keys.part(name)
    fields: dict[str, Any] = {}
    if model_type == _GEMMA3:
        layers = keys.part("rope_parameters")
        if "rope_type" in layers:
            raise layers.refusal("rope_type", "this family has full_attention and sliding_attention below it")
        local = layers.part("sliding_attention")
        fields["rope_local_theta"] = local.optional("rope_theta") or keys.number("rope_local_base_freq")
        if _kind(local, model_type) != "default":
            raise local.refusal("rope_type", "only default is supported for the local layers")
        rope = layers.part("full_attention") if name == "rope_parameters" else rope
    fields["rope_theta"] = rope.optional("rope_theta") or keys.number("rope_theta")
    fields |= _rotary_dim(keys, rope, model_type, head_dim)
    kind = _kind(rope, model_type)
    if kind == "default":
        return fields
    if model_type == "phi3" and kind != "longrope":
        raise rope.refusal("rope_type", "this family has default and longrope")
    original = context_length
    if kind in ("llama3", "yarn", "longrope"):
        source = keys if keys.get(_ORIGINAL) is not None else rope
        original = source.size(_ORIGINAL) if source.get(_ORIGINAL) is not None else context_length
        fields["rope_original_context_length"] = original
    factor = rope.optional("factor") if kind in ("yarn", "longrope") else rope.number("factor")
    fields["rope_scaling"] = kind
    fields["rope_scaling_factor"] = context_length / original if factor is None else factor
    return fields | _OF_KIND[kind](rope, fields["rope_scaling_factor"])


def _kind(rope: Keys, model_type: str) -> str:
    """The kind of scaling, with all its keys known."""
    name = "type" if "rope_type" not in rope and "type" in rope else "rope_type"
    kind = "default" if rope.get(name) is None else rope.get(name)
    if model_type == "phi3" and kind in ("su", "yarn"):  # as early releases called it
        kind = "longrope"
    if kind not in _KEYS:
        raise rope.refusal(name, f"there are {', '.join(_KEYS)}")
    for key in rope.names():
        if key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_KEYS[kind]):
            raise rope.refusal(key, f"what it means for {kind} is not known here")
    return kind


def _rotary_dim(keys: Keys, rope: Keys, model_type: str, head_dim: int) -> dict[str, Any]:
    source = rope if "partial_rotary_factor" in rope else keys
    share = source.optional("partial_rotary_factor")
    if share in (None, 1.0):
        return {}
    if model_type != "phi3":
        raise source.refusal("partial_rotary_factor", "only 1 is supported for this model_type")
    return {"rotary_dim": int(head_dim * share)}


def _no_more(rope: Keys, factor: float) -> dict[str, Any]:
    return {}


def _llama3(rope: Keys, factor: float) -> dict[str, Any]:
    names = {"rope_low_freq_factor": "low_freq_factor", "rope_high_freq_factor": "high_freq_factor"}
    return {ours: rope.number(name) for ours, name in names.items()}


def _yarn(rope: Keys, factor: float) -> dict[str, Any]:
    if rope.get("truncate") not in (None, True):
        raise rope.refusal("truncate", "only true is supported")
    attention_factor = rope.optional("attention_factor")
    scale, scale_all = rope.optional("mscale"), rope.optional("mscale_all_dim")
    if attention_factor is None and scale and scale_all and factor > 1:
        attention_factor = (0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1)
    return {
        "rope_attention_factor": attention_factor,
        "rope_beta_fast": rope.optional("beta_fast") or 32.0,
        "rope_beta_slow": rope.optional("beta_slow") or 1.0,
    }


def _longrope(rope: Keys, factor: float) -> dict[str, Any]:
    return {
        "rope_attention_factor": rope.optional("attention_factor"),
        "rope_short_factors": rope.numbers("short_factor"),
        "rope_long_factors": rope.numbers("long_factor"),
    }


_OF_KIND = {"linear": _no_more, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def write_rope(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The rotary keys of a config.json, in the older form, which every reader knows."""
    values: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": _scaling(config, model_type)}
    if model_type == _GEMMA3 and config.rope_local_theta is not None:
        values["rope_local_base_freq"] = config.rope_local_theta
    if model_type == "phi3":
        values["partial_rotary_factor"] = (config.rotary_dim or config.head_dim) / config.head_dim
        if config.rope_scaling != "none":
            values[_ORIGINAL] = config.rope_original_context_length
    return values


def _scaling(config: ModelConfig, model_type: str) -> dict[str, Any] | None:
    kind, factor, original = config.rope_scaling, config.rope_scaling_factor, config.rope_original_context_length
    if kind == "none":
        return None
    values: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind != "linear":
        values[_ORIGINAL] = original
    if kind == "llama3":
        values |= {"low_freq_factor": config.rope_low_freq_factor, "high_freq_factor": config.rope_high_freq_factor}
    if kind == "yarn":
        values |= {"beta_fast": config.rope_beta_fast, "beta_slow": config.rope_beta_slow}
    if kind == "longrope":
        values |= {"short_factor": list(config.rope_short_factors), "long_factor": list(config.rope_long_factors)}
    if config.rope_attention_factor is not None:
        values["attention_factor"] = config.rope_attention_factor
    if model_type == "phi3":
        # Older readers of this family take these three alone; the rest stands beside them.
        values = {"type": kind, **{name: value for name, value in values.items() if name.endswith("_factor")}}
        if not math.isclose(factor, config.context_length / original):
            values["factor"] = factor
    return values
