"""Converts the metadata of a GGUF file to a ModelConfig and back.

Reading is strict: an unknown key of the architecture is an error. Some properties of an architecture are not stored in
files but defined by llama.cpp's code; those are in ARCHITECTURES and `_of_architecture`.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from nextllm_jax.config.model import LayerKind, ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.interop.canonical import first_that_fits, layer_kinds, shortest_pattern
from nextllm_jax.interop.families import UNSUPPORTED
from nextllm_jax.interop.gguf_experts import EXPERTS, SHARED_WIDTH, WIDTH, read_experts, write_experts
from nextllm_jax.interop.keys import Keys
from nextllm_jax.interop.names import PHI3_GGUF
from nextllm_jax.ops import rope

ROPE_FREQS, LONG_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that are part of the config: divisors of the rotary frequencies."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The properties of an architecture's files."""

    model_type: str
    """The corresponding Hugging Face model_type."""
    permuted: bool = False
    """Whether the rows of q and k are permuted for RoPE that rotates adjacent dimensions."""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names of tensors that differ from those of most architectures, by ours."""
    norm_offset: float = 0.0
    """Offset that the file adds to the norm scales."""
    keys: tuple[str, ...] = ()
    """Keys that not all architectures have."""
    sparse: bool = False
    """Whether all layers have experts. Those of llama may have some."""


_WINDOW, _FINAL_CAP, _SCALE = "attention.sliding_window", "final_logit_softcapping", "attention.scale"
_MULTIPLIERS = {
    "embedding_scale": "embedding_scale",
    "residual_scale": "residual_scale",
    "logit_divisor": "logit_scale",
    "attention_scale": _SCALE,
}
ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True, keys=EXPERTS),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "olmo2": Architecture("olmo2"),
    "smollm3": Architecture("smollm3", permuted=True),
    "granite": Architecture("granite", permuted=True, keys=tuple(_MULTIPLIERS.values())),
    "phi3": Architecture("phi3", names=PHI3_GGUF, keys=(_WINDOW,)),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", norm_offset=1.0, keys=(_WINDOW, "attn_logit_softcapping", _FINAL_CAP)),
    "gemma3": Architecture("gemma3_text", norm_offset=1.0, keys=(_WINDOW, _FINAL_CAP)),
    "olmoe": Architecture("olmoe", keys=EXPERTS, sparse=True),
    "qwen2moe": Architecture("qwen2_moe", keys=(*EXPERTS, WIDTH, SHARED_WIDTH), sparse=True),
    "qwen3moe": Architecture("qwen3_moe", keys=(*EXPERTS, WIDTH), sparse=True),
    "granitemoe": Architecture(
        "granitemoe", permuted=True, keys=(*_MULTIPLIERS.values(), *EXPERTS, SHARED_WIDTH), sparse=True
    ),
}
_WRITTEN_AS = {"mistral": "llama", "mixtral": "llama", "granitemoeshared": "granitemoe"}
"""The model_type of the architecture of other model types."""
_SIZES = {
    "embedding_length": "embed_dim",
    "feed_forward_length": "mlp_dim",
    "block_count": "num_layers",
    "attention.head_count": "num_heads",
    "context_length": "context_length",
}
_COMMON = {
    *_SIZES, "vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    _WINDOW: (0,),
    "use_parallel_residual": (False,),
}
_LARGEST_GEMMAS = {"gemma2": 46, "gemma3": 62}
"""Number of layers of the model sizes whose attention scale is 1 / sqrt(embed_dim / heads), not 1 / sqrt(head_dim)."""


def architecture_of(metadata: Mapping[str, Any], where: str) -> str:
    """The file's architecture. Raises InputError if it is not supported."""
    keys = Keys(dict(metadata), {}, where)
    if keys.get("general.architecture") == "gpt-oss":
        raise keys.refusal("general.architecture", UNSUPPORTED["gpt_oss"])
    return keys.choice("general.architecture", ARCHITECTURES)


