"""Where a model's weights are: a run directory, a Hugging Face directory or a GGUF file, behind one face."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from nextllm_jax.checkpoint.base import restore_base
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config
from nextllm_jax.config.model import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.interop.foreign import is_foreign, open_foreign
from nextllm_jax.model import lora
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.published_models import resolve
from nextllm_jax.tokenizer.tokenizer import Tokenizer

Place = Callable[[Any], Any]
"""Abstract arrays in Flax's boxes -> the same without boxes, each with the sharding that it is to have."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's config; tokenizer and weights are read when they are asked for."""

    config: ModelConfig
    load_tokenizer: Callable[[], Tokenizer]
    load_params: Callable[[Place], Any]
    """The parameters in `config.param_dtype`, read straight to where `place` says."""


def open_source(path: str) -> Source:
    """The model at a path or of a published name; of a run the best checkpoint, or the latest if it has no best.

    Raises InputError if the path is none of these, or what is there is not whole.
    """
    path = resolve(path)
    if is_foreign(Path(path)):
        foreign = open_foreign(Path(path))
        config = foreign.config
        return Source(config, foreign.load_tokenizer, lambda place: foreign.load_params(place(abstract_params(config))))
    run = RunDir(path)
    if not run.exists():
        raise InputError(
            f"{path} is no run directory, Hugging Face directory or .gguf file; give one with the weights to start from"
        )
    config = run.read_config()
    step = Checkpoints(run.checkpoints).resolve(None)
    return Source(
        config.model,
        lambda: Tokenizer.load(run.tokenizer),
        lambda place: restore_params(run, step, config, place),
    )


def restore_params(run: RunDir, step: int, config: Config, place: Place) -> Any:
    """The parameters of a run at a step, where `place` says; adapters are merged into the weights below them.

    Raises InputError as `Checkpoints.restore` and `restore_base` do.
    """
    checkpoints, boxed = Checkpoints(run.checkpoints), abstract_params(config.model)
    if not config.lora.rank:
        return checkpoints.restore(step, "params", place(boxed))
    whole = place(boxed)
    trained = place(jax.eval_shape(lambda: lora.create(config.lora, boxed, jax.random.key(0))))
    params = restore_base(checkpoints, step, place(lora.abstract_frozen(config.lora, boxed)))
    frozen = lora.Frozen(params, config.lora.alpha / config.lora.rank)
    adapters = checkpoints.restore(step, "params", trained)
    merge = jax.jit(lora.merge, static_argnums=2, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, whole))
    return merge(adapters, frozen, jax.numpy.dtype(config.model.param_dtype))


def cast(params: Any, dtype: jax.typing.DTypeLike) -> Any:
    """Parameters in another type, where they are."""
    return jax.tree.map(lambda leaf: leaf if leaf.dtype == dtype else leaf.astype(dtype), params)
