"""`--init-from PATH`: a run that begins with the weights, the architecture and the tokenizer of another model."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config, DataConfig, ModelConfig
from nextllm_jax.config.files import local_workdir
from nextllm_jax.config.model import EXECUTION_FIELDS
from nextllm_jax.data.settings import default_data_path
from nextllm_jax.data.shards import Dataset
from nextllm_jax.errors import InputError
from nextllm_jax.model import lora
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.pretrained.source import Source, open_path
from nextllm_jax.published_models import resolve
from nextllm_jax.tokenizer.published import load_tokenizer

_log = logging.getLogger(__name__)

_OURS = ("param_dtype", *EXECUTION_FIELDS)
"""Fields of a model that say how it is kept and computed, not what it computes: they come from the config."""


def with_source(config: Config, file: Config, *, overwrite: bool = False) -> tuple[Config, Source | None]:
    """The config with the model and the tokenizer of `init_from`, and the source; (config, None) without `init_from`.

    `file` is the config before the command line changed it. A run that exists already knows its model, so its source
    is not opened and may be gone. The source's model replaces a different one in `file`, with a message.
    Raises InputError for a field that the command line sets to another value than the source's.
    """
    if config.init_from is None:
        return config, None
    if Path(config.init_from).resolve() == Path(local_workdir(config)).resolve():
        raise InputError(f"init_from is the run directory {config.workdir} itself; choose another --workdir")
    begun = None if overwrite else _begun(config)
    if begun:
        source, model, tokenizer = None, begun.model, begun.data.tokenizer
    else:
        source, tokenizer = open_path(resolve(config.init_from)), config.init_from
        model = source.config
        _require_trainable(config, source)
    data = _data(config, file, tokenizer)
    new = dataclasses.replace(config, model=_model(config, file.model, model), data=data)
    new.check_fit()
    if new.lora.rank:
        lora.adapted(new.lora, abstract_params(new.model))  # raises InputError for a target that the model lacks
    return new, source


def initial_params(config: Config, source: Source | None, place: Callable[[Any], Any]) -> Any:
    """The weights of `config.init_from` in `model.param_dtype`, or as adapters want them frozen, sharded by `place`.

    `source` is what `with_source` opened. Raises InputError if they cannot be read, or are not of the config's model.
    """
    assert config.init_from is not None
    source = source or open_path(resolve(config.init_from))
    differing = _differing(config.model, source.config, but=(*_OURS, "init_std", "context_length"))
    if differing:
        raise InputError(f"init_from {config.init_from} holds another model now: {', '.join(differing)}; restore it")
    boxed = abstract_params(config.model)
    return source.load_params(
        lora.abstract_frozen(config.lora, boxed, place(boxed)) if config.lora.rank else place(boxed)
    )


def _require_trainable(config: Config, source: Source) -> None:
    """Raise InputError if all weights are to be trained, and those of the source are quantized."""
    if source.quantization is not None and not config.lora.rank:
        raise InputError(
            f"init_from {config.init_from} holds quantized weights ({source.quantization}), which cannot be trained; "
            "train adapters on them (--lora.rank 16), or name the model that they were made from"
        )


def require_tokenizer(config: Config, source: Source) -> None:
    """Raise InputError if a run's prepared data was made with another tokenizer than that of its `init_from`."""
    data = Dataset.open(default_data_path(config.data), verify="sizes")
    if data.tokenizer_hash != source.load_tokenizer().hash:
        raise InputError(
            f"the data in {data.path} was made with another tokenizer than that of init_from {config.init_from}, whose "
            "embedding belongs to the ids of its own; leave data.path out, or name data prepared with it"
        )


def _begun(config: Config) -> Config | None:
    """The config of the run that this one would continue, if that began from other weights too."""
    run = RunDir(local_workdir(config))
    begun = run.read_config() if run.exists() else None
    return begun if begun and begun.init_from is not None else None


def _model(config: Config, file: ModelConfig, source: ModelConfig) -> ModelConfig:
    """The source's model, with those of the config's fields that do not change its function."""
    asked = config.model
    kept = {name: getattr(asked, name) for name in _OURS}
    length = asked.context_length
    if length < source.context_length and length != ModelConfig.context_length and source.rope_scaling != "longrope":
        kept["context_length"] = length
    model = dataclasses.replace(source, **kept)
    for name in _differing(asked, file):
        if getattr(asked, name) != getattr(model, name):
            raise InputError(
                f"model.{name} is {getattr(asked, name)}, but the model of init_from {config.init_from} has "
                f"{getattr(model, name)}; leave it out"
            )
    plain = ModelConfig()
    stated = [name for name in _differing(file, model) if getattr(file, name) != getattr(plain, name)]
    if stated:
        changes = ", ".join(f"model.{name} {getattr(file, name)} -> {getattr(model, name)}" for name in stated)
        _log.info("the model is that of %s, not the config's: %s", config.init_from, changes)
    return model


def _data(config: Config, file: Config, tokenizer: str) -> DataConfig:
    """The config's data, to be prepared with the source's tokenizer."""
    asked = config.data.tokenizer
    if asked not in (file.data.tokenizer, tokenizer) and load_tokenizer(asked).hash != load_tokenizer(tokenizer).hash:
        raise InputError(
            f"data.tokenizer {asked} is not that of init_from {config.init_from}, whose embedding belongs to the ids "
            "of its own; leave it out"
        )
    return dataclasses.replace(config.data, tokenizer=tokenizer)


def _differing(left: ModelConfig, right: ModelConfig, *, but: tuple[str, ...] = ()) -> list[str]:
    names = (field.name for field in dataclasses.fields(ModelConfig))
    return [name for name in names if name not in but and getattr(left, name) != getattr(right, name)]
