"""Reads and writes low-rank adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nextllm_jax.config import LoraConfig, ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.interop.families import FAMILIES
from nextllm_jax.interop.huggingface import DTYPES, SafetensorsSource
from nextllm_jax.interop.huggingface_config import write_model_config
from nextllm_jax.interop.keys import Keys
from nextllm_jax.interop.names import Part, all_parts
from nextllm_jax.interop.streaming import read_params, require_tensors, tensors_of
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import EXPERTS, by_name
from nextllm_jax.tokenizer.huggingface_files import read_json, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others change the base weights
}
_USED = ("r", "lora_alpha", "use_rslora")
_WITHOUT_EFFECT = (
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "layers_pattern", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size", "ensure_weight_tying",
)  # fmt: skip


def read_adapter_config(directory: Path, config: ModelConfig) -> dict[str, Any]:
    """The fields of LoraConfig that an adapter determines: rank, alpha, rank_stabilized and targets.

    The targets are the modules that the file has weights for. Raises InputError, which names the key, for an adapter
    that does more than LoRA on whole matrices of all layers, and for one of another model.
    """
    values = read_json(directory / CONFIG)
    if not values:
        raise InputError(f"{directory} has no {CONFIG}; give the directory of a PEFT adapter")
    keys = Keys(values, {}, str(directory / CONFIG))
    for name, value in values.items():
        if name in _SUPPORTED:
            if value not in _SUPPORTED[name]:
                raise keys.refusal(name, f"only {_SUPPORTED[name][0]} is supported")
        elif name not in (*_USED, *_WITHOUT_EFFECT) and value not in (None, False, {}, []):
            raise keys.refusal(name, "adapters with this key are not supported; merge it with peft, and use the result")
    stabilized = keys.flag("use_rslora") if "use_rslora" in keys else False
    found = set(_open(directory).shapes())
    modules = {_module(part): part for part in _matrices(config)}
    targets = [ours for ours, part in modules.items() if _names(part)[0] in found]
    if not targets:
        raise InputError(f"{directory / WEIGHTS} fits no matrix of this model; use one of its adapters")
    return {
        "rank": keys.size("r"),
        "alpha": keys.positive("lora_alpha"),
        "rank_stabilized": stabilized,
        "targets": () if len(targets) == len(modules) else tuple(targets),
    }


def load_adapters(directory: Path, config: ModelConfig, abstract: Any) -> Any:
    """The adapters of a directory as the tree that `abstract` describes, each leaf with its shape and sharding.

    Raises InputError if weights are missing, have another shape, or are not finite.
    """
    source, parts = _open(directory), _parts(config, abstract)
    require_tensors(source, parts)
    return read_params(source, parts, abstract)


def export_adapters(
    config: ModelConfig,
    lora: LoraConfig,
    params: Any,
    directory: Path,
    *,
    dtype: str,
    model_type: str | None = None,
    base: str | None = None,
) -> str:
    """Write adapters into a directory, and return the model_type of their base model, whose path or name is `base`.

    Raises InputError if no Hugging Face family (or not `model_type`) can represent the model, or if its files store the
    adapted matrices in another way.
    """
    family = write_model_config(config, model_type=model_type)["model_type"]
    parts = _parts(config, params)
    if any(f"/{EXPERTS}/" in part.leaf for part in parts):
        raise InputError("PEFT has no adapters for the matrices of experts; export the merged model instead")
    if fused := {_module(part) for part in parts} & FAMILIES[family].fused:
        names = ", ".join(sorted(fused))
        raise InputError(f"files of {family} store {names} in one matrix with others; export the merged model instead")
    tensors = {
        name: np.ascontiguousarray(array.astype(DTYPES[dtype])) for name, array in tensors_of(parts, params, rows=0)
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(0o644)  # the library makes it readable only for the owner
    modules = {part.tensor.split(".")[-3] for part in parts}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    write_json(directory / CONFIG, values)
    return family


def _open(directory: Path) -> SafetensorsSource:
    if not (directory / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle, which could run any code and is not read)"
        has = pickled if (directory / "adapter_model.bin").exists() else ""
        raise InputError(f"{directory} has no {WEIGHTS}{has}; save the adapter as safetensors")
    return SafetensorsSource(directory, [directory / WEIGHTS])


def _matrices(config: ModelConfig) -> list[Part]:
    """The parts of the model's matrices, as Hugging Face files have them."""
    return [part for part in all_parts(config, "huggingface") if part.kind == "matrix"]


def _module(part: Part) -> str:
    """Our name of a matrix's module, such as q."""
    return part.leaf.split("/")[-2]


def _names(part: Part) -> tuple[str, str]:
    """The names of the two factors of a matrix."""
    module = f"base_model.model.{part.tensor.removesuffix('.weight')}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _parts(config: ModelConfig, adapters: Any) -> list[Part]:
    """The parts of a tree of adapters."""
    leaves, weights, parts = by_name(adapters), by_name(abstract_params(config)), []
    for matrix in _matrices(config):
        module = matrix.leaf.rpartition("/")[0]
        for leaf, name in zip((f"{module}/a", f"{module}/b"), _names(matrix), strict=True):
            if leaf in leaves:
                shape = leaves[leaf].shape[len(matrix.index) :]
                inputs = weights[matrix.leaf].num_inputs if leaf.endswith("/a") else 1
                parts.append(Part(leaf, matrix.index, shape, name, inputs=inputs))
    return parts
