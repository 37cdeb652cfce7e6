"""Checks a model's files for facts that its settings must have, without the code that imports them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import SafetensorError, safe_open

from nextllm_jax.config import ModelConfig
from nextllm_jax.diagnostics.certify.certificate import Row, failed, ok
from nextllm_jax.diagnostics.certify.forward import Weights
from nextllm_jax.interop.gguf import files_of
from nextllm_jax.tokenizer.gguf import read_metadata
from nextllm_jax.tokenizer.huggingface_files import read_json

CHECK = "files"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LAYERS = r"(?:model\.layers|blk)\.(\d+)\."
_MATRICES = {
    "router": r"(?:mlp\.gate|block_sparse_moe\.gate|block_sparse_moe\.router\.layer|ffn_gate_inp)",
    "gate": r"(?:.*experts\.(\d+)\.(?:gate_proj|w1)|ffn_gate(?:_exps|\.(\d+)))",
    "up": r"(?:.*experts\.(\d+)\.(?:up_proj|w3)|ffn_up(?:_exps|\.(\d+)))",
    "down": r"(?:.*experts\.(\d+)\.(?:down_proj|w2)|block_sparse_moe\.output_linear|ffn_down(?:_exps|\.(\d+)))",
    "gate and up": r"block_sparse_moe\.input_linear",
}
"""Names of the tensors of a layer with experts. A number is that of an expert; other tensors hold all of a layer."""


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
    if _EMBEDDING not in tensors:
        return failed(CHECK, f"the directory has no safetensors file with {_EMBEDDING}")
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


def check_experts(path: Path, weights: Weights) -> Row:
    """Compare the sum of each expert's values, and of its row of the router, with the files, in the first such layer.

    A sum does not depend on the layout of a matrix.
    """
    check, layer = "files: experts", weights.config.sparse_layers[0]
    block = weights.read(f"remainder_{layer}")["mlp"]
    kernels = {"router": np.asarray(block["router"]["kernel"]).T}
    kernels |= {name: np.asarray(matrix["kernel"]) for name, matrix in block["experts"].items()}
    stated = _sums_in_files(_arrays(path), layer)
    for name, values_EX in kernels.items():
        mine_E, theirs_E = _sums(values_EX), stated[name]
        tolerance = 1e-9 * float(np.abs(values_EX).sum(dtype=np.float64))
        if not np.allclose(mine_E, theirs_E, rtol=0, atol=tolerance):
            reordered = np.allclose(np.sort(mine_E), np.sort(theirs_E), rtol=0, atol=tolerance)
            fault = "permuted router" if name == "router" else "swapped experts"
            numbers = np.nonzero(np.abs(mine_E - theirs_E) > tolerance)[0].tolist()
            detail = f"{name} of layer {layer} differs from the file for the experts {numbers}"
            return failed(check, detail, fault if reordered else None)
    return ok(check, f"router and {weights.config.num_experts} experts of layer {layer} are in the order of the files")


def _arrays(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """The function that reads each tensor of the files of a model."""
    if path.is_dir():
        return {name: lambda part=part: part[:] for name, part in _tensors(path).items()}
    tensors = [tensor for part in files_of(path) for tensor in gguf.GGUFReader(part).tensors]
    return {each.name: lambda each=each: gguf.quants.dequantize(each.data, each.tensor_type) for each in tensors}


def _sums_in_files(arrays: Mapping[str, Callable[[], np.ndarray]], layer: int) -> dict[str, np.ndarray]:
    """The sums of the values of each expert, by the names of matrices."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, (matrix, pattern) in ((n, each) for n in arrays for each in _MATRICES.items()):
        match = re.fullmatch(rf"{_LAYERS}{pattern}\.weight", name)
        if match is None or int(match[1]) != layer:
            continue
        values, numbers = arrays[name](), [number for number in match.groups()[1:] if number is not None]
        if matrix == "gate and up":
            found["gate"], found["up"] = ({0: _sums(half)} for half in np.split(values, 2, axis=1))
        else:
            one = {int(numbers[0]): _sums(values[None])} if numbers else {0: _sums(values)}
            found.setdefault(matrix, {}).update(one)
    return {name: np.concatenate([sums for _, sums in sorted(parts.items())]) for name, parts in found.items()}


def _sums(values_EX: np.ndarray) -> np.ndarray:
    """The sum of the values of each expert."""
    return values_EX.reshape(len(values_EX), -1).sum(axis=1, dtype=np.float64)
