"""The tokenizer: text to ids and back, with the roles of its special tokens.

It is saved as two files: `encoding.json`, and either the ranks in tiktoken's text format or a Hugging Face
`tokenizer.json`.
"""

import codecs
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from typing import Any

from etils import epath

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.backends import ByteBPE, HuggingFaceBPE, Recognize, parse_ranks, sha256

_log = logging.getLogger(__name__)

FORMAT = "nextllm_jax tokenizer 1"
"""Format of encoding.json."""
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()
_RESTORE_HINT = "restore an intact copy, or save the tokenizer again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roles:
    """The roles of a tokenizer's special tokens."""

    bos_id: int
    """Begins a document."""
    eos_id: int
    """Ends a document."""
    add_bos: bool = True
    """Whether a prompt also begins with bos_id."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end generated text: the end of a document or of a turn."""
    pad_id: int | None = None
    """Padding token; None if the model has none."""
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    """The spellings of the tokens, by their names in chat templates: bos_token, eos_token, ..."""
    chat_template: str | None = None
    """The model's Jinja chat template, which formats messages as text."""


def default_roles(special_tokens: dict[str, int]) -> Roles:
    """The roles for a trained or an OpenAI vocabulary. <|endoftext|> may both begin and end documents."""
    bos = BOS if BOS in special_tokens else "<|endoftext|>"
    eos = EOS if EOS in special_tokens else "<|endoftext|>"
    bos_id, eos_id = special_tokens[bos], special_tokens[eos]
    return Roles(bos_id=bos_id, eos_id=eos_id, stop_ids=(eos_id,), names={"bos_token": bos, "eos_token": eos})


