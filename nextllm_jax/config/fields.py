"""The fields of a config by dotted name, and what a new value of each means for a run that continues.

A mark in the field's type says so, such as `vocab_size: Fixed[int]`; unmarked fields change with --allow-change alone.
"""

import dataclasses
import typing
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")


class OnResume(NamedTuple):
    """What a new value of a field means for a run that continues."""

    change: Literal["free", "override", "fixed"] = "override"
    """Whether it may differ: freely, with --allow-change, or never."""
    meaning: str = ""
    """What happens then, where it is not just that the new value holds from the next step on."""


_UNMARKED = OnResume()
OTHER_DATA = "the next step begins other data, in an order of its own, and validation losses cease to compare"
OTHER_TOKENIZER = "--allow-change helps only if it is another name of the same tokenizer"

Free = Annotated[T, OnResume("free")]
"""Where a run is, how it is computed (to rounding) and how it is watched."""
Fixed = Annotated[T, OnResume("fixed", "never: the saved arrays do not fit")]
ChoosesData = Annotated[T, OnResume("override", OTHER_DATA)]
ChoosesTokenizer = Annotated[T, OnResume("override", OTHER_TOKENIZER)]
NoEffect = Annotated[T, OnResume("override", "the weights are made already, so it has no effect")]


class Field(NamedTuple):
    """A field's value, and what another one means for a run that continues."""

    value: Any
    on_resume: OnResume


def marks(cls: type[Any], default: OnResume = _UNMARKED) -> dict[str, OnResume]:
    """What a new value of each field of a config dataclass means, `default` for unmarked ones."""
    hints = typing.get_type_hints(cls, include_extras=True)
    metadata = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: next((m for m in found if isinstance(m, OnResume)), default) for name, found in metadata.items()}


def fields_of(config: Any, section: str = "", default: OnResume = _UNMARKED) -> dict[str, Field]:
    """Every field by its dotted name, such as "model.num_layers"; the mark of a section is that of all its fields."""
    found: dict[str, Field] = {}
    for name, mark in marks(type(config), default).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            found |= fields_of(value, f"{section}{name}.", mark)
        else:
            found[section + name] = Field(value, mark)
    return found
