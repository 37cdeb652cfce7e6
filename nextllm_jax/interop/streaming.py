"""Tensors from files into a parameter tree, and back: one at a time, each straight to the devices that hold it.

Importing holds no whole model beside the one it makes: for each shard of each leaf it reads the rows and columns
that the shard needs from every layer into one buffer, and hands that buffer to its device.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nextllm_jax.errors import InputError
from nextllm_jax.interop.names import Part, tensor_shapes
from nextllm_jax.model.quantize import Observer, convert, ignore, is_quantized
from nextllm_jax.model.weights import by_name, with_names
from nextllm_jax.ops.quantized import QTensor

_BLOCK_NUMBERS = 4_000_000
"""Numbers that are read at a time."""


class Source(Protocol):
    """A file, or several, of named tensors."""

    where: str
    """What to call it in errors."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors that are there."""
        ...

    def read(self, tensor: str, rows: slice, columns: slice) -> np.ndarray:
        """Part of a tensor (a vector has rows only) as floating point numbers."""
        ...

    def read_quantized(self, tensor: str, rows: slice) -> QTensor | None:
        """Rows of a matrix, in numpy arrays, if the file has it as small integers with scales for groups of columns."""
        ...


def require_tensors(source: Source, parts: list[Part], *, ignore: Callable[[str], bool] = lambda _: False) -> None:
    """Raise InputError, naming the first that is wrong, unless a source has the tensors of `parts` and no others."""
    found, wanted = source.shapes(), tensor_shapes(parts)
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted and not ignore(name)]
    for names, what in ((missing, "lacks"), (extra, "has no place for")):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            subject = source.where if what == "lacks" else f"the model that {source.where} describes"
            raise InputError(f"{subject} {what} the tensor {names[0]}{others}; bring the files of one whole model")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise InputError(
                f"{source.where}: tensor {name} is {list(found[name])}, the config asks for {list(shape)}; "
                "bring the config and the weights of one model"
            )


def read_params(source: Source, parts: list[Part], abstract: Any, observe: Observer = ignore) -> Any:
    """The parameter tree that `abstract` describes: its structure, with a shape, type and sharding at each leaf.

    A QTensor in `abstract` asks for a quantized weight; values that the file has in that form already stay as they are.
    `observe` sees each of them. Raises InputError for a tensor with numbers that are not finite.
    """
    parts_by_leaf: dict[str, list[Part]] = {}
    for part in parts:
        parts_by_leaf.setdefault(part.leaf, []).append(part)
    return with_names(
        abstract,
        {
            name: _read_stack(source, parts_by_leaf[name], leaf, observe)
            if is_quantized(leaf)
            else _read_leaf(source, parts_by_leaf[name], leaf)
            for name, leaf in by_name(abstract).items()
        },
    )


def _read_stack(source: Source, parts: list[Part], leaf: QTensor, observe: Observer) -> QTensor:
    """A quantized weight, read and quantized one layer after another."""
    if parts[0].index is None:
        return _read_quantized(source, parts[0], leaf, observe)
    layer = jax.tree.map(_without_stack, leaf)
    layers = [_read_quantized(source, part._replace(index=None), layer, observe) for part in parts]
    shardings = jax.tree.map(lambda part: part.sharding, leaf)
    return jax.jit(lambda layers: jax.tree.map(lambda *parts: jnp.stack(parts), *layers), out_shardings=shardings)(
        layers
    )


def _without_stack(leaf: Any) -> Any:
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def _read_quantized(source: Source, part: Part, like: QTensor, observe: Observer) -> QTensor:
    """The quantized matrix of one layer."""
    found = source.read_quantized(part.tensor, slice(part.first_row, part.first_row + part.file_shape[0]))
    kept = None if found is None else _in_our_layout(part, found, like)
    if kept is not None:
        observe(part.leaf, None, kept)
        return kept
    whole: Any = jax.ShapeDtypeStruct(like.q.shape, jnp.float32, sharding=like.q.sharding)
    before = _read_leaf(source, [part], whole)
    after = convert(before, like)
    observe(part.leaf, before, after)
    return after


