"""The model at a path: a run directory, a Hugging Face directory or a GGUF file."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from nextllm_jax.checkpoint.base import restore_base
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config
from nextllm_jax.config.model import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.model import lora
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import STACK, by_name, map_weights, unstack_layers
from nextllm_jax.published_models import PUBLISHED_MODELS
from nextllm_jax.sharding import on_device, placed
from nextllm_jax.tokenizer.tokenizer import Tokenizer

ORIGIN = "imported"
"""Name, in the record of an imported checkpoint, of what an export needs to know of the original files."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that can be loaded: its config, and how to read its tokenizer and its parameters."""

    config: ModelConfig
    load_tokenizer: Callable[[], Tokenizer]
    """Raises InputError if there is none."""
    load_params: Callable[[Any], Any]
    """`load_params(abstract)`: the parameters with the structure (stacked over layers or not), types and shardings of
    `abstract`. Raises InputError if they are damaged or belong to another config."""
    is_run: bool
    """Whether it is a run directory, not files of another program."""
    model_type: str | None = None
    """The Hugging Face model type of imported weights."""
    vocab_size: int | None = None
    """Rows of the embedding in the original files of imported weights."""


def open_path(path: str, *, step: str | int | None = None) -> Source:
    """The model of a run directory, a Hugging Face directory or a GGUF file; see `open_model`."""
    file, run = Path(path), RunDir(path)
    if not (file.is_file() or _is_huggingface(file)):
        if run.exists():
            return _open_run(run, step)
        what = "is not" if file.exists() else "does not exist, so it is not"
        raise InputError(
            f"{path} {what} a run directory (with config.json, tokenizer and checkpoints), a Hugging Face directory, a "
            f".gguf file, or the name of a published model ({', '.join(PUBLISHED_MODELS)})"
        )
    if step is not None:
        raise InputError(f"{path} is not a run directory, so it has no steps; leave the step out")
    try:
        return _open_huggingface(file) if file.is_dir() else _open_gguf(file)
    except ModuleNotFoundError as error:
        raise InputError(
            f"reading {path} needs the package {error.name}; install the extra with pip install '.[interop]'"
        ) from error


def _is_huggingface(directory: Path) -> bool:
    """Whether a directory has a config.json of Hugging Face's kind."""
    try:
        values = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "model_type" in values


def _open_huggingface(directory: Path) -> Source:
    from nextllm_jax.interop import huggingface
    from nextllm_jax.tokenizer.huggingface import load_huggingface

    config, model_type = huggingface.read_config(directory)
    return Source(
        config,
        load_tokenizer=lambda: load_huggingface(directory),
        load_params=lambda abstract: huggingface.load_params(directory, config, model_type, abstract),
        is_run=False,
        model_type=model_type,
        vocab_size=config.vocab_size,
    )


def _open_gguf(path: Path) -> Source:
    from nextllm_jax.interop import gguf
    from nextllm_jax.tokenizer.gguf import from_gguf

    file = gguf.GGUFFile(path)
    return Source(
        file.config,
        load_tokenizer=lambda: from_gguf(file.metadata),
        load_params=file.load_params,
        is_run=False,
        model_type=file.model_type,
        vocab_size=file.config.vocab_size,
    )


def _open_run(run: RunDir, step: str | int | None) -> Source:
    config = run.read_config()
    with Checkpoints(run.checkpoints) as checkpoints:
        number = checkpoints.resolve(step)
        origin = checkpoints.record(number).get(ORIGIN, {})
    return Source(
        config.model,
        load_tokenizer=lambda: Tokenizer.load(run.tokenizer),
        load_params=lambda abstract: _restore_params(run, number, config, abstract),
        is_run=True,
        model_type=origin.get("model_type"),
        vocab_size=origin.get("vocab_size"),
    )


def _restore_params(run: RunDir, step: int, config: Config, abstract: Any) -> Any:
    """A run's parameters at a step, with the layout of `abstract`; adapters are merged into the frozen weights."""
    model, stacked = config.model, STACK in abstract or config.model.num_layers < len(config.model.layer_pattern)
    boxed = abstract_params(model)
    params = _read_params(run, step, config, _placement(abstract))
    weights, wanted = by_name(abstract_params(model, scan_layers=stacked)), by_name(abstract)
    # Cast before unstacking, so the wide parameters and their unstacked copy never coexist.
    dtypes = {weights[name].kind: leaf.dtype for name, leaf in wanted.items()}
    params = map_weights(lambda weight, leaf: leaf.astype(dtypes[weight.kind]), boxed, params)
    params = params if stacked else unstack_layers(model, params)
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, abstract)


def _placement(abstract: Any) -> Callable[[Any], Any]:
    """The function that shards boxed arrays as `abstract` is sharded."""
    place = jax.tree.leaves(abstract)[0].sharding
    if isinstance(place, NamedSharding):
        return functools.partial(placed, place.mesh)
    (device,) = place.device_set
    return functools.partial(on_device, device=device)


def _read_params(run: RunDir, step: int, config: Config, place: Callable[[Any], Any]) -> Any:
    """The parameters as they were saved; adapters are merged into the frozen weights."""
    checkpoints, boxed = Checkpoints(run.checkpoints), abstract_params(config.model)
    if not config.lora.rank:
        return checkpoints.restore(step, "params", place(boxed))
    trained = place(jax.eval_shape(lambda: lora.create(config.lora, boxed, jax.random.key(0))))
    params = restore_base(checkpoints, step, place(lora.abstract_frozen(config.lora, boxed)))
    frozen = lora.Frozen(params, config.lora.alpha / config.lora.rank)
    adapters = checkpoints.restore(step, "params", trained)
    merge = functools.partial(lora.merge, boxed, dtype=jax.numpy.dtype(config.model.param_dtype))
    return jax.jit(merge, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, place(boxed)))(adapters, frozen)
