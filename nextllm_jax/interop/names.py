"""One table of tensor names (ours, Hugging Face's and GGUF's), used by both import and export.

A matrix is [outputs, inputs] in files, with flattened heads, and [inputs, ..., outputs, ...] in our tree. Conversion
only transposes and reshapes it, since RoPE rotates halves in both. Our tree stacks the layers of a period, and the
experts of a layer. Files have separate tensors per layer, of one expert, or of all experts along the first dimension.
Some families fuse matrices with the same input by concatenating their rows.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import numpy as np

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import EXPERTS, STACK, Kind, by_name, layer_paths

Format = Literal["huggingface", "gguf"]


class Name(NamedTuple):
    """The three names of a tensor; ours is the path within a layer, or in the whole tree.

    {} stands for the number of an expert. Without it, the tensor holds all experts of a layer.
    """

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
    Name("mlp/router/kernel", "mlp.gate.weight", "ffn_gate_inp.weight"),
    Name("mlp/router/selection_bias", "mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
    Name("mlp/shared/gate/kernel", "mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight"),
    Name("mlp/shared/up/kernel", "mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight"),
    Name("mlp/shared/down/kernel", "mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight"),
    Name("mlp/shared_gate/kernel", "mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight"),
    Name("mlp/experts/gate/kernel", "mlp.experts.{}.gate_proj.weight", "ffn_gate_exps.weight"),
    Name("mlp/experts/up/kernel", "mlp.experts.{}.up_proj.weight", "ffn_up_exps.weight"),
    Name("mlp/experts/down/kernel", "mlp.experts.{}.down_proj.weight", "ffn_down_exps.weight"),
)
# With norms before and after, Hugging Face uses the usual name of the MLP norm for another norm.
SANDWICH_MLP_NORM = "pre_feedforward_layernorm.weight"
PHI3 = {
    "attention/q/kernel": "self_attn.qkv_proj.weight",
    "attention/k/kernel": "self_attn.qkv_proj.weight",
    "attention/v/kernel": "self_attn.qkv_proj.weight",
    "mlp/gate/kernel": "mlp.gate_up_proj.weight",
    "mlp/up/kernel": "mlp.gate_up_proj.weight",
}
"""Names that differ in Phi-3, by ours. The rows of tensors with the same name are concatenated."""
PHI3_GGUF = {
    "attention/q/kernel": "attn_qkv.weight",
    "attention/k/kernel": "attn_qkv.weight",
    "attention/v/kernel": "attn_qkv.weight",
    "mlp/gate/kernel": "ffn_up.weight",
    "mlp/up/kernel": "ffn_up.weight",
}
MIXTRAL = {
    "mlp/router/kernel": "block_sparse_moe.gate.weight",
    "mlp/experts/gate/kernel": "block_sparse_moe.experts.{}.w1.weight",
    "mlp/experts/up/kernel": "block_sparse_moe.experts.{}.w3.weight",
    "mlp/experts/down/kernel": "block_sparse_moe.experts.{}.w2.weight",
}
GRANITE_MOE = {
    "mlp/router/kernel": "block_sparse_moe.router.layer.weight",
    "mlp/experts/gate/kernel": "block_sparse_moe.input_linear.weight",
    "mlp/experts/up/kernel": "block_sparse_moe.input_linear.weight",
    "mlp/experts/down/kernel": "block_sparse_moe.output_linear.weight",
    "mlp/shared/gate/kernel": "shared_mlp.input_linear.weight",
    "mlp/shared/up/kernel": "shared_mlp.input_linear.weight",
    "mlp/shared/down/kernel": "shared_mlp.output_linear.weight",
}
EARLY_MIXTRAL_GGUF = {f"mlp/experts/{name}/kernel": f"ffn_{name}.{{}}.weight" for name in ("gate", "up", "down")}
"""Names in early GGUF files of Mixtral, which have one tensor per expert."""
LAYER_PREFIX = {"huggingface": "model.layers.{}.", "gguf": "blk.{}."}


class Part(NamedTuple):
    """Rows of a tensor in a file that correspond to one layer, or one expert of a layer, of a leaf in our tree."""

    leaf: str
    """Path of the leaf, such as layers/block_0/attention/q/kernel."""
    index: tuple[int, ...]
    """Index along the axes of the leaf that stack layers and experts."""
    shape: tuple[int, ...]
    """Shape of the leaf without these axes."""
    tensor: str
    """Name in the file."""
    first_row: int = 0
    """First row in the tensor, where the rows of an expert follow those of the one before it. It is 0 if the tensor has
    only one matrix."""
    kind: Kind = "matrix"
    inputs: int = 0
    """Number of leading dimensions of `shape` that are a matrix's inputs; 0 if the leaf is not transposed."""
    num_experts: int = 0
    """Number of experts in the tensor, along its first dimension; 0: it has no such dimension."""

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of these rows in the file."""
        if self.inputs:
            return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])
        return self.shape if self.kind == "embedding" else (math.prod(self.shape),)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """The values of this part, or their quantization scales, in the layout of the file."""
        if self.inputs:
            return array.reshape(math.prod(array.shape[: self.inputs]), -1).T
        return array if self.kind == "embedding" else array.reshape(self.file_shape)

    def from_file(self, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The inverse of `to_file`, with the given shape."""
        return (rows.T if self.inputs else rows).reshape(shape)


