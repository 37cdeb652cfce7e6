"""The fields of a config by dotted name, and whether each may change when a run resumes.

A mark in the field's type says so, such as `vocab_size: Fixed[int]`. An unmarked field needs --allow-change.
"""

import dataclasses
import typing
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")


class OnResume(NamedTuple):
    """Whether a field may change when a run resumes, and what the change does."""

    change: Literal["free", "override", "fixed"] = "override"
    """Whether the field may change: freely, with --allow-change, or never."""
    meaning: str = ""
    """What the change does. Empty if the new value simply applies from the next step."""


_UNMARKED = OnResume()
OTHER_DATA = "training starts over on the new data, and validation losses are not comparable with the earlier ones"
OTHER_TOKENIZER = "--allow-change helps only if the new value names the same tokenizer"

Free = Annotated[T, OnResume("free")]
"""Fields that only say where a run is stored, how it is computed (up to rounding) and what it reports."""
Fixed = Annotated[T, OnResume("fixed", "cannot change: the saved arrays would not fit")]
ChoosesData = Annotated[T, OnResume("override", OTHER_DATA)]
ChoosesTokenizer = Annotated[T, OnResume("override", OTHER_TOKENIZER)]
NoEffect = Annotated[T, OnResume("override", "no effect: the weights are already initialized")]


class Field(NamedTuple):
    """A field's value, and whether it may change when a run resumes."""

    value: Any
    on_resume: OnResume


def marks(cls: type[Any], default: OnResume = _UNMARKED) -> dict[str, OnResume]:
    """The mark of each field of a config dataclass; `default` for unmarked fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    metadata = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: next((m for m in found if isinstance(m, OnResume)), default) for name, found in metadata.items()}


def fields_of(config: Any, section: str = "", default: OnResume = _UNMARKED) -> dict[str, Field]:
    """Every field by its dotted name, such as "model.num_layers". The mark of a section applies to all its fields."""
    found: dict[str, Field] = {}
    for name, mark in marks(type(config), default).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            found |= fields_of(value, f"{section}{name}.", mark)
        else:
            found[section + name] = Field(value, mark)
    return found


def command_line_options(config: Any, file: Any) -> list[str]:
    """The command-line options that turn the config `file` into `config`, such as --training.steps and its value."""
    before, found = fields_of(file), []
    for name, (value, _) in fields_of(config).items():
        if value == before[name].value:
            continue
        section, _, field = name.rpartition(".")
        option = f"--{section and section + '.'}{'no_' if value is False else ''}{field}".replace("_", "-")
        if isinstance(value, bool):
            found.append(option)
        else:
            found += [option, *map(str, value if isinstance(value, tuple) else [value])]
    return found
