"""Reads and writes GGUF files with the `gguf` package.

Import supports float types and most quantized types (`_READABLE`); export writes F32, F16, BF16 or Q8_0. Quantized
matrices of a model are exported in the matching block type: Q8_0, Q4_0 or Q4_1 (see gguf_blocks).
"""

import collections
import dataclasses
import functools
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.hardware import readable_bytes
from nextllm_jax.interop import gguf_blocks
from nextllm_jax.interop.gguf_config import (
    ARCHITECTURES,
    ROPE_TENSORS,
    Architecture,
    architecture_of,
    model_type_of,
    read_gguf_config,
    write_gguf_config,
)
from nextllm_jax.interop.names import EARLY_MIXTRAL_GGUF, Part, all_parts, parts_of, tensor_shapes
from nextllm_jax.interop.streaming import read_params, require_tensors, tensors_of
from nextllm_jax.model.quantize import Observer, ignore, is_quantized
from nextllm_jax.model.weights import by_name
from nextllm_jax.ops.quantized import QTensor, dequantize

_log = logging.getLogger(__name__)

_READABLE = tuple(
    Type[name]
    for name in (
        "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
        "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
    )
    if name in Type.__members__  # the oldest supported version of the package lacks some
)  # fmt: skip
_WRITABLE = {
    "float32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_FLOAT16_MAX = float(np.finfo(np.float16).max)
_FLOAT16_STEPS = {Type.F16: 1, Type.Q8_0: 127, Type.Q4_0: 8, Type.Q4_1: 1}
"""The greatest magnitude that a type holds, in units of its float16 numbers."""
_ONE_ROW = ".ffn_gate_inp_shexp.weight"
_ROUTERS = (".ffn_gate_inp.weight", _ONE_ROW)
"""Ends of the names of matrices that are written as F32, since models use them in float32."""


class GGUFFile:
    """An open file, or several that a model is split into: the metadata, and the model that it describes.

    Unsupported keys of the model in `ignore_keys` are ignored. Raises InputError, which names the file, if it is
    incomplete or its model is not supported.
    """

    def __init__(self, path: Path, ignore_keys: Collection[str] = ()) -> None:
        self.where = str(path)
        readers = _open_parts(path)
        self.metadata = _metadata(*next(iter(readers.items())))
        self._tensors: dict[str, gguf.ReaderTensor] = {}
        for file, reader in readers.items():
            for tensor in reader.tensors:
                if tensor.tensor_type not in _READABLE:
                    known = ", ".join(kind.name for kind in _READABLE)
                    kind = tensor.tensor_type.name
                    raise InputError(f"{file}: tensor {tensor.name} has type {kind}; use one of {known}")
                if tensor.name in self._tensors:
                    raise InputError(f"{file}: tensor {tensor.name} is in another part too; use the parts of one model")
                self._tensors[tensor.name] = tensor
        total = self.metadata.get("split.tensors.count", len(self._tensors))
        if total != len(self._tensors):
            raise InputError(f"{path}: the parts have {len(self._tensors)} tensors, not {total}; use intact parts")
        self._shapes = {name: _shape_of(tensor) for name, tensor in self._tensors.items()}
        name = architecture_of(self.metadata, self.where)
        self._architecture = ARCHITECTURES[name]
        self._names = dict(self._architecture.names)
        if "blk.0.ffn_gate.0.weight" in self._tensors:
            self._names |= EARLY_MIXTRAL_GGUF
        factors = {name: self._whole(name) for name in ROPE_TENSORS if name in self._tensors}
        if "token_embd.weight" not in self._tensors:
            raise InputError(f"{path} lacks the tensor token_embd.weight; use the file of a complete model")
        self.config = read_gguf_config(
            self.metadata, self._tensors, factors, self._shapes["token_embd.weight"][0], self.where, ignore_keys
        )
        self.model_type = model_type_of(name, self.config)

    def load_params(self, abstract: Any, observe: Observer = ignore) -> Any:
        """The weights as the tree that `abstract` describes, each leaf with its shape, type and sharding.

        The tree may be a part of the model's. `observe` is called for each quantized weight. Raises InputError if
        weights are missing, do not fit the config, or are not finite.
        """
        parts = all_parts(self.config, "gguf", special=self._names)
        require_tensors(self, parts, ignore=lambda name: name in ROPE_TENSORS)
        return read_params(self, parts_of(self.config, abstract, "gguf", special=self._names), abstract, observe)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor in the file."""
        return self._shapes

    def read(self, tensor: str, rows: slice, columns: slice) -> np.ndarray:
        """Part of a tensor, dequantized, in the layout of Hugging Face files."""
        part = quants.dequantize(self._data(tensor, rows), self._tensors[tensor].tensor_type)
        if tensor.endswith("norm.weight"):
            part = part - np.float32(self._architecture.norm_offset)
        return part if part.ndim == 1 else part[:, columns]

    def read_quantized(self, tensor: str, rows: slice) -> QTensor | None:
        """Rows of a matrix as quantized in the file; None if its type is not one of `gguf_blocks.FILE_TYPES`."""
        kind = self._tensors[tensor].tensor_type
        if kind not in gguf_blocks.FILE_TYPES:
            return None
        matrix = gguf_blocks.decode(self._data(tensor, rows), kind)
        if not all(np.isfinite(part).all() for part in (matrix.scale, matrix.minimum) if part is not None):
            raise InputError(f"{self.where}: tensor {tensor} holds values that are not finite; restore intact weights")
        return matrix

    def _data(self, tensor: str, rows: slice) -> np.ndarray:
        """Rows of a tensor with the file's own encoding, in the row order of Hugging Face files."""
        order = np.arange(rows.start, rows.stop)
        if _is_permuted(self._architecture, tensor):
            order = _permuted_rows(order, self.config.head_dim)
        data = self._tensors[tensor].data
        return data[order] if len(self._shapes[tensor]) == 1 else data.reshape(-1, data.shape[-1])[order]

    def _whole(self, tensor: str) -> np.ndarray:
        return quants.dequantize(self._tensors[tensor].data, self._tensors[tensor].tensor_type)


def files_of(path: Path) -> list[Path]:
    """The files of a model, in order: the given one, or all parts if it is one part of a model that is split.

    Raises InputError if a part is missing or is not a part of this model.
    """
    return [*_open_parts(path)]


def _open_parts(path: Path) -> dict[Path, gguf.GGUFReader]:
    """The readers of `files_of`."""
    reader = _open(path)
    count = _number(reader, "split.count")
    if count <= 1:
        return {path: reader}
    named = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if named is None or int(named[2]) != count:
        raise InputError(
            f"{path} is one of {count} parts, whose names must end with -00001-of-{count:05}.gguf, ...; rename them"
        )
    readers = {}
    for number in range(count):
        file = path.with_name(f"{named[1]}-{number + 1:05}-of-{count:05}.gguf")
        if not file.is_file():
            raise InputError(f"{path} is one of {count} parts, but {file.name} is missing; add it")
        part = readers[file] = reader if file == path else _open(file)
        if (_number(part, "split.no"), _number(part, "split.count")) != (number, count):
            raise InputError(f"{file} is not part {number + 1} of {count}; use the parts of one model")
    return readers


def _number(reader: gguf.GGUFReader, key: str) -> int:
    """A number in the metadata; 0 if it is missing."""
    field = reader.get_field(key)
    return 0 if field is None else int(field.contents())


def _open(path: Path) -> gguf.GGUFReader:
    """The reader of a file. Raises InputError if it is unreadable."""
    try:
        reader = gguf.GGUFReader(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except Exception as error:  # the parser raises many kinds of exceptions for a damaged file
        raise _damaged(path, error) from error
    if reader.byte_order != "I":  # the package swaps the bytes of metadata, but not of all types of tensors
        raise InputError(
            f"{path} has the byte order of another kind of machine (it is big-endian); convert it with python -m "
            f"gguf.scripts.gguf_convert_endian {path.name} little"
        )
    return reader


def _metadata(path: Path, reader: gguf.GGUFReader) -> dict[str, Any]:
    try:
        return {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not a GGUF file, or is damaged or truncated ({error}); restore an intact copy")


def _shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor in a file; that of a matrix of one row, which may be written as a vector, as a matrix."""
    shape = tuple(map(int, reversed(tensor.shape)))
    return (1, *shape) if tensor.name.endswith(_ONE_ROW) and len(shape) == 1 else shape


def _is_permuted(architecture: Architecture, tensor: str) -> bool:
    return architecture.permuted and tensor.endswith(
        (".attn_q.weight", ".attn_k.weight", ".attn_q.bias", ".attn_k.bias")
    )


def _permuted_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The positions of rows of q or k in a file where the two dimensions of a RoPE rotation are next to each other."""
    head, dimension = np.divmod(rows, head_dim)
    half, pair = np.divmod(dimension, head_dim // 2)
    return head * head_dim + 2 * pair + half


def export(
    config: ModelConfig,
    params: Any,
    file: Path,
    *,
    vocab_size: int,
    dtype: str,
    model_type: str | None = None,
    metadata: Mapping[str, Any],
) -> None:
    """Write a model as a GGUF file, with the tokenizer's `metadata`.

    Matrices are written in `dtype`: float32, float16, bfloat16 or q8_0. With q8_0, matrices whose row length is not a
    multiple of 32 are written as float16. Quantized matrices keep their own block type. Vectors and the matrices of
    routers are written as F32.
    Only the first `vocab_size` rows of the embedding and the head are written. Raises InputError if no architecture
    (or not the one of `model_type`) can represent this model.
    """
    config = dataclasses.replace(config, vocab_size=vocab_size)
    names = tensor_shapes(parts_of(config, params, "gguf"))
    name, values, factors = write_gguf_config(config, names, model_type)
    architecture, (matrix_type, file_type) = ARCHITECTURES[name], _WRITABLE[dtype]
    parts = parts_of(config, params, "gguf", special=architecture.names)
    block_types = _block_types(parts, params)
    if block_types:
        ((most_common, _),) = collections.Counter(block_types.values()).most_common(1)
        file_type = gguf_blocks.FILE_TYPES[most_common]
    shapes = {
        tensor: (vocab_size, *shape[1:]) if _is_table(tensor) else shape
        for tensor, shape in tensor_shapes(parts).items()
    }
    writer, total = gguf.GGUFWriter(file, name), 0
    try:
        for key, value in {**values, **metadata}.items():
            if key != "general.architecture":
                _add(writer, key, value)
        writer.add_file_type(file_type)
        for tensor, shape in {**{tensor: array.shape for tensor, array in factors.items()}, **shapes}.items():
            kind = _type_of(tensor, shape, block_types.get(tensor, matrix_type))
            shape = shape[1:] if tensor.endswith(_ONE_ROW) else shape
            nbytes = int(np.prod(quants.quant_shape_to_byte_shape(shape, kind)))
            total += nbytes
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        _log.info(f"writing {readable_bytes(total)} of weights")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in factors.values():
            writer.write_tensor_data(array.astype(np.float32))
        rounded_again = 0
        for tensor, array in tensors_of(parts, params, rows=vocab_size):
            in_order = functools.partial(_in_order, tensor, architecture=architecture, head_dim=config.head_dim)
            array = jax.tree.map(in_order, array)
            kind = _type_of(tensor, array.shape, block_types.get(tensor, matrix_type))
            dense = _dense(tensor, array, kind)
            in_blocks = isinstance(array, QTensor) and kind in gguf_blocks.FILE_TYPES
            data = gguf_blocks.encode(array) if in_blocks else None
            rounded_again += in_blocks and data is None
            writer.write_tensor_data(quants.quantize(dense, kind) if data is None else data)
    finally:
        writer.close()
    if rounded_again:
        _log.warning(
            f"{rounded_again} matrices were rounded again, because their groups of inputs are smaller than the "
            f"{gguf_blocks.COLUMNS} inputs of a GGUF block"
        )


def _in_order(tensor: str, array: np.ndarray, architecture: Architecture, head_dim: int) -> np.ndarray:
    """A tensor in Hugging Face's layout, converted to the layout of an architecture's files."""
    if _is_permuted(architecture, tensor):
        order = np.empty(len(array), int)
        order[_permuted_rows(np.arange(len(array)), head_dim)] = np.arange(len(array))
        array = array[order]
    if tensor.endswith("norm.weight"):
        array = array.astype(np.float32) + np.float32(architecture.norm_offset)
    return np.ascontiguousarray(array)


def _block_types(parts: list[Part], params: Any) -> dict[str, Type]:
    """The types of the tensors that hold quantized matrices."""
    leaves = by_name(params)
    return {part.tensor: gguf_blocks.type_of(leaves[part.leaf]) for part in parts if is_quantized(leaves[part.leaf])}


def _is_table(tensor: str) -> bool:
    return tensor in ("token_embd.weight", "output.weight")


def _type_of(tensor: str, shape: tuple[int, ...], matrix_type: Type) -> Type:
    """The type in which a tensor is written."""
    if len(shape) == 1 or tensor.endswith(_ROUTERS):
        return Type.F32
    return Type.F16 if matrix_type in gguf_blocks.FILE_TYPES and shape[-1] % gguf_blocks.COLUMNS else matrix_type


def _dense(tensor: str, array: np.ndarray | QTensor, kind: Type) -> np.ndarray:
    """A tensor in float32. Raises InputError for a value that exceeds the range of `kind`."""
    dense: Any = dequantize(array, np.float32)  # pyright: ignore[reportArgumentType]
    if kind in _FLOAT16_STEPS and dense.size and np.abs(dense).max() > _FLOAT16_STEPS[kind] * _FLOAT16_MAX:
        floats = "the model that was quantized " if isinstance(array, QTensor) else ""
        raise InputError(
            f"tensor {tensor} holds values that exceed float16 in {kind.name}; export {floats}as bfloat16 or float32"
        )
    return dense


def _add(writer: Any, key: str, value: Any) -> None:
    """Add metadata in the type that readers expect: int as uint32, float as float32."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
