"""One table of tensor names (ours, Hugging Face's and GGUF's), used by both import and export.

A matrix is [outputs, inputs] in files, with flattened heads, and [inputs, ..., outputs, ...] in our tree. Conversion
only transposes and reshapes it, since RoPE rotates halves in both. Our tree stacks the layers of a period; files have
separate tensors per layer. Some families fuse matrices with the same input by concatenating their rows.
"""

import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import numpy as np

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import STACK, Kind, by_name, layer_paths

Format = Literal["huggingface", "gguf"]


class Name(NamedTuple):
    """The three names of a tensor; ours is the path within a layer, or in the whole tree."""

    ours: str
    huggingface: str
    gguf: str


MODEL = (
    Name("embed/embedding", "model.embed_tokens.weight", "token_embd.weight"),
    Name("final_norm/scale", "model.norm.weight", "output_norm.weight"),
    Name("lm_head/embedding", "lm_head.weight", "output.weight"),
)
LAYER = (
    Name("attention_norm/scale", "input_layernorm.weight", "attn_norm.weight"),
    Name("attention/q/kernel", "self_attn.q_proj.weight", "attn_q.weight"),
    Name("attention/k/kernel", "self_attn.k_proj.weight", "attn_k.weight"),
    Name("attention/v/kernel", "self_attn.v_proj.weight", "attn_v.weight"),
    Name("attention/o/kernel", "self_attn.o_proj.weight", "attn_output.weight"),
    Name("attention/q/bias", "self_attn.q_proj.bias", "attn_q.bias"),
    Name("attention/k/bias", "self_attn.k_proj.bias", "attn_k.bias"),
    Name("attention/v/bias", "self_attn.v_proj.bias", "attn_v.bias"),
    Name("attention/o/bias", "self_attn.o_proj.bias", "attn_output.bias"),
    Name("attention/q_norm/scale", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    Name("attention/k_norm/scale", "self_attn.k_norm.weight", "attn_k_norm.weight"),
    Name("attention_post_norm/scale", "post_attention_layernorm.weight", "post_attention_norm.weight"),
    Name("mlp_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight"),
    Name("mlp/gate/kernel", "mlp.gate_proj.weight", "ffn_gate.weight"),
    Name("mlp/up/kernel", "mlp.up_proj.weight", "ffn_up.weight"),
    Name("mlp/down/kernel", "mlp.down_proj.weight", "ffn_down.weight"),
    Name("mlp_post_norm/scale", "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
)
# With norms before and after, Hugging Face uses the usual name of the MLP norm for another norm.
SANDWICH_MLP_NORM = "pre_feedforward_layernorm.weight"
FUSED = {
    "attention/q/kernel": Name("attention/qkv", "self_attn.qkv_proj.weight", "attn_qkv.weight"),
    "attention/k/kernel": Name("attention/qkv", "self_attn.qkv_proj.weight", "attn_qkv.weight"),
    "attention/v/kernel": Name("attention/qkv", "self_attn.qkv_proj.weight", "attn_qkv.weight"),
    "mlp/gate/kernel": Name("mlp/gate_up", "mlp.gate_up_proj.weight", "ffn_up.weight"),
    "mlp/up/kernel": Name("mlp/gate_up", "mlp.gate_up_proj.weight", "ffn_up.weight"),
}
LAYER_PREFIX = {"huggingface": "model.layers.{}.", "gguf": "blk.{}."}


class Part(NamedTuple):
    """Rows of a tensor in a file that correspond to one layer of a leaf in our tree."""

    leaf: str
    """Path of the leaf, such as layers/block_0/attention/q/kernel."""
    index: int | None
    """Index in the leaf's stack of layers; None if the leaf is not stacked."""
    shape: tuple[int, ...]
    """Shape of the leaf without the stack dimension."""
    tensor: str
    """Name in the file."""
    first_row: int = 0
    """First row in the tensor; greater than 0 only in fused tensors."""

    kind: Kind = "matrix"
    inputs: int = 0
    """Number of leading dimensions of `shape` that are a matrix's inputs; 0 if the leaf is not transposed."""

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of these rows in the file."""
        if self.inputs:
            return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])
        return self.shape if self.kind == "embedding" else (math.prod(self.shape),)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """One layer of the leaf, or of its quantization scales, in the layout of the file."""
        if self.inputs:
            return array.reshape(math.prod(array.shape[: self.inputs]), -1).T
        return array if self.kind == "embedding" else array.reshape(self.file_shape)

    def from_file(self, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The inverse of `to_file`, with the given shape."""
        return (rows.T if self.inputs else rows).reshape(shape)


def parts_of(config: ModelConfig, abstract: Any, file_format: Format, *, fused: bool = False) -> list[Part]:
    """The parts of a parameter tree of arrays or shapes, or of a part of it, layer by layer, in the order of the table.

    The layers may be stacked, or unstacked as by `unstack_layers`.
    """
    leaves = by_name(abstract)
    stacked = any(leaf.startswith(f"{STACK}/") for leaf in leaves)
    weights = by_name(abstract_params(config, scan_layers=stacked))
    layers = [(f"{prefix}/", index) for prefix, index in layer_paths(config, stacked=stacked)]
    parts = []
    for layer, (prefix, index) in [(None, ("", None)), *enumerate(layers)]:
        rows: dict[str, int] = {}
        for name in MODEL if layer is None else LAYER:
            leaf = prefix + name.ours
            if leaf not in leaves:
                continue
            tensor = _name_in(config, name, file_format, fused)
            if layer is not None:
                tensor = LAYER_PREFIX[file_format].format(layer) + tensor
            shape, weight = leaves[leaf].shape[0 if index is None else 1 :], weights[leaf]
            part = Part(leaf, index, shape, tensor, rows.get(tensor, 0), weight.kind, weight.num_inputs)
            rows[tensor] = part.first_row + part.file_shape[0]
            parts.append(part)
    unnamed = set(leaves) - {part.leaf for part in parts}
    if unnamed:
        raise InputError(f"interop/names.py lacks a name for {', '.join(sorted(unnamed))}; add a row to its table")
    return parts


def all_parts(config: ModelConfig, file_format: Format, *, fused: bool = False) -> list[Part]:
    """The parts of a whole model."""
    return parts_of(config, nn.meta.unbox(abstract_params(config)), file_format, fused=fused)


def tensor_shapes(parts: list[Part]) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, by name, in order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        rows, *columns = part.file_shape
        shapes[part.tensor] = (part.first_row + rows, *columns)
    return shapes


def _name_in(config: ModelConfig, name: Name, file_format: Format, fused: bool) -> str:
    if fused:
        name = FUSED.get(name.ours, name)
    if name.ours == "mlp_norm/scale" and config.norm_placement == "sandwich" and file_format == "huggingface":
        return SANDWICH_MLP_NORM
    return getattr(name, file_format)
