"""Reads and writes JSON files of Hugging Face, and reads what those next to tokenizer.json say about a tokenizer."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from nextllm_jax.errors import InputError

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Declarations(NamedTuple):
    """What the files of a directory declare in addition to tokenizer.json."""

    names: dict[str, str]
    """The spellings of bos_token, eos_token, ..."""
    tokens: list[dict[str, Any]]
    """Tokens, with the flags of tokenizer.json's added_tokens, and with "id" if it is declared."""
    add_bos: bool | None
    """Whether prompts begin with BOS; None if it is not declared."""
    stop_ids: list[int]
    """Ids that end generated text."""
    chat_template: str | None
    rows: int | None
    """Rows of the model's embedding; None if unknown."""


def read_declarations(folder: Path) -> Declarations:
    """The declarations of a directory's tokenizer_config.json, special_tokens_map.json, added_tokens.json,
    generation_config.json, config.json and chat template, as transformers 5 reads them.

    Raises InputError, which names the file and the key, for damaged files and values of the wrong type.
    """
    file = folder / "tokenizer_config.json"
    config = read_json(file)
    has_decoder = "added_tokens_decoder" in config
    config = config if has_decoder else config | read_json(folder / "special_tokens_map.json")
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(more, list | dict):
        raise InputError(f"{file}: extra_special_tokens is {more!r}; it must be a list or an object of tokens")
    values = [*named.values(), *(more.values() if isinstance(more, dict) else more)]
    special = [token for value in values if (token := _special(value)) is not None]
    contents = {token["content"] for token in special}
    if has_decoder:
        tokens = _tokens_by_id(config["added_tokens_decoder"], file, contents)
    else:
        tokens = _tokens_of_file(folder / "added_tokens.json", contents)
    model = read_json(folder / "config.json")
    rows, add_bos = model.get("vocab_size"), config.get("add_bos_token")
    if not isinstance(add_bos, bool | None):
        raise InputError(f"{file}: add_bos_token is {add_bos!r}; it must be true or false")
    stops: list[Any] = []
    for eos in (read_json(folder / "generation_config.json").get("eos_token_id"), model.get("eos_token_id")):
        stops += eos if isinstance(eos, list) else [eos]
    return Declarations(
        names={name: text for name in NAMES if (text := _content(config.get(name))) is not None},
        tokens=[*tokens, *special],
        add_bos=add_bos,
        stop_ids=[id for id in stops if type(id) is int],
        chat_template=_chat_template(folder, config),
        rows=rows if type(rows) is int else None,
    )


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing. Raises InputError for other content."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}); restore an intact copy") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold a JSON object, not {type(content).__name__}; restore an intact copy")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write JSON as Hugging Face does."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def added_token(id: int | None, content: str, **flags: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens; flags that are not given are false."""
    return {"id": id, "content": content, **{name: flags.get(name, False) for name in _FLAGS}}


def _content(token: Any) -> str | None:
    """The text of a token from tokenizer_config.json, in which a token may be a string or an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _special(value: Any) -> dict[str, Any] | None:
    """A token that is special because of where it is declared."""
    content = _content(value)
    if content is None:
        return None
    flags = {name: value.get(name) is True for name in _FLAGS} if isinstance(value, dict) else {}
    return added_token(None, content, **flags | {"special": True})


def _tokens_by_id(declared: Any, file: Path, special: set[str]) -> list[dict[str, Any]]:
    """The tokens of added_tokens_decoder, in the order of their ids; those in `special` are special."""
    if not isinstance(declared, dict | None):
        raise InputError(f"{file}: added_tokens_decoder is {type(declared).__name__}; it must be an object")
    tokens = []
    for id, token in (declared or {}).items():
        if not (id.isdecimal() and isinstance(token, dict) and _content(token)):
            raise InputError(f"{file}: added_tokens_decoder has {id!r}: {token!r}; it must map ids to tokens")
        flags = {"normalized": not token.get("special", False), **{key: token[key] for key in _FLAGS if key in token}}
        if token["content"] in special:
            flags["special"] = True
        tokens.append(added_token(int(id), token["content"], **flags))
    return sorted(tokens, key=lambda token: token["id"])


def _tokens_of_file(file: Path, special: set[str]) -> list[dict[str, Any]]:
    """The tokens of added_tokens.json, in the order of their ids; those in `special` are special."""
    declared = read_json(file)
    if not all(type(id) is int and token for token, id in declared.items()):
        raise InputError(f"{file} must map tokens to ids; restore an intact copy")
    return [
        added_token(id, token, special=token in special, normalized=token not in special)
        for token, id in sorted(declared.items(), key=lambda item: item[1])
    ]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The model's chat template; the one named "default" if there are several."""
    file = folder / "chat_template.jinja"
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text ({error}); restore an intact copy") from error
    template = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise InputError(
            f"{folder}: chat_template is {str(template)[:100]!r}; it must be a string, or a list of objects with name "
            "and template, in tokenizer_config.json or chat_template.json"
        )
    return template
