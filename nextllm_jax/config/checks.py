"""Checks that configs, commands and the Python API share. Importing this module does not import jax."""

import numbers
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
        require(_fits(value, hint), f"{section}{name} is {value!r:.80}; it must be {wanted}")


def require_positive(config: Any, section: str, *names: str) -> None:
    """Raise InputError if one of these fields is not greater than zero. None passes."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{section}{name} is {value}; it must be positive")


def require_integer(name: str, value: Any, least: int = 1) -> None:
    """Raise InputError unless the value is an integer, such as int or numpy's, of at least `least`."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    require(is_integer, f"{name} is {value!r}; it must be an integer")
    require(int(value) >= least, f"{name} is {value}; it must be {'positive' if least == 1 else f'at least {least}'}")


def require_seed(value: Any) -> None:
    """Raise InputError unless the value is an integer of 32 bits. Other seeds would repeat the results of these."""
    require_integer("seed", value, 0)
    require(int(value) < 2**32, f"seed is {value}; it must be between 0 and 2^32 - 1")


def require_text(name: str, value: Any) -> None:
    """Raise InputError unless the value is a string."""
    require(isinstance(value, str), f"{name} is {value!r:.80}; it must be a string")


def stop_strings(stop: Any) -> list[str]:
    """The stop strings in an argument: one or a sequence of them. Raises InputError if one is empty or not a string."""
    stops = [stop] if isinstance(stop, str) else stop
    require(isinstance(stops, list | tuple), f"stop is {stop!r:.80}; it must be a string or a list of strings")
    for each in stops:
        require_text("a stop string", each)
        require(each != "", "a stop string is empty; leave it out, or give the text to stop before")
    return list(stops)
