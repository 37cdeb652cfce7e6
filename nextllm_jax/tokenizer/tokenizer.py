"""Text to token ids and back, through tiktoken.

A tokenizer is a set of byte-level BPE ranks, the pattern that cuts text before merging, and its special
tokens. It is saved as two files: `encoding.json` and the ranks in tiktoken's own text format.
"""

import base64
import binascii
import codecs
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import tiktoken
from etils import epath
from tiktoken_ext import openai_public

from nextllm_jax.errors import InputError

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_WORD_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_WORD_END}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_WORD_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class KnownEncoding(NamedTuple):
    """A published encoding: the file of its ranks, that file's sha256, and what the file does not say."""

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

_PUBLISHED = "https://openaipublic.blob.core.windows.net/"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()
_LONGEST_BLANK = 100_000
_BRING_AGAIN = "bring an intact copy, or save the tokenizer again"


class Tokenizer:
    """A byte-level BPE with its special tokens; any text goes in, any ids come out.

    `vocab_size` is the greatest id plus one; ids in between may be unassigned. `hash` changes when the ids
    of any text could. `bos_id` and `eos_id` are one id where the encoding has only `<|endoftext|>`.
    """

    def __init__(self, name: str, *, ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]):
        missing = [value for value in range(256) if bytes([value]) not in ranks]
        if missing:
            # tiktoken would panic on the first text that needs one of them.
            raise InputError(f"tokenizer {name} lacks {len(missing)} of the 256 single bytes; bring complete ranks")
        if len({*ranks.values(), *special_tokens.values()}) != len(ranks) + len(special_tokens):
            raise InputError(f"tokenizer {name} gives one id to two tokens; bring ranks without repeated ids")
        self.name = name
        self.special_tokens = dict(special_tokens)
        self.bos_id = special_tokens[BOS if BOS in special_tokens else "<|endoftext|>"]
        self.eos_id = special_tokens[EOS if EOS in special_tokens else "<|endoftext|>"]
        self._pattern = pattern
        self._ranks_text = _format_ranks(ranks)
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self._bytes_of = {rank: token for token, rank in ranks.items()}
        self._bytes_of |= {rank: token.encode() for token, rank in special_tokens.items()}
        self.vocab_size = max(self._bytes_of) + 1
        self.hash = _hash(pattern, special_tokens, self._ranks_text)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, which is always ordinary text: "<|endoftext|>" in it is not special.

        Never raises; lone surrogates become U+FFFD.
        """
        if len(text) <= _LONGEST_BLANK:
            return self._encoding.encode_ordinary(text)
        return [token for piece in _cut_blanks(text) for token in self._encoding.encode_ordinary(piece)]

    def encode_document(self, text: str) -> list[int]:
        """Ids of the text between the tokens that begin and end a document."""
        return [self.bos_id, *self.encode(text), self.eos_id]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids; unassigned ids become U+FFFD."""
        return b"".join([self._bytes_of.get(int(token), _REPLACEMENT) for token in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; invalid UTF-8 and unassigned ids become U+FFFD, nothing raises."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer into `directory`; one that is there stays whole until it is replaced."""
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(self._ranks_text).hexdigest()
        ranks_file = f"ranks-{digest[:8]}.tiktoken"
        description = {
            "format": "nextllm_jax tokenizer 1",
            "name": self.name,
            "pattern": self._pattern,
            "special_tokens": self.special_tokens,
            "ranks_file": ranks_file,
            "ranks_sha256": digest,
            "hash": self.hash,
        }
        _write(folder / ranks_file, self._ranks_text)
        _write(folder / "encoding.json", (json.dumps(description, indent=2) + "\n").encode())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer that `save` wrote. Raises InputError, naming the file, if one is missing or damaged."""
        file = epath.Path(directory) / "encoding.json"
        try:
            description = json.loads(file.read_text())
            ranks_path = file.parent / description["ranks_file"]
            text = ranks_path.read_bytes()
            if hashlib.sha256(text).hexdigest() != description["ranks_sha256"]:
                raise InputError(f"{ranks_path} is damaged: its sha256 is not the one in {file}; {_BRING_AGAIN}")
            pattern, special_tokens = description["pattern"], description["special_tokens"]
            found = _hash(pattern, special_tokens, text)
            if description.get("hash", found) != found:
                raise InputError(f"{file} is damaged: pattern or special tokens were changed; {_BRING_AGAIN}")
            ranks = _parse_ranks(text, str(ranks_path))
            return cls(str(description["name"]), ranks=ranks, pattern=pattern, special_tokens=special_tokens)
        except FileNotFoundError as error:
            raise InputError(f"{directory} holds no saved tokenizer: {error.filename or file} is missing") from error
        except OSError as error:
            raise InputError(f"the tokenizer in {directory} cannot be read ({error.strerror or error})") from error
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{file} is damaged ({error!r}); {_BRING_AGAIN}") from error


class IncrementalDecoder:
    """Text of ids that arrive a few at a time; a UTF-8 character is handed out whole.

    All the texts joined are `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; the bytes of an unfinished character wait."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """What waits, as U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `spec` names: gpt2, cl100k_base, o200k_base, a ranks file or a saved directory.

    Only a named encoding that tiktoken has not cached uses the network. Raises InputError.
    """
    if str(spec) in KNOWN_ENCODINGS:
        return _load_named(str(spec))
    path = Path(spec)
    if path.is_dir():
        return Tokenizer.load(path)
    if path.is_file():
        return _load_ranks_file(path)
    raise InputError(
        f"data.tokenizer {spec} is not {', '.join(KNOWN_ENCODINGS)} and there is no such file or directory; "
        "give a .tiktoken ranks file or the directory of a saved tokenizer"
    )


def files_to_fetch(name: str) -> list[str]:
    """The addresses from which tiktoken would fetch a named encoding, empty if it has them in its cache."""
    known = KNOWN_ENCODINGS[name]
    names = ["gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"]
    addresses = [_PUBLISHED + file for file in (names if name == "gpt2" else [f"encodings/{known.file}"])]
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    kept = [os.path.join(cache, hashlib.sha1(address.encode()).hexdigest()) for address in addresses]
    return [address for address, file in zip(addresses, kept, strict=True) if not (cache and os.path.isfile(file))]


def trained_special_tokens(num_ranks: int) -> dict[str, int]:
    """The special tokens put behind ranks that come without any: begin and end of text."""
    return {BOS: num_ranks, EOS: num_ranks + 1}


def _load_named(name: str) -> Tokenizer:
    known = KNOWN_ENCODINGS[name]
    try:
        ranks = openai_public.ENCODING_CONSTRUCTORS[name]()["mergeable_ranks"]
    except Exception as error:
        raise InputError(
            f"tokenizer {name} is not in tiktoken's cache and cannot be fetched ({type(error).__name__}); bring "
            f"{_PUBLISHED}encodings/{known.file} and pass its path as --data.tokenizer"
        ) from error
    return Tokenizer(name, ranks=ranks, pattern=known.pattern, special_tokens=known.special_tokens)


def _load_ranks_file(path: Path) -> Tokenizer:
    """A published file, known by its content, gets its own pattern and specials; others GPT-4's and ours."""
    ranks = _parse_ranks(path.read_bytes(), str(path))
    digest = hashlib.sha256(_format_ranks(ranks)).hexdigest()
    for name, known in KNOWN_ENCODINGS.items():
        if digest == known.sha256:
            return Tokenizer(name, ranks=ranks, pattern=known.pattern, special_tokens=known.special_tokens)
    special_tokens = trained_special_tokens(max(ranks.values()) + 1)
    return Tokenizer(path.stem, ranks=ranks, pattern=GPT4_PATTERN, special_tokens=special_tokens)


def _parse_ranks(text: bytes, where: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"{where} line {number} is not 'base64-token rank'; bring a .tiktoken file") from error
    if not ranks:
        raise InputError(f"{where} holds no ranks; bring a .tiktoken file")
    if min(ranks.values()) < 0 or max(ranks.values()) >= 2**31:
        raise InputError(f"{where} has a rank outside 0 to 2^31; bring a .tiktoken file")
    return ranks


def _format_ranks(ranks: dict[bytes, int]) -> bytes:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def _cut_blanks(text: str) -> list[str]:
    """The text in pieces without long runs of blanks, on which tiktoken's pattern engine overflows its stack."""
    cuts = [0]
    for run in re.finditer(r"\s+", text):
        cuts.extend(range(run.start() + _LONGEST_BLANK, run.end(), _LONGEST_BLANK))
    return [text[start:stop] for start, stop in itertools.pairwise([*cuts, len(text)])]


def _hash(pattern: str, special_tokens: dict[str, int], ranks_text: bytes) -> str:
    described = json.dumps([pattern, special_tokens], sort_keys=True).encode()
    return hashlib.sha256(described + ranks_text).hexdigest()[:16]


def _write(path: epath.Path, content: bytes) -> None:
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_bytes(content)
    temporary.replace(path)
