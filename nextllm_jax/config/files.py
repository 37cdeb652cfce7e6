"""Reads configs from files: Python files that define `get_config() -> Config`, and the config.json of a run.

Importing this module does not import jax.
"""

import dataclasses
import difflib
import importlib.util
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from nextllm_jax import config as definitions
from nextllm_jax.config.checks import require
from nextllm_jax.config.run import FIRST_FORMAT, FORMAT, Config
from nextllm_jax.errors import InputError

REPLACED = "replaced"
"""Key of a run's config.json, next to the fields of the config; see `training.accepted_changes`."""


class _Removed(NamedTuple):
    """A field that this version no longer has."""

    dropped_by: str
    """The first format without the field."""
    ignored: tuple[Any, ...]
    """Values that are ignored on reading: the old default, and values that would now have the same effect."""


_REMOVED = {"MeshConfig.context_parallelism": _Removed("nextllm_jax config 2", ("all_gather", "ring"))}


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def from_dict(cls: type[Any], values: dict[str, Any], where: str) -> Any:
    """A config dataclass from plain values; `where` names the source in errors.

    A removed field is ignored if its value makes no difference now. Raises InputError for a removed field with another
    value, for an unknown field and for a bad value.
    """
    require(isinstance(values, dict), f"{where} must hold a JSON object, the fields of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if removed := _REMOVED.get(f"{cls.__name__}.{name}"):
            message = f"{where} has {name} {value!r}, which {removed.dropped_by} removed; use an earlier version"
            require(value in removed.ignored, message)
            continue
        if name not in fields:
            hint = _suggest(name, fields)
            raise InputError(f"{where} has an unknown field '{name}' of {cls.__name__}{hint}")
        nested = fields[name].default_factory
        if isinstance(value, dict) and dataclasses.is_dataclass(nested):
            arguments[name] = from_dict(nested, value, f"{where}: {name}")  # pyright: ignore[reportArgumentType]
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


def from_json(text: str, where: str) -> Config:
    """The Config that `Config.to_json` wrote; `where` names the file in errors."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error}); expected the config.json of a run") from error
    return config_of_values(values, where)


def config_of_values(values: dict[str, Any], where: str) -> Config:
    """The Config of the JSON object that `Config.to_json` wrote; `where` names the file in errors."""
    if isinstance(values, dict):
        fields = {name: value for name, value in values.items() if name not in ("format", REPLACED)}
    else:
        fields = values
    config = from_dict(Config, fields, where)
    # Another program's config.json could be an empty object, which has no unknown fields.
    require({"model", "data", "training"} <= values.keys(), f"{where} is not the config.json of a run")
    version = values.get("format", FIRST_FORMAT)
    require(version in (FIRST_FORMAT, FORMAT), f"{where} has format '{version}'; use the version that wrote it")
    return config


def is_of_first_format(path: epath.PathLike) -> bool:
    """Whether a config.json that `read_config` accepts has the first format."""
    return json.loads(epath.Path(path).read_text()).get("format", FIRST_FORMAT) == FIRST_FORMAT


def read_config(path: epath.PathLike) -> Config:
    """The Config in a run's config.json. Raises InputError if the file cannot be read or is not such a file."""
    try:
        text = epath.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected the config.json of a run") from error
    return from_json(text, str(path))


def _hint(error: BaseException) -> str:
    """A hint on how to fix an error in a config file, such as the nearest name for a field that does not exist."""
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if unknown and (removed := _REMOVED.get(f"{unknown[1]}.{unknown[2]}")):
        return f"; {removed.dropped_by} removed this field, so leave it out"
    known = getattr(definitions, unknown[1], None) if unknown else None
    if unknown and dataclasses.is_dataclass(known):
        return _suggest(unknown[2], [field.name for field in dataclasses.fields(known)])
    return "; it must define get_config() -> Config" if "get_config" in str(error) else ""


def load_config_file(path: str) -> Config:
    """The Config that a Python file's `get_config()` returns. Its workdir is named after the file if it has none.

    Raises InputError if the file is missing, fails to run, or does not define `get_config`.
    """
    file = Path(path)
    require(file.is_file(), f"config file {path} does not exist; configs/ holds examples, such as tiny.py")
    spec = importlib.util.spec_from_file_location(f"nextllm_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"config file {path} must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except InputError as error:
        raise InputError(f"config file {path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"config file {path} fails with {type(error).__name__}: {error}{_hint(error)}") from error
    require(isinstance(config, Config), f"config file {path}: get_config() must return a Config, not {type(config)}")
    return config if config.workdir else dataclasses.replace(config, workdir=f"runs/{file.stem}")


def config_of_arguments(argv: list[str]) -> Config:
    """The Config of the file that --config names, or the default Config; the command line then overrides its fields."""
    files = [value for name, value in itertools.pairwise(argv) if name == "--config"]
    files += [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]
    if len(files) > 1:
        raise InputError(f"--config is given {len(files)} times; give one file, and override fields with flags")
    return load_config_file(files[0]) if files else Config()


def stated_fields(argv: Iterable[str]) -> frozenset[str]:
    """The dotted names of the fields that command-line options set, such as "optimizer.learning_rate"."""
    options = (argument.partition("=")[0] for argument in argv if argument.startswith("--"))
    names = {option.removeprefix("--").replace("-", "_") for option in options}
    return frozenset(names | {re.sub(r"(^|\.)no_", r"\1", name) for name in names})


def local_workdir(config: Config) -> str:
    """The run directory of a config. Raises InputError if there is none, or for an address such as gs://bucket/run."""
    if config.workdir is None or "://" in config.workdir:
        raise InputError(f"workdir is {config.workdir}; it must name a local directory for the run")
    return config.workdir
