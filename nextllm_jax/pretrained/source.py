"""Opens the model of a run directory, a Hugging Face directory or a GGUF file."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import NamedSharding

from nextllm_jax.checkpoint.base import base_parts
from nextllm_jax.checkpoint.leaves import PLACEHOLDER
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.checkpoint.saved_steps import SavedSteps
from nextllm_jax.config import Config, LoraConfig
from nextllm_jax.config.files import from_dict
from nextllm_jax.config.model import ModelConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError, missing_package
from nextllm_jax.model import lora
from nextllm_jax.model.quantize import Observer, abstract_packed, abstract_quantized, convert, ignore, is_quantized
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import STACK, by_name, unstacked_names, with_names
from nextllm_jax.published_models import PUBLISHED_MODELS
from nextllm_jax.sharding import on_device, placed
from nextllm_jax.storage.downloads import local_copy
from nextllm_jax.tokenizer.huggingface_files import read_json
from nextllm_jax.tokenizer.tokenizer import Tokenizer

ORIGIN = "imported"
"""Key in the record of an imported checkpoint: facts about the original files that an export needs."""
QUANTIZED = "quantized"
"""Key in the record of a quantized checkpoint: its Quantization."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that can be loaded: its config, and how to read its tokenizer and its parameters."""

    config: ModelConfig
    load_tokenizer: Callable[[], Tokenizer]
    """Raises InputError if there is none."""
    load_params: "LoadParams"
    is_run: bool
    """Whether it is a run directory."""
    model_type: str | None = None
    """The Hugging Face model type of imported weights."""
    vocab_size: int | None = None
    """Number of rows of the embedding in the files that the weights were imported from."""
    dtype: str = "float32"
    """The type in which an export stores the weights without loss: float32 or bfloat16."""
    quantization: Quantization | None = None
    """The quantization of a run's weights; None for floats. Also None for GGUF files, which can be read as floats."""
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The generation_config.json of imported weights."""
    step: int | None = None
    """The checkpoint of a run."""
    adapters: "Adapters | None" = None
    """The adapters of a run that has them; its `load_params` merges them."""

    def require_floats(self, path: str) -> None:
        """Raise InputError, which names `path`, if the weights are already quantized."""
        if self.quantization is not None:
            raise InputError(
                f"{path} is already quantized ({self.quantization}); quantize the model that it was made from, or use "
                "it as it is"
            )


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a run."""

    config: LoraConfig
    base: str
    """The model that they were trained on."""
    load: Callable[[Callable[[Any], Any]], Any]
    """Their tree, placed on devices by a function of boxed abstract arrays."""


class LoadParams(Protocol):
    """Reads the parameters of a model."""

    def __call__(self, abstract: Any, observe: Observer = ignore) -> Any:
        """The parameters in the shapes, dtypes, shardings and quantization of `abstract`, read one weight at a time.

        `abstract` is a tree of abstract arrays and QTensors, stacked over layers or not. For files of other programs it
        may be a part of the model's tree. `observe` is called for each weight that is quantized.

        Raises InputError if the weights are damaged, belong to another config, or are already quantized in another way.
        """
        ...


def open_path(path: str, *, step: str | int | None = None, ignore_keys: Collection[str] = ()) -> Source:
    """The model of a run directory, a Hugging Face directory or a GGUF file; see `open_model`.

    The latter two are copied to the user's cache directory if they are in a bucket.
    Keys of an external config in `ignore_keys` are ignored if they are not supported.
    """
    path = local_copy(path)
    file, run = Path(path), RunDir(path)
    if not (file.is_file() or _is_huggingface(file)):
        if run.exists():
            return _open_run(run, step)
        what = "is not" if run.path.exists() else "does not exist, so it is not"
        raise InputError(
            f"{path} {what} a run directory (with config.json, tokenizer and checkpoints), a Hugging Face directory, a "
            f".gguf file, or the name of a published model ({', '.join(PUBLISHED_MODELS)})"
        )
    if step is not None:
        raise InputError(f"{path} is not a run directory, so it has no steps; leave the step out")
    try:
        return _open_huggingface(file, ignore_keys) if file.is_dir() else _open_gguf(file, ignore_keys)
    except ModuleNotFoundError as error:
        raise missing_package(f"reading {path} needs", error, ".[interop]") from error


def _is_huggingface(directory: Path) -> bool:
    """Whether a directory has a config.json in the format of Hugging Face."""
    with contextlib.suppress(InputError):
        return "model_type" in read_json(directory / "config.json")
    return False


def _stored_dtype(directory: Path) -> str:
    """The type of a Hugging Face directory's weights, by its config.json: bfloat16, or float32 for any other."""
    values = read_json(directory / "config.json")
    return "bfloat16" if values.get("dtype", values.get("torch_dtype")) == "bfloat16" else "float32"