def _in_our_layout(part: Part, found: QTensor, like: QTensor) -> QTensor | None:
    """A quantized matrix of a file in the form of `like`, with the same values; None if that cannot hold them."""
    groups = part.to_file(np.empty(like.scale.shape, bool)).shape[1]
    if like.q.dtype != found.q.dtype or groups % found.scale.shape[1]:
        return None
    if like.minimum is None and found.minimum is not None:
        return None

    def placed(values: np.ndarray, like: Any) -> jax.Array:
        values = part.from_file(values, like.shape).astype(like.dtype)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: values[index])

    def regrouped(values: Any) -> np.ndarray:
        return np.repeat(values, groups // found.scale.shape[1], axis=1)

    least = int(jnp.iinfo(like.q.dtype).min)
    minimum = found.scale * least if found.minimum is None else found.minimum
    return QTensor(
        placed(np.asarray(found.q), like.q),
        placed(regrouped(found.scale), like.scale),
        None if like.minimum is None else placed(regrouped(minimum), like.minimum),
    )


def _read_leaf(source: Source, parts: list[Part], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """One leaf, its shards made one after another; devices that hold the same shard share a read."""
    sharding: Any = leaf.sharding
    devices_by_spans: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        spans = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        devices_by_spans.setdefault(spans, []).append(device)
    arrays = []
    for spans, devices in devices_by_spans.items():
        shard = _read_shard(source, parts, tuple(slice(*span) for span in spans), leaf.dtype)
        arrays += [jax.device_put(shard, jax.sharding.SingleDeviceSharding(device)) for device in devices]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _read_shard(source: Source, parts: list[Part], spans: tuple[slice, ...], dtype: Any) -> np.ndarray:
    shard = _aligned_empty([span.stop - span.start for span in spans], np.dtype(dtype))
    if parts[0].index is None:
        _fill(shard, source, parts[0], spans)
    else:
        for layer, part in zip(shard, parts[spans[0]], strict=True):
            _fill(layer, source, part, spans[1:])
    return shard


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An array that jax takes as it is on a CPU: one that starts elsewhere than at a multiple of 64 it would copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _fill(layer: np.ndarray, source: Source, part: Part, spans: tuple[slice, ...]) -> None:
    """Read the spans of one layer of a leaf into `layer`, which is in our layout, a few rows of the file at a time."""
    inputs, dtype = part.inputs, layer.dtype
    # As plain integers, which numpy transposes several times faster than bfloat16.
    layer = layer.view(f"u{dtype.itemsize}")
    if inputs:
        columns, rows = _flat(spans[:inputs], part.shape[:inputs]), _flat(spans[inputs:], part.shape[inputs:])
        target = layer.reshape(columns.stop - columns.start, -1).T
    elif part.kind == "embedding":
        (rows, columns), target = spans, layer
    else:
        rows, columns, target = _flat(spans, part.shape), slice(0, 1), layer.reshape(-1)
    step = max(1, _BLOCK_NUMBERS // (columns.stop - columns.start))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        block = source.read(part.tensor, slice(part.first_row + start, part.first_row + stop), columns)
        if not np.isfinite(block).all():
            raise InputError(
                f"{source.where}: tensor {part.tensor} holds numbers that are not finite; bring intact weights"
            )
        target[start - rows.start : stop - rows.start] = block.astype(dtype, copy=False).view(layer.dtype)


def _flat(spans: tuple[slice, ...], shape: tuple[int, ...]) -> slice:
    """The span of several dimensions flattened into one, of which the first alone may be divided."""
    inner = 1
    for span, size in zip(spans[1:], shape[1:], strict=True):
        if (span.start, span.stop) != (0, size):
            raise ValueError(f"dimensions {shape} are divided at {spans}; only the first may be")
        inner *= size
    return slice(spans[0].start * inner, spans[0].stop * inner)


def tensors_of(parts: list[Part], params: Any, *, rows: int) -> Iterator[tuple[str, Any]]:
    """(name, array) of every tensor of a file, one at a time; embedding and head have the first `rows` rows alone.

    A quantized one is a QTensor of arrays in the layout of the file.
    """
    leaves = by_name(params)
    pending: list[Any] = []
    for place, part in enumerate(parts):
        pending.append(jax.tree.map(functools.partial(_rows_of, part, rows), leaves[part.leaf]))
        if place + 1 == len(parts) or parts[place + 1].tensor != part.tensor:
            yield part.tensor, jax.tree.map(lambda *arrays: np.concatenate(arrays), *pending)
            pending = []


def _rows_of(part: Part, rows: int, leaf: Any) -> np.ndarray:
    array = part.to_file(np.asarray(leaf if part.index is None else leaf[part.index]))
    return array[:rows] if part.kind == "embedding" else array
