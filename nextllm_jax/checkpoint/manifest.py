"""The manifest of a checkpoint: a JSON file with its metadata and the sizes and checksums of its other files.

Nothing here imports jax or orbax.
"""

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from etils import epath

FORMAT, ATTEMPT_FORMAT = 1, 2
"""Formats of new manifests: of steps that are renamed, and of those that name an attempt.

A manifest without a format has format 1; a reader rejects a format that it does not know.
"""
MANIFEST = "manifest.json"
"""The file of a step with its metadata, and the size and sha256 of its other files."""
CHECKSUMS = "checksums"
"""The key of a manifest with the checksum of each array, by its item and path; manifests of old versions lack it."""
PREFIX = "prefix"
"""The key of a manifest with the directory of its files, relative to the step; without it, they are in the step."""


class DamagedFile(Exception):
    """`file` of a step is damaged; `problem` describes how, such as "is missing"."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file} {problem}")
        self.file, self.problem = file, problem


class UnknownManifest(DamagedFile):
    """The manifest of a step is intact, but this version cannot read it."""

    def __init__(self, problem: str, manifest: Any = None) -> None:
        match manifest:
            case {"versions": dict(versions)} if versions:
                names = ", ".join(f"{name} {version}" for name, version in versions.items())
                written_with = f" (it was written with {names[:200]})"
            case _:
                written_with = ""
        super().__init__(MANIFEST, f"{problem}; another version may have written it{written_with}")


def sealed(content: dict[str, Any]) -> bytes:
    """The content of a manifest file: a JSON object with the manifest and its checksum."""
    return with_checksum(json.dumps(content).encode())


def with_checksum(body: bytes) -> bytes:
    """A JSON object with a manifest and its checksum."""
    return b'{"sha256": "%s",\n"manifest": %s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def read_manifest(path: epath.Path) -> dict[str, Any]:
    """The manifest of a step.

    Raises DamagedFile if it is missing or damaged, and UnknownManifest if it is intact but cannot be read by this
    version.
    """
    try:
        content = (path / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise DamagedFile(MANIFEST, "is missing") from error
    body = content.partition(b'"manifest": ')[2][:-2]
    if content != with_checksum(body):
        raise DamagedFile(MANIFEST, "does not match its checksum" if content else "is empty")
    try:
        manifest = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnknownManifest("is not JSON") from error
    problem = _problem_of_manifest(manifest)
    if problem:
        raise UnknownManifest(problem, manifest)
    return manifest


def _problem_of_manifest(manifest: Any) -> str | None:
    """Why this version cannot read an intact manifest; None if it can."""
    if not isinstance(manifest, dict):
        return "is not a JSON object"
    version = manifest.get("format", 1)
    if version not in (FORMAT, ATTEMPT_FORMAT):
        return f"has format {version}, but this version reads formats up to {ATTEMPT_FORMAT}"
    missing = [name for name in _FIELDS if name not in manifest]
    if missing:
        return f"lacks {' and '.join(missing)}"
    fields = _FIELDS | {name: is_valid for name, is_valid in _OPTIONAL_FIELDS.items() if name in manifest}
    wrong = [name for name, is_valid in fields.items() if not is_valid(manifest[name])]
    return f"has invalid values in {' and '.join(wrong)}" if wrong else None


def _is_table(value: Any, is_entry: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_entry, value.values()))


def _is_leaf(value: Any) -> bool:
    match value:
        case [str(), [*shape]]:
            return all(isinstance(size, int) for size in shape)
    return False


def _is_file(value: Any) -> bool:
    match value:
        case {"size": int(), "sha256": str()} | {"size": int(), "crc32c": str()}:
            return True
    return False


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: isinstance(value, int),
    "validation_loss": lambda value: value is None or (isinstance(value, int | float) and math.isfinite(value)),
    "items": lambda value: _is_table(value, lambda tree: _is_table(tree, _is_leaf)),
    "record": lambda value: isinstance(value, dict),
    "files": lambda value: _is_table(value, _is_file),
}
"""The fields of a manifest that are read, with a check of their values. Other fields are for people only."""
_OPTIONAL_FIELDS: dict[str, Callable[[Any], bool]] = {
    CHECKSUMS: lambda value: _is_table(value, lambda tree: _is_table(tree, lambda entry: isinstance(entry, int))),
}
"""As _FIELDS, for fields that manifests of old versions lack."""
