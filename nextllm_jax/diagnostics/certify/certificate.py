"""The result of `nextllm certify`: rows of a table, and the JSON that is written into an export."""

import dataclasses
import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any, Literal

FORMAT = "nextllm_jax certificate 1"
FILE = "certificate.json"

Status = Literal["ok", "FAILED", "skipped"]
_PACKAGES = ("nextllm_jax", "jax", "flax", "numpy", "tokenizers", "safetensors", "gguf")


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison."""

    check: str
    status: Status
    detail: str
    fault: str | None = None
    """The name of the fault that explains a failure, such as "permuted projection"; None if none does."""

    def __str__(self) -> str:
        first, *others = self.detail.splitlines() or [""]
        named = f"{self.fault}: {first}" if self.fault else first
        return "\n".join([f"{self.status:8} {self.check:40} {named}", *(f"{'':50}{line}" for line in others)])


def ok(check: str, detail: str) -> Row:
    """A comparison without a difference."""
    return Row(check, "ok", detail)


def failed(check: str, detail: str, fault: str | None = None) -> Row:
    """A comparison with a difference, and the name of its cause."""
    return Row(check, "FAILED", detail, fault)


def skipped(check: str, reason: str) -> Row:
    """A comparison that was not made, and why."""
    return Row(check, "skipped", reason)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """All comparisons of a model."""

    model: str
    """Its name, without the path, which would say where it was."""
    rows: tuple[Row, ...]
    conversation: str | None = None
    """The text of a short conversation, in which the tokens of the loss mask are in brackets."""

    @property
    def failed(self) -> bool:
        """Whether any comparison found a difference."""
        return any(row.status == "FAILED" for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The certificate as JSON values."""
        return {
            "format": FORMAT,
            "model": self.model,
            "certified": not self.failed,
            "checks": [dataclasses.asdict(row) for row in self.rows],
            "conversation": self.conversation,
            "versions": {"python": platform.python_version(), **_versions()},
        }

    @property
    def verdict(self) -> str:
        """The result in one line."""
        counts = {status: sum(row.status == status for row in self.rows) for status in ("ok", "FAILED", "skipped")}
        numbers = f"{counts['ok']} comparisons without a difference, {counts['skipped']} skipped"
        return f"NOT CERTIFIED: {counts['FAILED']} failed, {numbers}" if self.failed else f"certified: {numbers}"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hashes(directory: Path) -> dict[str, str]:
    """The sha256 of each file of an export, without the certificate and the model card that describes it."""
    files = (path for path in sorted(directory.iterdir()) if path.is_file() and path.name not in (FILE, "README.md"))
    result = {}
    for path in files:
        with open(path, "rb") as opened:
            result[path.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return result
