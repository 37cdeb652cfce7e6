"""The sources of the data of a config: where each is prepared, with which settings, and opening them together.

Without `data.mixture`, the data is its only source.
"""

import dataclasses
from collections.abc import Callable, Sequence

from nextllm_jax.config import DataConfig
from nextllm_jax.config.mixture import parse_mixture
from nextllm_jax.data import settings
from nextllm_jax.data.data_directory import is_prepared
from nextllm_jax.data.mixture import Source
from nextllm_jax.data.settings import default_data_path, named_settings, open_dataset
from nextllm_jax.data.shards import DataPath, data_path
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.tokenizer import Tokenizer


def source_paths(config: DataConfig, find: Callable[[DataConfig], DataPath] = default_data_path) -> list[DataPath]:
    """The directory of each source. `find` gets the settings of each source in order, and may prepare it.

    A trained tokenizer is that of the first source, whose data must exist once `find` returns.
    """
    if not config.mixture:
        return [find(config)]
    found: list[DataPath] = []
    for index, source in enumerate(parse_mixture(config.mixture)):
        alone = dataclasses.replace(config, mixture=(), mixture_paths=(), corpus=DataConfig.corpus)
        known = config.mixture_paths[index] if config.mixture_paths else ""
        if _is_prepared_directory(source.address):
            found.append(find(dataclasses.replace(alone, path=known or source.address)))
            continue
        tokenizer = str(found[0]) if found and config.tokenizer == "train" else config.tokenizer
        corpus = dataclasses.replace(alone, corpus=source.address, path=known or None, tokenizer=tokenizer)
        try:
            found.append(find(corpus))
        except InputError as error:
            where = f"data.mixture {source.address} is read as a corpus, since it holds no prepared data"
            raise InputError(f"{where}: {error}") from error
    return found


def first_prepared(config: DataConfig) -> DataPath | None:
    """The directory of the first source, if the settings name it; None for a corpus."""
    if not config.mixture:
        return data_path(config.path) if config.path else None
    address = parse_mixture(config.mixture)[0].address
    known = config.mixture_paths[0] if config.mixture_paths else ""
    return data_path(known or address) if known or _is_prepared_directory(address) else None


def _is_prepared_directory(address: str) -> bool:
    if address == "stdlib" or address.startswith("hf:"):
        return False
    return "://" in address or is_prepared(data_path(address))


def with_source_paths(config: DataConfig, paths: Sequence[str]) -> DataConfig:
    """The settings with the directory of each source."""
    if config.mixture:
        return dataclasses.replace(config, mixture_paths=tuple(paths))
    return dataclasses.replace(config, path=paths[0])


def has_source_paths(config: DataConfig) -> bool:
    """Whether the settings name the directory of each source."""
    return all(config.mixture_paths) and bool(config.mixture_paths) if config.mixture else config.path is not None


def continued(config: DataConfig, recorded: DataConfig) -> DataConfig:
    """`config` with the directories of the sources that a run with the config `recorded` was trained on.

    The config stays as it is if it names directories or other settings, or for a source whose directory is gone.
    """
    if not (config.mixture or recorded.mixture):
        return settings.continued(config, recorded)
    if not (config.mixture and recorded.mixture) or named_settings(config) != named_settings(recorded):
        return config
    addresses = [source.address for source in parse_mixture(recorded.mixture)]
    known = dict(zip(addresses, recorded.mixture_paths, strict=False))
    paths = [known.get(source.address, "") for source in parse_mixture(config.mixture)]
    paths = [path if path and is_prepared(data_path(path)) else "" for path in paths]
    return config if config.mixture_paths else dataclasses.replace(config, mixture_paths=tuple(paths))


def open_sources(config: DataConfig, paths: Sequence[DataPath] | None = None) -> tuple[Source, ...]:
    """The sources of a config, or of the data in `paths`, checked and cached as the config says.

    Raises InputError if one is missing or damaged, if two have different tokenizers, or if two hold the same data.
    """
    paths = source_paths(config) if paths is None else paths
    datasets = [open_dataset(config, path) for path in paths]
    first = datasets[0]
    if not config.mixture:
        return (Source(first),)
    entries = parse_mixture(config.mixture)
    if len(entries) != len(datasets):
        raise InputError(f"{len(datasets)} directories are given for {len(entries)} sources of data.mixture")
    pairs = [*zip(datasets, entries, strict=True)]
    for number, (dataset, entry) in enumerate(pairs):
        if dataset.tokenizer_hash != first.tokenizer_hash:
            raise InputError(
                f"data.mixture: {dataset.path} has another tokenizer ({dataset.tokenizer_hash}) than {first.path} "
                f"({first.tokenizer_hash}); prepare it again with --tokenizer {first.path}"
            )
        for other, earlier in pairs[:number]:
            if dataset.data_id == other.data_id:
                raise InputError(
                    f"data.mixture: {entry.address} and {earlier.address} hold the same data; name it once and add up "
                    "the weights"
                )
    return tuple(Source(dataset, entry.name, entry.weight, entry.epochs) for dataset, entry in pairs)


def tokenizer_of(sources: Sequence[Source]) -> Tokenizer:
    """The tokenizer of the sources; if one has a chat template, the first such one."""
    tokenizers = [source.dataset.tokenizer() for source in sources]
    return next((each for each in tokenizers if each.chat_template is not None), tokenizers[0])
