"""Strict access to the values of an external model config."""

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

    def refusal(self, name: str, reason: str) -> InputError:
        """The InputError for a bad or unsupported value."""
        said = repr(self._values[name])[:100] if name in self._values else "missing"
        return InputError(f"{self.where}: {name} is {said}; {reason}")