def parts_of(
    config: ModelConfig, abstract: Any, file_format: Format, *, special: Mapping[str, str] | None = None
) -> list[Part]:
    """The parts of a parameter tree of arrays or shapes, or of a part of it, layer by layer.

    Those of a tensor follow each other. `special` has the names that differ from those of the table, by ours.
    The layers may be stacked, or unstacked as by `unstack_layers`.
    """
    leaves = by_name(abstract)
    stacked = any(leaf.startswith(f"{STACK}/") for leaf in leaves)
    weights = by_name(abstract_params(config, scan_layers=stacked))
    layers = [(f"{prefix}/", index) for prefix, index in layer_paths(config, stacked=stacked)]
    parts: list[Part] = []
    for layer, (prefix, index) in [(None, ("", None)), *enumerate(layers)]:
        rows: dict[str, list[Part]] = {}  # by tensor
        file_prefix = "" if layer is None else LAYER_PREFIX[file_format].format(layer)
        for name, expert in _names_and_experts(config, MODEL if layer is None else LAYER):
            leaf = prefix + name.ours
            if leaf not in leaves:
                continue
            weight, stem = weights[leaf], _name_in(config, name, file_format, special or {})
            part = Part(
                leaf,
                tuple(i for i in (index, expert) if i is not None),
                leaves[leaf].shape[weight.num_stacked :],
                file_prefix + stem.format(expert),
                kind=weight.kind,
                inputs=weight.num_inputs,
                num_experts=0 if expert is None or "{}" in stem else config.num_experts,
            )
            before = rows.setdefault(part.tensor, [])
            before.append(part._replace(first_row=sum(other.file_shape[0] for other in before)))
        parts += [part for same in rows.values() for part in same]
    unnamed = set(leaves) - {part.leaf for part in parts}
    if unnamed:
        raise InputError(f"interop/names.py lacks a name for {', '.join(sorted(unnamed))}; add a row to its table")
    return parts


def all_parts(config: ModelConfig, file_format: Format, *, special: Mapping[str, str] | None = None) -> list[Part]:
    """The parts of a whole model."""
    return parts_of(config, nn.meta.unbox(abstract_params(config)), file_format, special=special)


def _names_and_experts(config: ModelConfig, names: Iterable[Name]) -> Iterable[tuple[Name, int | None]]:
    """Each name with the experts that have a matrix of it, one expert after another; None: it is not of an expert."""
    of_experts = [name for name in names if f"/{EXPERTS}/" in name.ours]
    yield from ((name, None) for name in names if name not in of_experts)
    yield from ((name, expert) for expert in range(config.num_experts) for name in of_experts)


def tensor_shapes(parts: list[Part]) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, by name, in order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        rows, *columns = part.file_shape
        rows += part.first_row
        shapes[part.tensor] = (
            (part.num_experts, rows // part.num_experts, *columns) if part.num_experts else (rows, *columns)
        )
    return shapes


def _name_in(config: ModelConfig, name: Name, file_format: Format, special: Mapping[str, str]) -> str:
    if name.ours in special:
        return special[name.ours]
    if name.ours == "mlp_norm/scale" and config.norm_placement == "sandwich" and file_format == "huggingface":
        return SANDWICH_MLP_NORM
    return getattr(name, file_format)
