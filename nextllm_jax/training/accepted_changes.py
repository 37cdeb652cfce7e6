"""Keeps the changes that `--allow-change` accepted, so a command that does not state them continues the run.

A run's config.json lists, for each such field, the values that were replaced. A command without that field in its
options takes the field from its config file. If the file still has a replaced value, the run's value applies. Any other
value is a difference, which `resume_guard` refuses.
"""

import dataclasses
import logging
from collections.abc import Collection
from typing import Any

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config
from nextllm_jax.config.fields import fields_of
from nextllm_jax.config.files import workdir_of

_log = logging.getLogger(__name__)

_SCHEDULE = frozenset({"training.steps", "optimizer.schedule_steps"})
"""Both determine the schedule, so a command that changes one of them keeps the other too."""


def with_accepted_changes(config: Config, stated: Collection[str] = ()) -> Config:
    """The config with the run's values of fields that still have a replaced value; a message names each.

    `stated` are the dotted fields that the command line sets. They stay as they are.
    """
    run = RunDir(workdir_of(config))
    if not run.exists():
        return config
    asked, kept = fields_of(config), fields_of(run.read_config())
    found: dict[str, Any] = {}
    for name, values in run.read_replaced().items():
        value = asked[name].value
        if name not in stated and value in values and value != kept[name].value:
            found[name] = kept[name].value
            _log.info(f"{name} is {kept[name].value} instead of {value}, by an earlier --allow-change")
    return _with_fields(config, found)


def replaced_values(config: Config, file: Config, allow_change: Collection[str]) -> dict[str, tuple[Any, ...]]:
    """What config.json is to list once the run continues with `config`: by field, the values that no longer apply.

    `file` is the config without the changes of the command line; `allow_change` are dotted fields.
    """
    run = RunDir(workdir_of(config))
    if not run.exists():
        return {}
    old, stated, new = fields_of(run.read_config()), fields_of(file), fields_of(config)
    replaced = run.read_replaced()
    names = frozenset(allow_change)
    for name in sorted(names | _SCHEDULE if names & _SCHEDULE else names):
        values = dict.fromkeys((*replaced.get(name, ()), old[name].value, stated[name].value))
        replaced[name] = tuple(value for value in values if value != new[name].value)
    return {name: values for name, values in replaced.items() if values}


def _with_fields(config: Config, values: dict[str, Any]) -> Config:
    """The config with other values of dotted fields."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section, {})[field] = value
    top = sections.pop("", {})
    parts = {section: dataclasses.replace(getattr(config, section), **inner) for section, inner in sections.items()}
    return dataclasses.replace(config, **top, **parts)
