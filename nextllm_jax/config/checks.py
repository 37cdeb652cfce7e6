"""Checks that the config dataclasses share. Importing this module does not import jax."""

import types
import typing
from typing import Any, Literal

from nextllm_jax.errors import InputError


def require(condition: bool, message: str) -> None:
    """Raise InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a field's annotated type. An int also counts as a float; a bool counts as neither."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return value in options
    if kind is types.UnionType:
        return any(_fits(value, option) for option in options)
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(item, options[0]) for item in value)
    return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))


def check_types(config: Any, section: str) -> None:
    """Raise InputError for a value that does not have its field's annotated type, such as a misspelt choice."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        require(_fits(value, hint), f"{section}{name} is {value!r}; it must be {wanted}")


def require_positive(config: Any, section: str, *names: str) -> None:
    """Raise InputError if one of these fields is not greater than zero. None passes."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{section}{name} is {value}; it must be positive")