class Tokenizer:
    """A vocabulary with its special tokens. It encodes any text and decodes any ids.

    `vocab_size` is the highest id plus one; lower ids may be unassigned. `hash` changes whenever the ids of some
    document might change. `bos_id` and `eos_id` are the same id if the vocabulary has only `<|endoftext|>`. `roles`
    defaults to `default_roles`.
    """

    def __init__(self, name: str, backend: ByteBPE | HuggingFaceBPE, roles: Roles | None = None) -> None:
        self.name = name
        self.backend = backend
        self.special_tokens = backend.special_tokens
        self.roles = default_roles(self.special_tokens) if roles is None else roles
        self.bos_id, self.eos_id = self.roles.bos_id, self.roles.eos_id
        self.add_bos, self.stop_ids, self.pad_id = self.roles.add_bos, self.roles.stop_ids, self.roles.pad_id
        self.chat_template = self.roles.chat_template
        self._bytes_of = backend.bytes_of
        if unknown := {self.bos_id, self.eos_id, *self.stop_ids} - self._bytes_of.keys():
            raise ValueError(f"the roles name ids that have no token: {sorted(unknown)}")
        self.vocab_size = max(self._bytes_of) + 1
        self.hash = _hash(backend, self.roles)

    def encode(self, text: str, *, recognize: Recognize = "added") -> list[int]:
        """The ids of the text. By default special tokens such as "<|endoftext|>" in it are encoded as ordinary text.

        Added tokens that are not special are recognized. With `recognize` "all", special tokens are recognized too, as
        in the output of a chat template; with "none", neither. Lone surrogates become U+FFFD.
        """
        return self.backend.encode(without_surrogates(text), recognize)

    def encode_document(self, text: str) -> list[int]:
        """The ids of the text between the tokens that begin and end a document."""
        return [self.bos_id, *self.encode(text), self.eos_id]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt, at least one. They begin with bos_id if `add_bos` is set or the text is empty."""
        ids = self.encode(text)
        return [self.bos_id, *ids] if self.add_bos or not ids else ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids; unassigned ids become U+FFFD."""
        return b"".join([self._bytes_of.get(int(token), _REPLACEMENT) for token in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Never raises; invalid UTF-8 and unassigned ids become U+FFFD.

        The space that a SentencePiece vocabulary puts before a text is kept. So are valid characters next to invalid
        bytes, as in llama.cpp; the ByteFallback decoder of `tokenizers` replaces each byte of such a run by U+FFFD, so
        its text of a run is not known before the run ends.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def within(self, rows: int) -> "Tokenizer":
        """The tokenizer for a model whose embedding has `rows` rows: without the added tokens of higher ids.

        Their spellings are then ordinary text; a warning names them. Raises InputError if the ids of other tokens, or
        of those that begin and end a document, are too high.
        """
        if self.vocab_size <= rows:
            return self
        beyond = {token: id for token, id in self.backend.tokens.items() if id >= rows}
        kept = self._bytes_of.keys() - beyond.values()
        if max(kept, default=0) >= rows or not {self.bos_id, self.eos_id} <= kept:
            raise InputError(
                f"the tokenizer {self.name} has ids up to {self.vocab_size - 1}, but the model's embedding has only "
                f"{rows} rows; use the tokenizer that belongs to the model"
            )
        _log.warning(
            f"tokens of {self.name} that the model's embedding ({rows} rows) lacks are left out: {', '.join(beyond)}"
        )
        roles = dataclasses.replace(
            self.roles,
            stop_ids=tuple(id for id in self.stop_ids if id in kept),
            pad_id=self.pad_id if self.pad_id in kept else None,
            names={name: token for name, token in self.roles.names.items() if token not in beyond},
        )
        return Tokenizer(self.name, self.backend.without(beyond), roles)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer into `directory`, atomically replacing one that is already there."""
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        backend = self.backend
        description: dict[str, Any] = {"format": FORMAT, "name": self.name}
        if isinstance(backend, ByteBPE):
            content = backend.ranks_text
            file = f"ranks-{sha256(content)[:8]}.tiktoken"
            description |= {
                "pattern": backend.pattern,
                "special_tokens": backend.special_tokens,
                "added_tokens": backend.added_tokens,
                "nfc": backend.nfc,
                "ranks_file": file,
                "ranks_sha256": sha256(content),
            }
        else:
            content = backend.description.encode()
            file = f"huggingface-{sha256(content)[:8]}.json"
            description |= {"huggingface_file": file, "huggingface_sha256": sha256(content)}
        description |= {"roles": dataclasses.asdict(self.roles), "hash": self.hash}
        _write(folder / file, content)
        _write(folder / "encoding.json", (json.dumps(description, indent=2) + "\n").encode())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer that `save` wrote. Raises InputError, which names the file, if one is missing or damaged."""
        file = epath.Path(directory) / "encoding.json"
        try:
            description = json.loads(file.read_text())
            if description.get("format", FORMAT) != FORMAT:
                raise InputError(f"{file} has format '{description['format']}'; use the version that wrote it")
            tokenizer = cls(str(description["name"]), _load_backend(file, description), _load_roles(description))
            if description.get("hash", tokenizer.hash) != tokenizer.hash:
                raise InputError(f"{file} is damaged: its hash does not match its content; {_RESTORE_HINT}")
            return tokenizer
        except FileNotFoundError as error:
            raise InputError(f"{directory} holds no saved tokenizer: {error.filename or file} is missing") from error
        except OSError as error:
            raise InputError(f"the tokenizer in {directory} cannot be read ({error.strerror or error})") from error
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{file} is damaged ({error!r}); {_RESTORE_HINT}") from error


class IncrementalDecoder:
    """Decodes ids that arrive a few at a time, without splitting UTF-8 characters.

    The concatenated results equal `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete. Bytes of an unfinished character are kept for the next call."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """U+FFFD for the bytes of an unfinished character, or an empty string."""
        return self._decoder.decode(b"", final=True)


def trained_special_tokens(num_ranks: int) -> dict[str, int]:
    """The special tokens for ranks that have none: begin and end of text, with the ids after the ranks."""
    return {BOS: num_ranks, EOS: num_ranks + 1}


def _load_backend(file: epath.Path, description: dict[str, Any]) -> ByteBPE | HuggingFaceBPE:
    kind = "huggingface" if "huggingface_file" in description else "ranks"
    path = file.parent / description[f"{kind}_file"]
    content = path.read_bytes()
    if sha256(content) != description[f"{kind}_sha256"]:
        raise InputError(f"{path} is damaged: its sha256 differs from the one in {file}; {_RESTORE_HINT}")
    if kind == "huggingface":
        return HuggingFaceBPE(content.decode())
    return ByteBPE(
        parse_ranks(content, str(path)),
        description["pattern"],
        description["special_tokens"],
        description.get("added_tokens"),
        nfc=description.get("nfc", False),
    )


def _load_roles(description: dict[str, Any]) -> Roles | None:
    if "roles" not in description:
        return None
    fields: dict[str, Any] = dict(description["roles"])
    fields["stop_ids"] = tuple(fields["stop_ids"])
    return Roles(**fields)


def _hash(backend: ByteBPE | HuggingFaceBPE, roles: Roles) -> str:
    """A hash of everything that affects the ids of documents. Features that a vocabulary lacks do not affect it."""
    if isinstance(backend, ByteBPE):
        settings: list[Any] = [backend.pattern, backend.special_tokens]
        settings += [backend.added_tokens] if backend.added_tokens else []
        settings += ["nfc"] if backend.nfc else []
        content = backend.ranks_text
    else:
        settings, content = [], backend.description.encode()
    ends = [roles.bos_id, roles.eos_id]
    if isinstance(backend, HuggingFaceBPE) or ends != _usual_ends(backend.special_tokens):
        settings.append(ends)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + content).hexdigest()[:16]


def _usual_ends(special_tokens: dict[str, int]) -> list[int] | None:
    try:
        roles = default_roles(special_tokens)
    except KeyError:
        return None
    return [roles.bos_id, roles.eos_id]


def without_surrogates(text: str) -> str:
    """The text as it is encoded: surrogate pairs become the characters that they stand for, and lone ones U+FFFD.

    Raises InputError if it is not a string.
    """
    if not isinstance(text, str):
        raise InputError(f"the text is {text!r:.80}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _write(path: epath.Path, content: bytes) -> None:
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_bytes(content)
    temporary.replace(path)
