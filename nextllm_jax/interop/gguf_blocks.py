"""Blocks of GGUF files as quantized matrices, and back, bit for bit: Q8_0, Q4_0 and Q4_1.

A block is 32 consecutive columns of a row: a float16 scale, in Q4_1 a float16 minimum, then 32 bytes, or 16 bytes that
hold column i in the low half of byte i and column 16 + i in the high half. 4-bit values count from 0 in files.
"""

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

from nextllm_jax.ops.quantized import QTensor

COLUMNS = 32
FILE_TYPES = {
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
}
"""The types of blocks that can be kept, and what a file that is mostly of them calls itself."""


def type_of(matrix: QTensor) -> Type:
    """The type of the blocks that a quantized matrix is written in."""
    if matrix.q.dtype == np.int8:
        return Type.Q8_0
    return Type.Q4_0 if matrix.minimum is None else Type.Q4_1


def decode(data: np.ndarray, kind: Type) -> QTensor:
    """The matrix [rows, columns] of rows of bytes in one of FILE_TYPES, with scales [rows, columns / 32]."""
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


def encode(matrix: QTensor, dense: np.ndarray) -> np.ndarray:
    """The rows of bytes of a quantized matrix, in arrays [rows, columns] of numpy; `dense` is the matrix in float32.

    Its own values are kept, with scales rounded to float16, unless a block holds groups that differ: then `dense` is
    quantized again.
    """
    kind, (rows, columns) = type_of(matrix), matrix.q.shape
    floats = [np.asarray(part) for part in (matrix.scale, matrix.minimum) if part is not None]
    by_block = [_for_blocks(part, columns) for part in floats]
    if any(part is None for part in by_block):
        return quants.quantize(dense, kind)
    q = np.asarray(matrix.q).astype(np.int8).reshape(rows, -1, COLUMNS)
    if kind == Type.Q8_0:
        values = q.view(np.uint8)
    else:
        steps = (q + 8).view(np.uint8)
        values = steps[..., : COLUMNS // 2] | steps[..., COLUMNS // 2 :] << 4
    heads = [np.asarray(part).astype(np.float16)[..., None].view(np.uint8) for part in by_block]
    return np.concatenate([*heads, values], axis=-1).reshape(rows, -1)


def _for_blocks(part: np.ndarray, columns: int) -> np.ndarray | None:
    """The scale of each block [rows, columns / 32], of the scales of groups; None where a block has several."""
    groups, blocks = part.shape[1], columns // COLUMNS
    if blocks % groups == 0:
        return np.repeat(part, blocks // groups, axis=1)
    if groups % blocks:
        return None
    by_block = part.reshape(len(part), blocks, -1)
    return by_block[..., 0] if (by_block == by_block[..., :1]).all() else None
