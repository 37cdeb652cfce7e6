"""A tokenizer: how text becomes ids and ids text, and what its special tokens are for.

It is saved as two files: `encoding.json`, and the ranks in tiktoken's own text format or a Hugging Face
`tokenizer.json`.
"""

import codecs
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

from etils import epath

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.backends import ByteBPE, HuggingFaceBPE, Recognize, parse_ranks, sha256

FORMAT = "nextllm_jax tokenizer 1"
"""Of encoding.json."""
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()
_BRING_AGAIN = "bring an intact copy, or save the tokenizer again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roles:
    """What the special tokens of a tokenizer are for."""

    bos_id: int
    """Begins a document."""
    eos_id: int
    """Ends a document."""
    add_bos: bool = True
    """Whether a prompt begins with bos_id too."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end generated text: of the document, of a turn."""
    pad_id: int | None = None
    """Fills up rows; None if the model has no such token."""
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    """The tokens' spelling by the names that chat templates use: bos_token, eos_token, ..."""
    chat_template: str | None = None
    """The model's own Jinja template, from messages to text."""


def default_roles(special_tokens: dict[str, int]) -> Roles:
    """The roles in a vocabulary of ours or OpenAI's, where <|endoftext|> may both begin and end documents."""
    bos = BOS if BOS in special_tokens else "<|endoftext|>"
    eos = EOS if EOS in special_tokens else "<|endoftext|>"
    bos_id, eos_id = special_tokens[bos], special_tokens[eos]
    return Roles(bos_id=bos_id, eos_id=eos_id, stop_ids=(eos_id,), names={"bos_token": bos, "eos_token": eos})


class Tokenizer:
    """A vocabulary with its special tokens; any text goes in, any ids come out.

    `vocab_size` is the greatest id plus one; ids in between may be unassigned. `hash` changes when the ids
    of any document could. `bos_id` and `eos_id` are one id where the vocabulary has only `<|endoftext|>`.
    `roles` are `default_roles` where they are not given.
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
        """Ids of the text, which is ordinary text: "<|endoftext|>" in it is not special.

        Tokens that were added to a vocabulary without being special are found. `recognize` "all" finds the special
        ones too, as a chat template means them, "none" neither. Never raises; lone surrogates become U+FFFD.
        """
        return self.backend.encode(_without_surrogates(text), recognize)

    def encode_document(self, text: str) -> list[int]:
        """Ids of the text between the tokens that begin and end a document."""
        return [self.bos_id, *self.encode(text), self.eos_id]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to continue, never none: behind bos_id if the model wants it there, or if there is no text."""
        ids = self.encode(text)
        return [self.bos_id, *ids] if self.add_bos or not ids else ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids; unassigned ids become U+FFFD."""
        return b"".join([self._bytes_of.get(int(token), _REPLACEMENT) for token in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; invalid UTF-8 and unassigned ids become U+FFFD, nothing raises.

        A space that the vocabulary puts before a text, as SentencePiece's do, is part of it.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer into `directory`; one that is there stays whole until it is replaced."""
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
        """The tokenizer that `save` wrote. Raises InputError, naming the file, if one is missing or damaged."""
        file = epath.Path(directory) / "encoding.json"
        try:
            description = json.loads(file.read_text())
            if description.get("format", FORMAT) != FORMAT:
                raise InputError(f"{file} has format '{description['format']}'; use the version that wrote it")
            tokenizer = cls(str(description["name"]), _load_backend(file, description), _load_roles(description))
            if description.get("hash", tokenizer.hash) != tokenizer.hash:
                raise InputError(f"{file} is damaged: pattern or special tokens were changed; {_BRING_AGAIN}")
            return tokenizer
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


def trained_special_tokens(num_ranks: int) -> dict[str, int]:
    """The special tokens put behind ranks that come without any: begin and end of text."""
    return {BOS: num_ranks, EOS: num_ranks + 1}


def _load_backend(file: epath.Path, description: dict[str, Any]) -> ByteBPE | HuggingFaceBPE:
    kind = "huggingface" if "huggingface_file" in description else "ranks"
    path = file.parent / description[f"{kind}_file"]
    content = path.read_bytes()
    if sha256(content) != description[f"{kind}_sha256"]:
        raise InputError(f"{path} is damaged: its sha256 is not the one in {file}; {_BRING_AGAIN}")
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
    """A digest of what decides the ids of documents; what a vocabulary does not have leaves no trace in it."""
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


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _write(path: epath.Path, content: bytes) -> None:
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_bytes(content)
    temporary.replace(path)
