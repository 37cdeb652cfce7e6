"""The arguments of a command, and its `--help`. Commands that take a whole config show it by sections."""

import dataclasses
import itertools
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro

from nextllm_jax.errors import InputError

T = TypeVar("T")
_ALL = "all"


def parse(kind: type[T], argv: Sequence[str], *, description: str | None = None, **options: Any) -> T:
    """The arguments of a command, a dataclass whose docstring describes it; `options` are those of tyro.cli.

    Exits for unknown options and for --help.
    """
    if {"-h", "--help"} & {*argv}:
        _set_help(kind)
    return tyro.cli(kind, args=argv, description=kind.__doc__ if description is None else description, **options)


def _set_help(kind: type[Any]) -> None:
    """Store the docstring of each field as its help, in one line. tyro alone keeps the line breaks of the source."""
    import docstring_parser  # only for --help

    described: dict[str, str | None] = {}
    for base in kind.__mro__[-2::-1]:
        described |= {each.arg_name: each.description for each in docstring_parser.parse_from_object(base).params}
    for field in dataclasses.fields(kind):
        if text := described.get(field.name):
            field.metadata = types.MappingProxyType({**field.metadata, "help": " ".join(text.split())})
        section = typing.get_args(field.type)[0] if typing.get_origin(field.type) is Annotated else field.type
        if dataclasses.is_dataclass(section):
            _set_help(typing.cast(type[Any], section))


def parse_with_config(argv: list[str], default: T, *, prog: str, description: str = "") -> T:
    """The arguments of a command, a dataclass like `default`, whose field `run` is the config.

    Exits for unknown options, and for `--help`, which may be followed by a section such as optimizer, or by all. Raises
    InputError for an unknown section.
    """
    description = description or type(default).__doc__ or ""
    topic = _topic(argv)
    if topic is None or topic == _ALL:
        argv = argv if topic is None else ["--help"]
        return parse(type(default), argv, default=default, prog=prog, description=description)
    sections = _sections(default)
    if topic and topic not in sections:
        raise InputError(f"--help {topic}: no such section; the sections are {', '.join(sections)} and {_ALL}")
    if topic:
        shown: Any = _dataclass("Section", {topic: (type(sections[topic]), sections[topic])})()
        description = ""
    else:
        shown = _without_sections(default)
        listed = [f"  {name:12}{_first_sentence(section)}" for name, section in sections.items()]
        listed.append(f"  {_ALL:12}all options")
        description += "\n\nFurther options, listed by --help SECTION:\n" + "\n".join(listed)
    return parse(type(shown), ["--help"], default=shown, prog=prog, description=description)


def _topic(argv: list[str]) -> str | None:
    """The word after --help; empty if there is none. None without --help."""
    for option, word in itertools.pairwise([*argv, ""]):
        if option in ("-h", "--help"):
            return "" if word.startswith("-") else word
    return None


def _first_sentence(section: Any) -> str:
    return (type(section).__doc__ or "").replace("\n", " ").partition(". ")[0].removesuffix(".")


def _sections(arguments: Any) -> dict[str, Any]:
    """The sections of the arguments and of their config by name, such as "model"."""
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
    config = values.pop("run", None)
    found = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    return found if config is None else _sections(config) | found


def _without_sections(arguments: Any) -> Any:
    """The arguments with the same values and docstrings, but without the sections in their help."""
    hidden = {
        name: (tyro.conf.Suppress[type(value)], value)
        for name, value in _sections(arguments).items()
        if hasattr(arguments, name)
    }
    if hasattr(arguments, "run"):
        run = _without_sections(arguments.run)
        hidden["run"] = (Annotated[type(run), tyro.conf.arg(name="")], run)
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
    fields = {name: value for name, (_, value) in hidden.items()}
    return _dataclass(type(arguments).__name__, hidden, type(arguments))(**values | fields)


def _dataclass(name: str, fields: dict[str, tuple[Any, Any]], base: type[Any] = object) -> type[Any]:
    """A dataclass with fields of a type and a default each."""
    listed = [(field, kind, dataclasses.field(default=value)) for field, (kind, value) in fields.items()]
    return dataclasses.make_dataclass(name, listed, bases=(base,), frozen=True, kw_only=True)