def model_type_of(name: str, config: ModelConfig) -> str:
    """The Hugging Face model_type of a model in an architecture."""
    if name == "llama" and config.num_experts:
        return "mixtral"
    if name == "granitemoe" and config.shared_expert_mlp_dim:
        return "granitemoeshared"
    return ARCHITECTURES[name].model_type


def read_gguf_config(
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    factors: Mapping[str, np.ndarray],
    vocab_size: int,
    where: str,
    ignore_keys: Collection[str] = (),
) -> ModelConfig:
    """The ModelConfig for a file's metadata, its tensors' names, and its ROPE_TENSORS, if any, as `factors`.

    Unsupported keys in `ignore_keys`, without the name of the architecture, are ignored. Raises InputError, which names
    the key, for anything else that is not supported.
    """
    name = architecture_of(metadata, where)
    values = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    keys = Keys(values, {}, f"{where}: {name}")
    keys.require_supported({*_COMMON, *ARCHITECTURES[name].keys}, _FIXED, ignore_keys)
    fields: dict[str, Any] = {ours: keys.size(key) for key, ours in _SIZES.items()}
    heads, embed = fields["num_heads"], fields["embed_dim"]
    head_dim = keys.size("attention.key_length") if "attention.key_length" in keys else embed // heads
    if keys.get("attention.value_length") not in (None, head_dim):
        raise keys.refusal("attention.value_length", f"it must equal the key length {head_dim}")
    fields |= {
        "vocab_size": vocab_size,
        "num_kv_heads": keys.size("attention.head_count_kv") if "attention.head_count_kv" in keys else heads,
        "head_dim": head_dim,
        "norm_eps": _single(keys.number("attention.layer_norm_rms_epsilon")),
        "tie_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "attention_output_bias": "blk.0.attn_output.bias" in tensors,
    }
    fields |= read_experts(keys, name, ARCHITECTURES[name].keys, fields["mlp_dim"])
    fields |= _of_architecture(keys, name, fields)
    fields |= _rope(keys, name, fields, factors)
    return ModelConfig(**fields)


def _single(value: float) -> float:
    """The shortest decimal number with this value in float32, such as 1e-5 for 9.99999974e-06."""
    return float(str(np.float32(value)))


