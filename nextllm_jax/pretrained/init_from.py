"""`--init-from PATH`: starts a run with the weights, the architecture and the tokenizer of another model."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config, DataConfig, LoraConfig, ModelConfig
from nextllm_jax.config.files import workdir_of
from nextllm_jax.config.model import EXECUTION_FIELDS, TRAINING_FIELDS
from nextllm_jax.data.shards import DataPath, Dataset
from nextllm_jax.errors import InputError, missing_package
from nextllm_jax.model import lora
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.pretrained.source import Source, open_path
from nextllm_jax.published_models import resolve
from nextllm_jax.storage.downloads import tokenizer_path
from nextllm_jax.tokenizer.published import load_tokenizer

_log = logging.getLogger(__name__)

_OURS = ("param_dtype", *EXECUTION_FIELDS, *TRAINING_FIELDS)
"""Fields of the model that come from the config, since they determine how it is computed and trained, not what it
computes."""


def with_source(config: Config, file: Config, *, overwrite: bool = False) -> tuple[Config, Source | None]:
    """The config with the model and the tokenizer of `init_from`, and the source; (config, None) without `init_from`.

    A `lora.adapter` determines the rank, the scale and the targets of the adapters.

    `file` is the config without the changes of the command line. An existing run knows its model, so the source is not
    opened and may no longer exist. The source's model replaces that of `file`; a message lists the differences. Raises
    InputError if the command line sets a field to another value than the source has.
    """
    if config.init_from is None:
        return config, None
    if Path(config.init_from).resolve() == Path(workdir_of(config)).resolve():
        raise InputError(f"init_from is the run directory {config.workdir} itself; choose another --workdir")
    existing = None if overwrite else _existing_run(config)
    if existing:
        source, model, tokenizer = None, existing.model, existing.data.tokenizer
        adapters = existing.lora
    else:
        source, tokenizer = open_path(resolve(config.init_from)), config.init_from
        model = source.config
        adapters = _adapters_of(config.lora, model)
    lora_config = _lora(config.lora, file.lora, adapters)
    if source is not None:
        _require_trainable(config, source, lora_config)
    data = _data(config, file, tokenizer)
    new = dataclasses.replace(config, model=_model(config, file.model, model), data=data, lora=lora_config)
    new.check_fit()
    if new.lora.rank:
        lora.adapted(new.lora, abstract_params(new.model))  # raises InputError for a target that the model lacks
    return new, source


def initial_params(config: Config, source: Source | None, place: Callable[[Any], Any]) -> Any:
    """The weights of `config.init_from`, sharded by `place`: in `model.param_dtype`, or frozen if there are adapters.

    `source` is the source that `with_source` opened, if any. Raises InputError if the weights cannot be read or are
    those of another model.
    """
    assert config.init_from is not None
    source = source or open_path(resolve(config.init_from))
    differing = _differing(config.model, source.config, but=(*_OURS, "init_std", "zero_init_outputs", "context_length"))
    if differing:
        raise InputError(
            f"init_from {config.init_from} now holds another model: {', '.join(differing)} differ; restore it"
        )
    boxed = abstract_params(config.model)
    return source.load_params(
        lora.abstract_frozen(config.lora, boxed, place(boxed)) if config.lora.rank else place(boxed)
    )


def initial_adapters(config: Config, place: Callable[[Any], Any]) -> Any:
    """The adapters of `lora.adapter`, sharded by `place`; None if the run starts with new adapters or has none.

    Raises InputError if they cannot be read or do not fit.
    """
    if config.lora.adapter is None:
        return None
    from nextllm_jax.interop import peft

    boxed = abstract_params(config.model)
    abstract = place(jax.eval_shape(lambda: lora.create(config.lora, boxed, jax.random.key(0))))
    return peft.load_adapters(Path(config.lora.adapter), config.model, abstract)


def _adapters_of(asked: LoraConfig, model: ModelConfig) -> LoraConfig:
    """The LoraConfig with the fields that `lora.adapter` determines, if there is one."""
    if asked.adapter is None:
        return asked
    try:
        from nextllm_jax.interop import peft
    except ModuleNotFoundError as error:
        raise missing_package(f"reading {asked.adapter} needs", error, ".[interop]") from error
    return dataclasses.replace(asked, **peft.read_adapter_config(Path(asked.adapter), model))


def _lora(asked: LoraConfig, file: LoraConfig, adapters: LoraConfig) -> LoraConfig:
    """`asked` with the shape of `adapters`, which replaces that of `file`.

    Raises InputError if the command line sets a field to another value than the adapters have.
    """
    if asked.adapter is None:
        return asked
    shape = {name: getattr(adapters, name) for name in ("rank", "alpha", "rank_stabilized", "targets")}
    for name, value in shape.items():
        if getattr(asked, name) not in (value, getattr(file, name)):
            raise InputError(
                f"lora.{name} is {getattr(asked, name)}, but the adapter {asked.adapter} has {value}; leave it out"
            )
    return dataclasses.replace(asked, **shape)


def _require_trainable(config: Config, source: Source, adapters: LoraConfig) -> None:
    """Raise InputError if all weights are trained but those of the source are quantized."""
    if source.quantization is not None and not adapters.rank:
        raise InputError(
            f"init_from {config.init_from} holds quantized weights ({source.quantization}), which cannot be trained; "
            "train adapters on them (--lora.rank 16), or name the model that they were made from"
        )


def require_tokenizer(config: Config, source: Source, path: DataPath) -> None:
    """Raise InputError if the prepared data in `path` has another tokenizer than `init_from`."""
    data = Dataset.open(path, verify="sizes")
    if data.tokenizer_hash != source.load_tokenizer().hash:
        raise InputError(
            f"the data in {data.path} was prepared with another tokenizer than that of init_from {config.init_from}; "
            "leave data.path out, or name data that was prepared with its tokenizer"
        )


def _existing_run(config: Config) -> Config | None:
    """The config of the existing run that this one continues, if that run has an `init_from` too."""
    run = RunDir(workdir_of(config))
    existing = run.read_config() if run.exists() else None
    return existing if existing and existing.init_from is not None else None


def _model(config: Config, file: ModelConfig, source: ModelConfig) -> ModelConfig:
    """The source's model, with the config's values of the fields that do not change what it computes."""
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
        _log.info("using the model of %s, which differs from the config's: %s", config.init_from, changes)
    return model


def _data(config: Config, file: Config, tokenizer: str) -> DataConfig:
    """The config's data settings, with the source's tokenizer."""
    asked = config.data.tokenizer
    if asked not in (file.data.tokenizer, tokenizer) and _hash(asked) != _hash(tokenizer):
        raise InputError(f"data.tokenizer {asked} is not the tokenizer of init_from {config.init_from}; leave it out")
    return dataclasses.replace(config.data, tokenizer=tokenizer)


def _hash(tokenizer: str) -> str:
    return load_tokenizer(tokenizer_path(tokenizer)).hash


def _differing(left: ModelConfig, right: ModelConfig, *, but: tuple[str, ...] = ()) -> list[str]:
    names = (field.name for field in dataclasses.fields(ModelConfig))
    return [name for name in names if name not in but and getattr(left, name) != getattr(right, name)]
