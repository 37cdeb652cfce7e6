"""Loads tokenizers by name or path: OpenAI's encodings, ranks files, saved directories, Hugging Face and GGUF files."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from etils import epath
from tiktoken_ext import openai_public

from nextllm_jax.errors import InputError
from nextllm_jax.published_models import PUBLISHED_MODELS, resolve
from nextllm_jax.tokenizer.backends import ByteBPE, format_ranks, missing_bytes, parse_ranks, sha256
from nextllm_jax.tokenizer.gguf import from_gguf, read_metadata
from nextllm_jax.tokenizer.huggingface import load_huggingface
from nextllm_jax.tokenizer.patterns import GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN
from nextllm_jax.tokenizer.tokenizer import Tokenizer, trained_special_tokens

_PUBLISHED = "https://openaipublic.blob.core.windows.net/"


class KnownEncoding(NamedTuple):
    """A published encoding: the name and sha256 of its ranks file, and the pattern and special tokens."""

    file: str
    sha256: str
    pattern: str
    special_tokens: dict[str, int]


KNOWN_ENCODINGS = {
    "gpt2": KnownEncoding(
        "r50k_base.tiktoken",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        GPT2_PATTERN,
        {"<|endoftext|>": 50256},
    ),
    "cl100k_base": KnownEncoding(
        "cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        GPT4_PATTERN,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": KnownEncoding(
        "o200k_base.tiktoken",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        O200K_PATTERN,
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `spec` names.

    `spec` is gpt2, cl100k_base or o200k_base, a ranks file, a saved directory (or the run or data directory that
    contains it), a Hugging Face directory or tokenizer.json, a GGUF file, or a published model. Only a named encoding
    that is not in tiktoken's cache uses the network. Raises InputError.
    """
    if str(spec) in KNOWN_ENCODINGS:
        return _load_named(str(spec))
    found = epath.Path(resolve(str(spec)))  # a run may be in a bucket
    path = Path(found)
    if path.name == "tokenizer.json" or any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return load_huggingface(path)
    for directory in (found, found / "tokenizer"):
        if (directory / "encoding.json").exists():
            return Tokenizer.load(directory)
    if path.is_dir():
        raise InputError(f"{path} holds no tokenizer: no encoding.json, tokenizer/, tokenizer.json or tokenizer.model")
    if path.suffix == ".gguf" and path.is_file():
        return from_gguf(read_metadata(path))
    if path.is_file():
        return _load_ranks_file(path)
    raise InputError(
        f"tokenizer {spec} is not an existing file or directory; give {', '.join(KNOWN_ENCODINGS)}, a .tiktoken ranks "
        "file, a directory with a saved or Hugging Face tokenizer, a tokenizer.json, a .gguf file or a published model "
        f"({', '.join(PUBLISHED_MODELS)})"
    )


def files_to_fetch(name: str) -> list[str]:
    """The URLs that tiktoken would fetch for a named encoding; empty if its cache has the files."""
    known = KNOWN_ENCODINGS[name]
    names = ["gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"]
    addresses = [_PUBLISHED + file for file in (names if name == "gpt2" else [f"encodings/{known.file}"])]
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    kept = [os.path.join(cache, hashlib.sha1(address.encode()).hexdigest()) for address in addresses]
    return [address for address, file in zip(addresses, kept, strict=True) if not (cache and os.path.isfile(file))]


def _load_named(name: str) -> Tokenizer:
    known = KNOWN_ENCODINGS[name]
    try:
        ranks = openai_public.ENCODING_CONSTRUCTORS[name]()["mergeable_ranks"]
    except Exception as error:
        raise InputError(
            f"tokenizer {name} is not in tiktoken's cache and cannot be fetched ({type(error).__name__}); download "
            f"{_PUBLISHED}encodings/{known.file} and name its path as the tokenizer"
        ) from error
    return Tokenizer(name, ByteBPE(ranks, known.pattern, known.special_tokens))


def _load_ranks_file(path: Path) -> Tokenizer:
    """The tokenizer of a ranks file.

    A published file, recognized by its sha256, gets its published pattern and special tokens. Any other file gets
    GPT-4's pattern and the special tokens of trained tokenizers.
    """
    ranks = parse_ranks(path.read_bytes(), str(path))
    if missing := missing_bytes(ranks):
        raise InputError(f"{path} lacks {len(missing)} of the 256 single bytes; use complete ranks")
    digest = sha256(format_ranks(ranks))
    for name, known in KNOWN_ENCODINGS.items():
        if digest == known.sha256:
            return Tokenizer(name, ByteBPE(ranks, known.pattern, known.special_tokens))
    special_tokens = trained_special_tokens(max(ranks.values()) + 1)
    return Tokenizer(path.stem, ByteBPE(ranks, GPT4_PATTERN, special_tokens))