def _of_architecture(keys: Keys, name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields that the architecture itself determines."""
    num_layers, embed = fields["num_layers"], fields["embed_dim"]
    if name == "qwen3":
        return {"qk_norm": True}
    if name == "qwen3moe":
        return {"qk_norm": True, "attention_output_bias": False}
    if name in ("olmoe", "qwen2moe"):
        # llama.cpp reads no others of these architectures.
        heads = fields["num_heads"]
        only = {"head_dim": embed // heads, "tie_embeddings": False, "attention_output_bias": False}
        if name == "qwen2moe":
            return only
        return only | {"num_kv_heads": heads, "attention_bias": False, "qk_norm": True, "qk_norm_over": "projection"}
    if name == "olmo2":
        # llama.cpp reads no file of this architecture without a separate head.
        return {"norm_placement": "post", "qk_norm": True, "qk_norm_over": "projection", "tie_embeddings": False}
    if name == "smollm3":
        return {
            "layer_pattern": shortest_pattern(["global_nope" if i % 4 == 3 else "global" for i in range(num_layers)])
        }
    if name in ("granite", "granitemoe"):
        scales = {ours: keys.optional(key) for ours, key in _MULTIPLIERS.items()}
        return {ours: _single(value) for ours, value in scales.items() if value is not None}
    if name == "phi3":
        window = keys.get(_WINDOW)
        return {"layer_pattern": ("local",), "sliding_window": keys.size(_WINDOW)} if window else {}
    if not name.startswith("gemma"):
        return {}
    gemma = {"norm_scale_offset": 1.0, "embedding_scale": math.sqrt(embed), "activation": "gelu_tanh"}
    if name == "gemma":
        return gemma
    largest = num_layers == _LARGEST_GEMMAS[name]
    period = 2 if name == "gemma2" else 6
    kinds: list[LayerKind] = ["global" if i % period == period - 1 else "local" for i in range(num_layers)]
    gemma |= {
        "norm_placement": "sandwich",
        "attention_scale": (embed / fields["num_heads"] if largest else fields["head_dim"]) ** -0.5,
        "layer_pattern": shortest_pattern(kinds),
        "sliding_window": keys.size(_WINDOW),
        "logit_soft_cap": keys.optional(_FINAL_CAP),
    }
    if name == "gemma2":
        return gemma | {"attention_soft_cap": keys.optional("attn_logit_softcapping")}
    return gemma | {"qk_norm": True, "rope_local_theta": 10_000.0}


def _rope(keys: Keys, name: str, fields: Mapping[str, Any], factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    head_dim, context = fields["head_dim"], fields["context_length"]
    theta = _single(keys.number("rope.freq_base")) if "rope.freq_base" in keys else 10_000.0
    found: dict[str, Any] = {"rope_theta": theta}
    rotary = keys.size("rope.dimension_count") if "rope.dimension_count" in keys else head_dim
    if rotary != head_dim:
        if name != "phi3":
            raise keys.refusal("rope.dimension_count", f"it must equal the head dimension {head_dim}")
        found["rotary_dim"] = rotary
    key = "rope.scaling.original_context_length"
    original = keys.size(key) if key in keys else None
    kind = keys.get("rope.scaling.type")
    tensors = {
        ROPE_FREQS: (None, "none"),
        LONG_FACTORS: (None, "none", "longrope"),
        SHORT_FACTORS: (None, "none", "longrope"),
    }
    for tensor in factors:
        if kind not in tensors[tensor]:
            raise keys.refusal("rope.scaling.type", f"the tensor {tensor} contradicts it; use an intact file")
    if ROPE_FREQS in factors:
        return found | _llama3(keys, theta, factors[ROPE_FREQS], original or 8192)
    attention_factor = keys.optional("rope.scaling.attn_factor")
    if LONG_FACTORS in factors or SHORT_FACTORS in factors:
        return found | {
            "rope_scaling": "longrope",
            "rope_original_context_length": original or context,
            "rope_scaling_factor": context / (original or context),
            "rope_attention_factor": None if attention_factor is None else _single(attention_factor),
            "rope_short_factors": tuple(map(_single, factors.get(SHORT_FACTORS, ()))),
            "rope_long_factors": tuple(map(_single, factors.get(LONG_FACTORS, ()))),
        }
    if attention_factor not in (None, 1.0):
        raise keys.refusal("rope.scaling.attn_factor", "only 1 is supported without rope_factors tensors")
    if kind in (None, "none") or (kind == "longrope" and name == "phi3"):
        return found
    if kind not in ("linear", "yarn"):
        raise keys.refusal("rope.scaling.type", "only none, linear and yarn are supported")
    found |= {"rope_scaling": kind, "rope_scaling_factor": _single(keys.number("rope.scaling.factor"))}
    if kind == "yarn":
        found |= {
            "rope_original_context_length": original or context,
            "rope_beta_fast": keys.optional("rope.scaling.yarn_beta_fast") or 32.0,
            "rope_beta_slow": keys.optional("rope.scaling.yarn_beta_slow") or 1.0,
        }
    return found


def _llama3(keys: Keys, theta: float, divisors: np.ndarray, original: int) -> dict[str, Any]:
    """The parameters of llama3 scaling, recovered from the divisors in a file."""
    factor = float(divisors.max())
    plain = rope.frequencies(2 * len(divisors), theta)
    scaling = {"original_context_length": original, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if not np.allclose(plain / rope.scale_llama3(plain, factor, **scaling), divisors, rtol=1e-5):
        raise InputError(f"{keys.where}: {ROPE_FREQS} is not the scaling of Llama 3.1; only that is supported")
    return {"rope_scaling": "llama3", "rope_scaling_factor": factor, "rope_original_context_length": original}


def write_gguf_config(
    config: ModelConfig, tensors: Collection[str], model_type: str | None
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """(architecture, metadata, ROPE_TENSORS) for a model: those of `model_type`, or else the first that fit.

    Raises InputError, which names the fields, if no architecture can represent the model.
    """
    model_type = _WRITTEN_AS.get(model_type or "", model_type)
    names = [
        name
        for name, architecture in ARCHITECTURES.items()
        if model_type == architecture.model_type or (model_type is None and not _is_unusual(config, name))
    ]
    if not names:
        raise InputError(
            f"model_type is {model_type!r}; GGUF supports {', '.join(a.model_type for a in ARCHITECTURES.values())}"
        )

    def read(name: str) -> ModelConfig:
        found = read_gguf_config(_metadata(config, name), tensors, _factors(config, name), config.vocab_size, name)
        return dataclasses.replace(found, init_std=config.init_std)

    name = first_that_fits(config, names, read, "no GGUF architecture can represent this model", _same)
    return name, _metadata(config, name), _factors(config, name)


def _is_unusual(config: ModelConfig, name: str) -> bool:
    """Whether some readers of an architecture would not read this model correctly.

    llama.cpp ignores phi3's window. transformers supports llama's biases only on all projections or on none.
    """
    if ARCHITECTURES[name].sparse and not config.num_experts:
        return True
    return name == "phi3" or (name == "llama" and config.attention_bias != config.attention_output_bias)


def _same(left: Any, right: Any) -> bool:
    """Whether two values of a field are equal up to float32, the precision of the file."""
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-6)
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right


def _metadata(config: ModelConfig, name: str) -> dict[str, Any]:
    """The metadata for a model in an architecture, as close as possible. Counts are int, other values float or str."""
    kinds, scaling = layer_kinds(config), config.rope_scaling
    values: dict[str, Any] = {key: getattr(config, ours) for key, ours in _SIZES.items()}
    values |= {
        "vocab_size": config.vocab_size,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.rotary_dim or config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    if scaling in ("linear", "yarn"):
        values |= {"rope.scaling.type": scaling, "rope.scaling.factor": config.rope_scaling_factor}
    if scaling in ("llama3", "yarn", "longrope"):
        values["rope.scaling.original_context_length"] = config.rope_original_context_length
    if scaling == "yarn":
        values |= {
            "rope.scaling.yarn_beta_fast": config.rope_beta_fast,
            "rope.scaling.yarn_beta_slow": config.rope_beta_slow,
        }
    if scaling == "longrope":
        factor, original = config.rope_scaling_factor, config.rope_original_context_length
        values["rope.scaling.attn_factor"] = config.rope_attention_factor or rope.longrope_attention_factor(
            factor, original
        )
    keys = ARCHITECTURES[name].keys
    if _WINDOW in keys:
        values[_WINDOW] = config.sliding_window if "local" in kinds else 0
    values |= write_experts(config, keys)
    if name in ("granite", "granitemoe"):
        values |= {key: float(getattr(config, ours) or config.head_dim**-0.5) for ours, key in _MULTIPLIERS.items()}
    caps = {_FINAL_CAP: config.logit_soft_cap, "attn_logit_softcapping": config.attention_soft_cap}
    values |= {key: cap for key, cap in caps.items() if key in keys and cap is not None}
    return {"general.architecture": name, **{f"{name}.{key}": value for key, value in values.items()}}


def _factors(config: ModelConfig, name: str) -> dict[str, np.ndarray]:
    if config.rope_scaling == "llama3":
        plain = rope.frequencies(config.head_dim, config.rope_theta)
        scaled = rope.scale_llama3(
            plain,
            config.rope_scaling_factor,
            original_context_length=config.rope_original_context_length,
            low_freq_factor=config.rope_low_freq_factor,
            high_freq_factor=config.rope_high_freq_factor,
        )
        return {ROPE_FREQS: plain / scaled}
    if config.rope_scaling == "longrope" and name == "phi3":
        factors = {LONG_FACTORS: config.rope_long_factors, SHORT_FACTORS: config.rope_short_factors}
        return {tensor: np.asarray(values, np.float32) for tensor, values in factors.items()}
    return {}
