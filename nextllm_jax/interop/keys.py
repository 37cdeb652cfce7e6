"""Strict access to the values of an external model config."""

from collections.abc import Collection, Mapping
from typing import Any

from nextllm_jax.errors import InputError


class Keys:
    """Named values, with defaults for missing ones; `where` names the file in errors.

    Each method that returns a value raises InputError, which names the key, if it has the wrong type.
    """

    def __init__(self, values: dict[str, Any], defaults: dict[str, Any], where: str) -> None:
        self._values, self._defaults, self.where = values, defaults, where

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Any:
        """The value, or its default, or None."""
        return self._values.get(name, self._defaults.get(name))

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise self.refusal(name, "it must be a number")
        return float(value)

    def optional(self, name: str) -> float | None:
        """A number, or None for null."""
        return None if self.get(name) is None else self.number(name)

    def size(self, name: str) -> int:
        """A positive integer."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refusal(name, "it must be a positive integer")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.refusal(name, "it must be true or false")
        return value

    def choice(self, name: str, choices: Collection[str]) -> str:
        """One of several strings."""
        value = self.get(name)
        if not isinstance(value, str) or value not in choices:
            raise self.refusal(name, f"supported are {', '.join(choices)}")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers."""
        value = self.get(name)
        if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
            raise self.refusal(name, "it must be a list of numbers")
        return tuple(map(float, value))

    def part(self, name: str) -> "Keys":
        """The nested object `name`; empty if it is missing or null."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(name, "it must be an object")
        return Keys(value or {}, {}, f"{self.where}: {name}")

    def names(self) -> list[str]:
        """The names of all values, without defaults."""
        return list(self._values)

    def require_supported(
        self, known: Collection[str], fixed: Mapping[str, tuple[Any, ...]], ignored: Collection[str]
    ) -> None:
        """Raise InputError for a key that is neither `known` nor `ignored`, unless its value is null or false.

        A key in `fixed` must have one of its values there instead. Each ignored key must be present and not `known`.
        """
        for name in ignored:
            if name not in self:
                raise InputError(f"{self.where} has no key {name}; leave out --ignore-key {name}")
            if name in known:
                raise self.refusal(name, "the model depends on it, so --ignore-key cannot ignore it")
        for name, value in self._values.items():
            if name in known or name in ignored:
                continue
            if name in fixed and value not in fixed[name]:
                raise self.refusal(name, f"only {fixed[name][0]} is supported for this architecture")
            if name not in fixed and value is not None and value is not False:
                raise self.refusal(
                    name,
                    "this key is not supported; if it does not affect the logits, import the model with nextllm import "
                    f"--ignore-key {name}",
                )

    def refusal(self, name: str, reason: str) -> InputError:
        """The InputError for a bad or unsupported value."""
        said = repr(self._values[name])[:100] if name in self._values else "missing"
        return InputError(f"{self.where}: {name} is {said}; {reason}")


def agreed(*places: tuple[Keys, str]) -> tuple[Keys, str]:
    """The place that states a fact, of several keys that can, newest first; the last place if none states it.

    Raises InputError, which names both keys, if two of them have different values.
    """
    stated = [(keys, name) for keys, name in places if name in keys and keys.get(name) is not None]
    for keys, name in stated[1:]:
        newest, newest_name = stated[0]
        if keys.get(name) != newest.get(newest_name):
            raise keys.refusal(
                name, f"but {newest.where}: {newest_name} is {newest.get(newest_name)!r}; remove the wrong one"
            )
    return stated[0] if stated else places[-1]
