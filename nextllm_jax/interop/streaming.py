"""Streams tensors from files into a sharded parameter tree, and back, one at a time.

Importing never needs a second copy of the model. For each shard of each leaf it reads the required rows and columns of
every layer and expert into one buffer, and transfers that buffer to its device.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nextllm_jax.errors import InputError
from nextllm_jax.interop.names import Part, tensor_shapes
from nextllm_jax.model.quantize import Observer, convert, ignore, is_quantized, require_finite
from nextllm_jax.model.weights import by_name, with_names
from nextllm_jax.ops.quantized import QTensor
from nextllm_jax.progress import progress_bar

_BLOCK_NUMBERS = 4_000_000
"""Number of values that are read at a time."""


class Source(Protocol):
    """One or more files with named tensors."""

    where: str
    """Name of the source in errors."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor."""
        ...

    def read(self, tensor: str, rows: slice, columns: slice) -> np.ndarray:
        """Part of a tensor as floating-point values; `columns` is ignored for a vector.

        The rows of a tensor of several experts count on; those that are read belong to one expert.
        """
        ...

    def read_quantized(self, tensor: str, rows: slice) -> QTensor | None:
        """Rows of a quantized matrix, as numpy arrays; None if it is not quantized in a supported type."""
        ...


def require_tensors(source: Source, parts: list[Part], *, ignore: Callable[[str], bool] = lambda _: False) -> None:
    """Raise InputError, which names the first bad tensor, unless a source has exactly the tensors of `parts`."""
    found, wanted = source.shapes(), tensor_shapes(parts)
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted and not ignore(name)]
    for names, what in ((missing, "lacks"), (extra, "does not have")):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            subject = source.where if what == "lacks" else f"the model that {source.where} describes"
            raise InputError(f"{subject} {what} the tensor {names[0]}{others}; use the files of one complete model")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise InputError(
                f"{source.where}: tensor {name} has shape {list(found[name])}, but the config needs {list(shape)}; "
                "use the config and the weights of one model"
            )


def read_params(source: Source, parts: list[Part], abstract: Any, observe: Observer = ignore) -> Any:
    """The parameter tree with the structure of `abstract` and the shape, type and sharding of each of its leaves.

    A QTensor in `abstract` gives a quantized weight. If the file already stores it in that form, its values are kept.
    `observe` is called for each quantized weight. Raises InputError for a tensor with values that are not finite.
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
            for name, leaf in progress_bar(by_name(abstract).items(), desc="reading weights", unit=" arrays")
        },
    )


def _read_stack(source: Source, parts: list[Part], leaf: QTensor, observe: Observer) -> QTensor:
    """A quantized weight, read and quantized one matrix at a time."""
    if not parts[0].index:
        return _read_quantized(source, parts[0], leaf, observe)
    inner = jax.tree.map(_without_stack, leaf)
    stack = [
        _read_stack(source, [part._replace(index=part.index[1:]) for part in same], inner, observe)
        for _, same in itertools.groupby(parts, lambda part: part.index[0])
    ]
    shardings = jax.tree.map(lambda part: part.sharding, leaf)
    return jax.jit(lambda stack: jax.tree.map(lambda *parts: jnp.stack(parts), *stack), out_shardings=shardings)(stack)


def _without_stack(leaf: Any) -> Any:
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def _read_quantized(source: Source, part: Part, like: QTensor, observe: Observer) -> QTensor:
    """The quantized matrix of one part."""
    found = source.read_quantized(part.tensor, slice(part.first_row, part.first_row + part.file_shape[0]))
    kept = None if found is None else _in_our_layout(part, found, like)
    if kept is not None:
        require_finite(part.leaf, kept)
        observe(part.leaf, None, kept)
        return kept
    whole: Any = jax.ShapeDtypeStruct(like.q.shape, jnp.float32, sharding=like.q.sharding)
    before = _read_leaf(source, [part], whole)
    after = convert(before, like, name=part.leaf)
    observe(part.leaf, before, after)
    return after


def _in_our_layout(part: Part, found: QTensor, like: QTensor) -> QTensor | None:
    """A quantized matrix of a file in the form of `like`, with the same values; None if that form cannot hold them."""
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
    """One leaf, read one shard at a time; a shard that several devices hold is read once."""
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
    depth, by_index = len(parts[0].index), {part.index: part for part in parts}
    for place in np.ndindex(*shard.shape[:depth]):
        part = by_index[tuple(span.start + i for span, i in zip(spans, place, strict=False))]
        _fill(shard[place], source, part, spans[depth:])
    return shard


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An array that jax uses on a CPU without a copy, since it is aligned to 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _fill(matrix: np.ndarray, source: Source, part: Part, spans: tuple[slice, ...]) -> None:
    """Read the spans of one part into `matrix`, in our layout, a few rows of the file at a time."""
    inputs, dtype = part.inputs, matrix.dtype
    # As plain integers, which numpy transposes several times faster than bfloat16.
    matrix = matrix.view(f"u{dtype.itemsize}")
    if inputs:
        columns, rows = _flat(spans[:inputs], part.shape[:inputs]), _flat(spans[inputs:], part.shape[inputs:])
        target = matrix.reshape(columns.stop - columns.start, -1).T
    elif part.kind == "embedding":
        (rows, columns), target = spans, matrix
    else:
        rows, columns, target = _flat(spans, part.shape), slice(0, 1), matrix.reshape(-1)
    step = max(1, _BLOCK_NUMBERS // (columns.stop - columns.start))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        block = source.read(part.tensor, slice(part.first_row + start, part.first_row + stop), columns)
        if not np.isfinite(block).all():
            raise InputError(
                f"{source.where}: tensor {part.tensor} holds values that are not finite; restore intact weights"
            )
        target[start - rows.start : stop - rows.start] = block.astype(dtype, copy=False).view(matrix.dtype)


def _flat(spans: tuple[slice, ...], shape: tuple[int, ...]) -> slice:
    """The span of several dimensions when they are flattened into one. Only the first may be sharded."""
    inner = 1
    for span, size in zip(spans[1:], shape[1:], strict=True):
        if (span.start, span.stop) != (0, size):
            raise ValueError(f"dimensions {shape} are sharded as {spans}; only the first may be")
        inner *= size
    return slice(spans[0].start * inner, spans[0].stop * inner)


def tensors_of(parts: list[Part], params: Any, *, rows: int) -> Iterator[tuple[str, Any]]:
    """(name, array) of every tensor of a file, one at a time; only the first `rows` rows of embedding and head.

    The rows of several experts follow each other. A quantized tensor is a QTensor of arrays in the layout of the file.
    """
    leaves = by_name(params)
    pending: list[Any] = []
    for i, part in enumerate(progress_bar(parts, desc="writing weights", unit=" tensors")):
        pending.append(jax.tree.map(functools.partial(_rows_of, part, rows), leaves[part.leaf]))
        if i + 1 == len(parts) or parts[i + 1].tensor != part.tensor:
            yield part.tensor, jax.tree.map(lambda *arrays: np.concatenate(arrays), *pending)
            pending = []


def _rows_of(part: Part, rows: int, leaf: Any) -> np.ndarray:
    array = part.to_file(np.asarray(leaf[part.index]))
    return array[:rows] if part.kind == "embedding" else array
