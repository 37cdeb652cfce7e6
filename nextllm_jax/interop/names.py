"""One table of tensor names: ours, Hugging Face's and GGUF's; import reads it one way, export the other.

In files a matrix is [outputs, inputs] with heads flattened, in our tree [inputs, ..., outputs, ...]: transposing is
all that happens to it, since RoPE is half-split on both sides. Layers of a period are stacked in our tree and
apart in files. Some families fuse matrices that read the same input, one below the other.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from nextllm_jax.config.model import ModelConfig

Format = Literal["huggingface", "gguf"]


class Name(NamedTuple):
    """One tensor under its three names; ours is the path in a layer (or in the whole tree)."""

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
# Where there are norms on both sides, Hugging Face gives the name that is else the MLP norm's to another norm.
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
    """Rows of a tensor in a file that are one layer of a leaf in our tree."""

    leaf: str
    """Path of the leaf, such as layers/block_0/attention/q/kernel."""
    index: int | None
    """Place in the leaf's stack; None where the leaf is no stack."""
    shape: tuple[int, ...]
    """Shape of the leaf, or of one place in its stack."""
    tensor: str
    """Name in the file."""
    first_row: int = 0
    """First row in the tensor; over 0 only where tensors are fused."""

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of these rows in the file."""
        inputs = self.inputs
        if not inputs:
            return self.shape if self.leaf.endswith("embedding") else (math.prod(self.shape),)
        return math.prod(self.shape[inputs:]), math.prod(self.shape[:inputs])

    @property
    def inputs(self) -> int:
        """Leading dimensions that a matrix contracts; 0 for what is stored as it is."""
        if not self.leaf.endswith("kernel"):
            return 0
        return 2 if self.leaf.endswith("/o/kernel") else 1

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """One layer of the leaf, as the file has it."""
        rows = array.reshape(self.file_shape[::-1] if self.inputs else self.file_shape)
        return rows.T if self.inputs else rows


def leaves_of(tree: Any) -> dict[str, Any]:
    """The leaves of a parameter tree by their paths."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def parts_of(config: ModelConfig, abstract: Any, file_format: Format, *, fused: bool = False) -> list[Part]:
    """Every part of a parameter tree (of arrays or shapes), layer by layer, in the order of the table.

    The tree may be stacked over the layers or come from `unstack_layers`.
    """
    leaves = leaves_of(abstract)
    parts = [
        Part(name.ours, None, leaves[name.ours].shape, getattr(name, file_format))
        for name in MODEL
        if name.ours in leaves
    ]
    for layer, (prefix, index) in enumerate(_places(config, leaves)):
        rows: dict[str, int] = {}
        for name in LAYER:
            leaf = f"{prefix}/{name.ours}"
            if leaf not in leaves:
                continue
            tensor = LAYER_PREFIX[file_format].format(layer) + _name_in(config, name, file_format, fused)
            shape = leaves[leaf].shape if index is None else leaves[leaf].shape[1:]
            part = Part(leaf, index, shape, tensor, rows.get(tensor, 0))
            rows[tensor] = part.first_row + part.file_shape[0]
            parts.append(part)
    forgotten = set(leaves) - {part.leaf for part in parts}
    if forgotten:
        raise ValueError(f"the table of names lacks {', '.join(sorted(forgotten))}")
    return parts


def tensor_shapes(parts: list[Part]) -> dict[str, tuple[int, ...]]:
    """The tensors of a file and their shapes, in order."""
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


def _places(config: ModelConfig, leaves: dict[str, Any]) -> Iterator[tuple[str, int | None]]:
    """Where each layer lies in our tree: the path above it, and its index in the stack."""
    size = len(config.layer_pattern)
    stacked = any(leaf.startswith("layers/") for leaf in leaves)
    num_scanned = config.num_layers // size * size if stacked else 0
    for layer in range(config.num_layers):
        if layer < num_scanned:
            yield f"layers/block_{layer % size}", layer // size
        else:
            yield f"remainder_{layer - num_scanned}", None
