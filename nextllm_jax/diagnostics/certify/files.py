"""Checks a model's files for facts that its settings must have, without the code that imports them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import SafetensorError, safe_open

from nextllm_jax.config import ModelConfig
from nextllm_jax.diagnostics.certify.certificate import Row, failed, ok
from nextllm_jax.interop.gguf import files_of
from nextllm_jax.tokenizer.gguf import read_metadata
from nextllm_jax.tokenizer.huggingface_files import read_json

CHECK = "files"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def check_huggingface(directory: Path, config: ModelConfig) -> Row:
    """Compare config.json and the safetensors files with the settings."""
    values = read_json(directory / "config.json")
    scalings = [values.get("rope_scaling"), values.get("rope_parameters")]
    scalings += [part.get("full_attention") for part in scalings if isinstance(part, dict)]
    kinds = [part.get("rope_type", part.get("type")) for part in scalings if isinstance(part, dict)]
    scaled = next((kind for kind in kinds if kind not in (None, "default")), "none")
    names = {"su": "longrope"}
    if names.get(scaled, scaled) != config.rope_scaling:
        return failed(CHECK, f"config.json scales RoPE by {scaled}, not {config.rope_scaling}", "dropped rope scaling")
    try:
        tensors = _tensors(directory)
    except (SafetensorError, OSError) as error:
        return failed(CHECK, f"the safetensors files cannot be read ({error})")
    if _HEAD in tensors and config.tie_embeddings and not _equal(tensors[_HEAD], tensors[_EMBEDDING]):
        return failed(CHECK, f"{_HEAD} differs from the embedding, but the head is tied", "untied head")
    if _HEAD not in tensors and not config.tie_embeddings:
        return failed(CHECK, f"{_HEAD} is missing, but the head is not tied", "untied head")
    return ok(CHECK, f"config.json and {len(tensors)} tensors agree with the settings about RoPE and the head")


def _tensors(directory: Path) -> dict[str, Any]:
    """A slice of each tensor in the safetensors files, which is read on demand."""
    found: dict[str, Any] = {}
    for file in sorted(directory.glob("*.safetensors")):
        opened: Any = safe_open(file, "numpy")
        found |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is not a dict
    return found


def _equal(left: Any, right: Any) -> bool:
    rows = left.get_shape()[0]
    if left.get_shape() != right.get_shape():
        return False
    blocks = (slice(i, min(i + 1024, rows)) for i in range(0, rows, 1024))
    return all(np.array_equal(left[block], right[block]) for block in blocks)


def check_gguf(file: Path, config: ModelConfig) -> Row:
    """Compare the metadata and the names of the tensors of a GGUF file with the settings."""
    metadata: Mapping[str, Any] = read_metadata(file)
    names = {tensor.name for part in files_of(file) for tensor in gguf.GGUFReader(part).tensors}
    stated = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    if "rope_freqs.weight" in names:
        stated = "llama3"
    elif {"rope_factors_long.weight", "rope_factors_short.weight"} & names:
        stated = "longrope"
    if stated != config.rope_scaling:
        return failed(CHECK, f"the file scales RoPE by {stated}, not {config.rope_scaling}", "dropped rope scaling")
    if ("output.weight" in names) == config.tie_embeddings:
        has = "has" if config.tie_embeddings else "lacks"
        tied = "tied" if config.tie_embeddings else "not tied"
        return failed(CHECK, f"the file {has} output.weight, but the head is {tied}", "untied head")
    return ok(CHECK, f"metadata and {len(names)} tensors agree with the settings about RoPE and the head")
