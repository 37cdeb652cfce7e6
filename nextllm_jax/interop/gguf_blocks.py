"""Converts GGUF blocks of type Q8_0, Q4_0 and Q4_1 to quantized matrices and back, bit for bit.

A block stores 32 consecutive columns of a row: a float16 scale, for Q4_1 a float16 minimum, and the values. Q8_0 has 32
bytes of values. Q4_0 and Q4_1 have 16: byte i holds column i in its low half and column 16 + i in its high half. 4-bit
values are unsigned in files.
"""

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type

from nextllm_jax.ops.quantized import QTensor

COLUMNS = 32
FILE_TYPES = {
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
}
"""Supported block types, and the file type of a file that mostly consists of them."""


def type_of(matrix: QTensor) -> Type:
    """The block type in which a quantized matrix is written."""
    if matrix.q.dtype == np.int8:
        return Type.Q8_0
    return Type.Q4_0 if matrix.minimum is None else Type.Q4_1


def decode(data: np.ndarray, kind: Type) -> QTensor:
    """The matrix [rows, columns], with scales [rows, columns / 32], from rows of bytes in one of FILE_TYPES."""
    blocks = data.reshape(len(data), -1, gguf.GGML_QUANT_SIZES[kind][1])
    num_floats = 2 if kind == Type.Q4_1 else 1
    floats = np.ascontiguousarray(blocks[..., : 2 * num_floats]).view(np.float16)
    values = blocks[..., 2 * num_floats :]
    if kind == Type.Q8_0:
        q = values.view(np.int8)
    else:
        q = (np.concatenate([values & 15, values >> 4], axis=-1).astype(np.int8) - 8).astype(ml_dtypes.int4)
    minimum = floats[..., 1] if num_floats == 2 else None
    return QTensor(q.reshape(len(data), -1), floats[..., 0], minimum)  # pyright: ignore[reportArgumentType]


def encode(matrix: QTensor) -> np.ndarray | None:
    """The rows of bytes for a quantized matrix of numpy arrays [rows, columns].

    The quantized values are kept, and scales are rounded to float16. None if a block spans groups with different scales
    or minimums.
    """
    kind, rows = type_of(matrix), len(matrix.q)
    parts = (matrix.scale, matrix.minimum)
    by_block = [_for_blocks(np.asarray(part), matrix.q.shape[1]) for part in parts if part is not None]
    if any(part is None for part in by_block):
        return None
    q = np.asarray(matrix.q).astype(np.int8).reshape(rows, -1, COLUMNS)
    if kind == Type.Q8_0:
        values = q.view(np.uint8)
    else:
        steps = (q + 8).view(np.uint8)
        values = steps[..., : COLUMNS // 2] | steps[..., COLUMNS // 2 :] << 4
    heads = [np.asarray(part).astype(np.float16)[..., None].view(np.uint8) for part in by_block]
    return np.concatenate([*heads, values], axis=-1).reshape(rows, -1)


def _for_blocks(part: np.ndarray, columns: int) -> np.ndarray | None:
    """The scale of each block, [rows, columns / 32], from the scales of groups; None if a block has several scales."""
    groups, blocks = part.shape[1], columns // COLUMNS
    if blocks % groups == 0:
        return np.repeat(part, blocks // groups, axis=1)
    if groups % blocks:
        return None
    by_block = part.reshape(len(part), blocks, -1)
    return by_block[..., 0] if (by_block == by_block[..., :1]).all() else None
