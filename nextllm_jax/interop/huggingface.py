"""Reads and writes Hugging Face directories: config.json, one or more safetensors files, generation_config.json.

Weights are only read from safetensors, so nothing is ever unpickled.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.interop.families import FAMILIES
from nextllm_jax.interop.huggingface_config import read_model_config, write_model_config
from nextllm_jax.interop.names import all_parts, parts_of, tensor_shapes
from nextllm_jax.interop.streaming import read_params, require_tensors, tensors_of
from nextllm_jax.model.quantize import Observer, ignore
from nextllm_jax.tokenizer.huggingface_files import read_json, write_json

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""The types in which weights can be exported."""


def read_config(directory: Path, ignore_keys: Collection[str] = ()) -> tuple[ModelConfig, str]:
    """The ModelConfig of a directory and its model_type.

    Raises InputError, which names the key, for an unsupported key that is not in `ignore_keys`.
    """
    values = read_json(directory / CONFIG)
    return read_model_config(values, str(directory / CONFIG), ignore_keys), values["model_type"]


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The content of a directory's generation_config.json; empty if it has none. Raises InputError, which names it."""
    return read_json(directory / GENERATION_CONFIG)


def load_params(
    directory: Path, config: ModelConfig, model_type: str, abstract: Any, observe: Observer = ignore
) -> Any:
    """The weights of a directory as the tree that `abstract` describes, each leaf with its shape, type and sharding.

    The tree may be a part of the model's. `observe` is called for each quantized weight. Raises InputError if weights
    are missing, do not fit the config, are not finite, or are not safetensors.
    """
    source = SafetensorsSource(directory)
    names = FAMILIES[model_type].names
    require_tensors(
        source,
        all_parts(config, "huggingface", special=names),
        ignore=lambda name: name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight",
    )
    if config.tie_embeddings and "embed" in abstract and "lm_head.weight" in source.shapes():
        _require_tied(source)
    return read_params(source, parts_of(config, abstract, "huggingface", special=names), abstract, observe)


def _require_tied(source: "SafetensorsSource") -> None:
    """Raise InputError if lm_head.weight differs from the embedding although the two are tied."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    shape = source.shapes()[embedding]
    equal = shape == source.shapes()[head]
    for start in range(0, shape[0], 1024) if equal else ():
        rows, columns = slice(start, min(start + 1024, shape[0])), slice(0, shape[1])
        equal = equal and np.array_equal(source.read(embedding, rows, columns), source.read(head, rows, columns))
    if not equal:
        raise InputError(
            f"{source.where}: tie_word_embeddings is true but lm_head.weight differs from the embedding; "
            "set it to false in config.json if the model has a separate head"
        )


class SafetensorsSource:
    """The tensors of a directory's safetensors files: of a model, or of the given ones."""

    def __init__(self, directory: Path, files: Iterable[Path] | None = None) -> None:
        self.where = str(directory)
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(directory) if files is None else files:
            for name, shape, handle in _open(path):
                if name in self._files:
                    raise InputError(f"{directory}: tensor {name} is in two files; keep the files of only one model")
                self._files[name], self._shapes[name] = handle, shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor in the files."""
        return self._shapes

    def read(self, tensor: str, rows: slice, columns: slice) -> np.ndarray:
        """Part of a tensor, in the type of the file."""
        part, shape = self._files[tensor].get_slice(tensor), self._shapes[tensor]
        if len(shape) == 1:
            return part[rows]
        if len(shape) == 2:
            return part[rows, columns]
        expert, first = divmod(rows.start, shape[1])
        return part[expert, first : first + rows.stop - rows.start, columns]

    def read_quantized(self, tensor: str, rows: slice) -> None:
        """None, since safetensors files with quantized weights are not supported."""


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise InputError(f"{index} has no weight_map from tensors to files; restore an intact copy")
        files = sorted(set(names.values()))
        for name in files:
            if Path(name).name != name:
                raise InputError(f"{index} names the file {name}; it must be in the same directory")
            if not (directory / name).exists():
                raise InputError(f"{index} names {name}, which is missing; add all files of the model")
        return [directory / name for name in files]
    if (directory / _SINGLE).exists():
        return [directory / _SINGLE]
    pickles = [path.name for pattern in _PICKLES for path in sorted(directory.glob(pattern))]
    if pickles:
        raise InputError(
            f"{directory} has its weights in the pickle {pickles[0]}, which could run any code and is not read; "
            "convert it to safetensors"
        )
    raise InputError(f"{directory} has neither {_SINGLE} nor {_INDEX}; add the weights as safetensors")


def _open(path: Path) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """(name, shape, open file) of each tensor. Tensors are read on demand and not cached."""
    try:
        handle: Any = safe_open(path, "numpy", backend="pread")
        for name in handle.keys():  # noqa: SIM118, it is not a dict
            view = handle.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise InputError(
                    f"{path}: tensor {name} is {view.get_dtype()}; weights must be {', '.join(_DTYPES)}, not quantized"
                )
            yield name, tuple(view.get_shape()), handle
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or truncated ({error}); restore an intact copy") from error


def export(
    config: ModelConfig,
    params: Any,
    directory: Path,
    *,
    vocab_size: int,
    dtype: str = "float32",
    model_type: str | None = None,
    shard_bytes: int = 5_000_000_000,
    token_ids: dict[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json, generation_config.json and safetensors files of about `shard_bytes` each into a directory.

    Only the first `vocab_size` rows of the embedding and the head are written; further rows are padding. `dtype` is one
    of DTYPES. `token_ids` (bos_token_id and so on) are added to both configs; `generation` is the other content of
    generation_config.json. Raises InputError if no Hugging Face family (or not `model_type`) can represent this model.
    """
    values = write_model_config(dataclasses.replace(config, vocab_size=vocab_size), model_type=model_type)
    directory.mkdir(parents=True, exist_ok=True)
    parts = parts_of(config, params, "huggingface", special=FAMILIES[values["model_type"]].names)
    shards, shapes = _Shards(directory, shard_bytes), tensor_shapes(parts)
    for name, array in tensors_of(parts, params, rows=vocab_size):
        array = np.ascontiguousarray(array.astype(DTYPES[dtype], copy=False))
        shards.add(name, array.reshape(-1, *shapes[name][1:]))
    shards.finish()
    token_ids = token_ids or {}
    write_json(directory / CONFIG, {**values, **token_ids, "torch_dtype": dtype})
    write_json(directory / GENERATION_CONFIG, {**(generation or {}), **token_ids})


class _Shards:
    """Collects tensors into files of about `shard_bytes`, renamed at the end, since names contain the file count."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self._directory, self._shard_bytes = directory, shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = self._total_bytes = 0
        self._written: list[list[str]] = []

    def add(self, name: str, array: np.ndarray) -> None:
        if self._pending and self._pending_bytes + array.nbytes > self._shard_bytes:
            self._write()
        self._pending[name] = array
        self._pending_bytes += array.nbytes

    def _write(self) -> None:
        part = self._directory / f"part-{len(self._written)}"
        try:
            save_file(self._pending, part, metadata={"format": "pt"})
        except SafetensorError as error:  # for example on a full disk
            raise OSError(str(error)) from error
        part.chmod(0o644)  # the library makes it readable only for the owner
        self._written.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        self._write()
        count = len(self._written)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [_SINGLE]
        for i, name in enumerate(names):
            (self._directory / f"part-{i}").rename(self._directory / name)
        if count > 1:
            weight_map = {tensor: names[i] for i, tensors in enumerate(self._written) for tensor in tensors}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self._directory / _INDEX, index)