def _open_huggingface(directory: Path, ignore_keys: Collection[str]) -> Source:
    from nextllm_jax.interop import huggingface
    from nextllm_jax.tokenizer.huggingface import load_huggingface

    config, model_type = huggingface.read_config(directory, ignore_keys)
    return Source(
        config,
        load_tokenizer=lambda: load_huggingface(directory),
        load_params=functools.partial(huggingface.load_params, directory, config, model_type),
        is_run=False,
        model_type=model_type,
        vocab_size=config.vocab_size,
        dtype=_stored_dtype(directory),
        generation=huggingface.read_generation_config(directory),
    )


def _open_gguf(path: Path, ignore_keys: Collection[str]) -> Source:
    from nextllm_jax.interop import gguf
    from nextllm_jax.tokenizer.gguf import from_gguf

    file = gguf.GGUFFile(path, ignore_keys)
    return Source(
        file.config,
        load_tokenizer=lambda: from_gguf(file.metadata).within(file.config.vocab_size),
        load_params=file.load_params,
        is_run=False,
        model_type=file.model_type,
        vocab_size=file.config.vocab_size,
    )


def _open_run(run: RunDir, step: str | int | None) -> Source:
    config = run.read_config()
    saved = SavedSteps(run.checkpoints)
    number = saved.resolve(step)
    record = saved.record(number)
    origin, quantized = record.get(ORIGIN, {}), record.get(QUANTIZED)
    where = f"the record of checkpoint {number} in {run.checkpoints}"
    quantization = from_dict(Quantization, Quantization.upgraded(quantized), where) if quantized else None
    return Source(
        config.model,
        load_tokenizer=lambda: Tokenizer.load(run.tokenizer).within(config.model.vocab_size),
        load_params=functools.partial(_load_run, run, number, config, quantization),
        is_run=True,
        model_type=origin.get("model_type"),
        vocab_size=origin.get("vocab_size"),
        dtype=config.model.param_dtype,
        quantization=quantization,
        generation=origin.get("generation", {}),
        step=number,
        adapters=_adapters(run, number, config) if config.lora.rank else None,
    )


def _adapters(run: RunDir, step: int, config: Config) -> Adapters:
    def load(place: Callable[[Any], Any]) -> Any:
        boxed = abstract_params(config.model)
        abstract = place(jax.eval_shape(lambda: lora.create(config.lora, boxed, jax.random.key(0))))
        return SavedSteps(run.checkpoints).restore(step, "params", abstract)

    return Adapters(config.lora, config.init_from or "", load)


def _load_run(
    run: RunDir,
    step: int,
    config: Config,
    quantization: Quantization | None,
    abstract: Any,
    observe: Observer = ignore,
) -> Any:
    """The parameters of a run at a step; see LoadParams. Adapters are merged into the frozen weights."""
    wanted = by_name(abstract)
    is_stacked = STACK in abstract
    params: dict[str, Any] = {}
    for name, saved in _saved_weights(run, step, config, quantization, _placement(abstract)):
        for target, index in [(name, None)] if is_stacked else unstacked_names(config.model, name):
            weight = saved if index is None else jax.tree.map(lambda part, i=index: part[i], saved)
            params[target] = convert(weight, wanted[target], name=target)
            if is_quantized(wanted[target]):
                observe(target, None if is_quantized(weight) else weight, params[target])
        del saved, weight  # before the next one is read
    return with_names(abstract, params)


def _placement(abstract: Any) -> Callable[[Any], Any]:
    """A function that gives boxed abstract arrays the same kind of sharding as `abstract`."""
    sharding = jax.tree.leaves(abstract)[0].sharding
    if isinstance(sharding, NamedSharding):
        return functools.partial(placed, sharding.mesh)
    (device,) = sharding.device_set
    return functools.partial(on_device, device=device)


def _saved_weights(
    run: RunDir, step: int, config: Config, quantization: Quantization | None, place: Callable[[Any], Any]
) -> Iterator[tuple[str, Any]]:
    """(name, weight) for each saved weight of a run. Adapters are merged into the frozen weights."""
    checkpoints, boxed = SavedSteps(run.checkpoints), abstract_params(config.model)
    if not config.lora.rank:
        saved = abstract_packed(abstract_quantized(boxed, place(boxed), quantization))
        yield from _one_by_one(saved, functools.partial(checkpoints.restore_parts, step, "params"))
        return
    adapters = by_name(_adapters(run, step, config).load(place))
    frozen, weights = lora.abstract_frozen(config.lora, boxed, place(boxed)), by_name(boxed)
    scale, dtype = config.lora.scale, jax.numpy.dtype(config.model.param_dtype)
    for name, weight in _one_by_one(frozen, functools.partial(base_parts, checkpoints, step)):
        yield name, lora.merged_weight(name, weights[name], weight, adapters, scale, dtype)


def _one_by_one(abstract: Any, restore: Callable[[Any, Iterable[Any]], Iterator[Any]]) -> Iterator[tuple[str, Any]]:
    """(name, weight) for each weight of a saved tree. Only one weight is in memory at a time."""
    weights = by_name(abstract)
    missing = {name: jax.tree.map(lambda _: PLACEHOLDER, weight) for name, weight in weights.items()}
    parts = restore(abstract, (with_names(abstract, missing | {name: weight}) for name, weight in weights.items()))
    for name in weights:
        yield name, by_name(next(parts))[name]
