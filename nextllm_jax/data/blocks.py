"""The checksums of prepared files: index.json has one for each block of a file, so parts can be verified by themselves.

An entry of index.json has a file's name, its size, its sha256, and the first 64 bits of the sha256 of each block of
BLOCK_BYTES, concatenated.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from nextllm_jax.errors import InputError

BLOCK_BYTES = 256 * 2**10

_DIGEST_CHARACTERS = 16


def file_entry(path: Path) -> dict[str, Any]:
    """The entry of a file."""
    whole, blocks, size = hashlib.sha256(), [], 0
    with open(path, "rb") as file:
        while content := file.read(BLOCK_BYTES):
            whole.update(content)
            blocks.append(_digest(content))
            size += len(content)
    return {"file": path.name, "size": size, "sha256": whole.hexdigest(), "blocks": "".join(blocks)}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGEST_CHARACTERS]


def num_blocks(entry: dict[str, Any]) -> int:
    """Number of blocks of a file."""
    return len(entry["blocks"]) // _DIGEST_CHARACTERS


def block_size(entry: dict[str, Any], block: int) -> int:
    """Size of a block of a file in bytes."""
    return min(BLOCK_BYTES, entry["size"] - block * BLOCK_BYTES)


def is_intact(entry: dict[str, Any], block: int, content: bytes) -> bool:
    """Whether `content` is a block of a file, by its checksum."""
    return _digest(content) == entry["blocks"][block * _DIGEST_CHARACTERS : (block + 1) * _DIGEST_CHARACTERS]


def damaged_block(directory: os.PathLike[str], entry: dict[str, Any], block: int) -> InputError:
    """The error for a block whose content is not that of index.json."""
    start = block * BLOCK_BYTES
    return InputError(
        f"{os.fspath(directory)}/{entry['file']} is damaged or belongs to other data: the sha256 of bytes {start:,} to "
        f"{start + block_size(entry, block):,} differs from index.json; {restore_hint(directory)}"
    )


def restore_hint(directory: os.PathLike[str]) -> str:
    """How to fix damaged data."""
    return (
        "restore an intact copy, or prepare the data again: nextllm prepare --overwrite --output "
        f"{os.fspath(directory)}"
    )
