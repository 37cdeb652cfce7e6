"""The two tokenizer backends: tiktoken for byte-level BPE, and Hugging Face `tokenizers` for all other vocabularies.

`Recognize` says whether a token such as `<|im_end|>` is recognized if the text contains its spelling.
"""

import base64
import binascii
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import tiktoken

from nextllm_jax.errors import InputError

Recognize = Literal["all", "added", "none"]
"""Which tokens are recognized by their spelling in a text: all; added tokens that are not special; none."""

_LONGEST_BLANK = 100_000
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CONTINUATION_BYTES = range(0x80, 0xC0)


class ByteBPE:
    """Byte-level BPE by tiktoken, from ranks (which are the ids) and the pattern that splits text before merging.

    Bytes that the ranks lack are dropped after the text is split. With `nfc` the text is first normalized to NFC, which
    needs the `tokenizers` package. Raises InputError for repeated ids, or if that package is missing.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str,
        special_tokens: dict[str, int],
        added_tokens: dict[str, int] | None = None,
        *,
        nfc: bool = False,
    ) -> None:
        self.ranks, self.pattern, self.nfc = ranks, pattern, nfc
        self.special_tokens, self.added_tokens = dict(special_tokens), dict(added_tokens or {})
        self.tokens = {**self.added_tokens, **self.special_tokens}
        if len({*ranks.values(), *self.tokens.values()}) != len(ranks) + len(self.tokens):
            raise InputError("the tokenizer gives the same id to two tokens; use ranks without repeated ids")
        self.bytes_of = {rank: token for token, rank in ranks.items()}
        self.bytes_of |= {rank: token.encode() for token, rank in self.tokens.items()}
        # tiktoken panics on a byte without a rank, so missing bytes get ranks; they are removed before encoding.
        missing = missing_bytes(ranks)
        if lost := [byte for byte in missing if byte[0] in _CONTINUATION_BYTES]:
            raise InputError(
                f"the ranks lack the byte 0x{lost[0][0]:02X}, which most non-ASCII text needs; use complete ranks"
            )
        self._missing = b"".join(missing)
        spare = itertools.count(max(self.bytes_of) + 1)
        self._encoding = tiktoken.Encoding(
            "ranks",
            pat_str=pattern,
            mergeable_ranks=ranks | dict(zip(missing, spare, strict=False)),
            special_tokens=self.tokens,
        )
        # Not Python's unicodedata: its Unicode version may differ from the one that the models were trained with.
        self._compose = import_tokenizers().normalizers.NFC().normalize_str if nfc else None
        self._added = match_any(self.added_tokens)
        self._all = match_any(self.tokens)

    def encode(self, text: str, recognize: Recognize) -> list[int]:
        """The ids of a text, which must not contain surrogates."""
        pattern = {"all": self._all, "added": self._added, "none": None}[recognize]
        if pattern is None:
            return self._encode_plain(text)
        parts = split_at(pattern, self.tokens, text)
        return [id for part in parts for id in ([part] if isinstance(part, int) else self._encode_plain(part))]

    def num_bytes(self, text: str) -> int:
        """The number of bytes that the ids of a text have together."""
        text = text if self._compose is None else self._compose(text)
        return len(text.encode().translate(None, self._missing))

    def without(self, tokens: Collection[str]) -> "ByteBPE":
        """The encoding without some of its special and added tokens."""
        special, added = (
            {token: id for token, id in known.items() if token not in tokens}
            for known in (self.special_tokens, self.added_tokens)
        )
        return ByteBPE(self.ranks, self.pattern, special, added, nfc=self.nfc)

    @functools.cached_property
    def ranks_text(self) -> bytes:
        """The ranks in tiktoken's own text format."""
        return format_ranks(self.ranks)

    def _encode_plain(self, text: str) -> list[int]:
        if self._compose is not None and not text.isascii():
            text = self._compose(text)
        if self._missing and len(text.encode().translate(None, self._missing)) < len(text.encode()):
            return self._encode_without_missing(text)
        if len(text) <= _LONGEST_BLANK:
            return self._encoding.encode_ordinary(text)
        return [token for piece in _split_blanks(text) for token in self._encoding.encode_ordinary(piece)]

    def _encode_without_missing(self, text: str) -> list[int]:
        """The ids of a text with bytes that the ranks lack. Splits first, since the pattern needs whole characters."""
        import regex  # comes with tiktoken

        ids: list[int] = []
        for found in regex.finditer(self.pattern, text):
            if piece := found[0].encode().translate(None, self._missing):
                # A piece must not be split again; tiktoken has no public function for that.
                ids += self._encoding._encode_single_piece(piece)
        return ids


class HuggingFaceBPE:
    """The tokenizer of a `tokenizer.json`, run by the `tokenizers` package.

    Raises InputError if the package is missing, or if the JSON is not a byte-level or SentencePiece tokenizer.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self._recognize_all = from_json(description)
        added = self._recognize_all.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in added.items() if token.special}
        self.added_tokens = {token.content: id for id, token in added.items() if not token.special}
        self.tokens = {**self.added_tokens, **self.special_tokens}
        to_bytes = _piece_decoder(json.loads(description).get("decoder"))
        spelled = str.encode if to_bytes is letters_to_bytes else to_bytes
        self.ids = self._recognize_all.get_vocab(with_added_tokens=True)
        self.bytes_of = {id: to_bytes(piece) for piece, id in self.ids.items()}
        # A token that is matched in normalized text stands for its normalized spelling, such as one with a space.
        self.bytes_of |= {id: spelled(self._recognize_all.id_to_token(id)) for id in self.tokens.values()}

    def encode(self, text: str, recognize: Recognize) -> list[int]:
        """The ids of a text, which must not contain surrogates."""
        if recognize == "none":
            return self._recognize_none.encode(text, add_special_tokens=False).ids
        encoder = self._recognize_all if recognize == "all" else self._recognize_added
        return encoder.encode(text, add_special_tokens=False).ids

    def without(self, tokens: Collection[str]) -> "HuggingFaceBPE":
        """The tokenizer without some of its special and added tokens, which have the highest ids."""
        description = json.loads(self.description)
        description["added_tokens"] = [each for each in description["added_tokens"] if each["content"] not in tokens]
        model = description["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {piece: id for piece, id in model["vocab"].items() if piece not in tokens}
        else:
            model["vocab"] = [entry for entry in model["vocab"] if entry[0] not in tokens]
        _remove_merges(model, tokens)
        return HuggingFaceBPE(json.dumps(description, ensure_ascii=False))

    def renamed(self, spellings: dict[str, str]) -> Any:
        """The `tokenizers.Tokenizer` with the same ids that knows some tokens by other spellings only."""
        description = json.loads(self.description) | {"post_processor": None}  # one may trim offsets
        _rename(description, spellings)
        return from_json(json.dumps(description))

    @property
    def produces_spellings(self) -> bool:
        """Whether the model may encode the spelling of a special or added token as that token by itself."""
        return _can_produce(json.loads(self.description)["model"], [token for token in self.tokens if len(token) > 1])

    def prefix(self) -> list[int]:
        """The ids that the post-processor of the tokenizer.json puts before a text."""
        whole = self._recognize_all.encode("a")
        length = next((i for i, added in enumerate(whole.special_tokens_mask) if not added), 0)
        return whole.ids[:length]

    @functools.cached_property
    def _recognize_added(self) -> Any:
        return self._without(self.special_tokens)

    @functools.cached_property
    def _recognize_none(self) -> Any:
        return self._without(self.tokens)

    def _without(self, tokens: Collection[str]) -> Any:
        """The tokenizer with the same ids that encodes the spellings of `tokens` as ordinary text.

        `encode_special_tokens` does so only if the model has no other way to produce the tokens. Otherwise, they get
        spellings that no text contains. A token of one character keeps its spelling, since its text has no other id.
        """
        description = json.loads(self.description)
        for token in description["added_tokens"]:
            token["special"] = token["special"] or token["content"] in tokens
        spelled = {token: f" \ufdd0{self.ids[token]} " for token in tokens if len(token) > 1}
        if _can_produce(description["model"], spelled):
            _rename(description, spelled)
        encoder = from_json(json.dumps(description))
        encoder.encode_special_tokens = True
        return encoder


def merge_pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model in a tokenizer.json, which has pairs or, in earlier versions, "left right"."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return [(left, right) for left, right in pairs]


def _can_produce(model: dict[str, Any], tokens: Collection[str]) -> bool:
    """Whether a model in a tokenizer.json may encode text as one of the tokens."""
    if model["type"] != "BPE":
        return True
    if model.get("ignore_merges"):  # whole words are looked up in the vocabulary
        return any(token in model["vocab"] for token in tokens)
    return any(left + right in tokens for left, right in merge_pairs(model))


def _rename(description: dict[str, Any], spellings: dict[str, str]) -> None:
    """Replace the spellings of tokens in a tokenizer.json, in place, and remove the merges that they are part of."""
    for token in description["added_tokens"]:
        token["content"] = spellings.get(token["content"], token["content"])
    model = description["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spellings.get(piece, piece): id for piece, id in model["vocab"].items()}
    else:
        model["vocab"] = [[spellings.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in spellings:
        model["unk_token"] = spellings[model["unk_token"]]
    _remove_merges(model, spellings)


def _remove_merges(model: dict[str, Any], tokens: Collection[str]) -> None:
    """Remove the merges that produce or use one of the tokens from a model in a tokenizer.json."""
    if "merges" in model:
        pairs = merge_pairs(model)
        model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)}.isdisjoint(tokens)]


def import_tokenizers() -> Any:
    """The `tokenizers` package. Raises InputError if it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise InputError("this tokenizer needs the tokenizers package; pip install 'nextllm_jax[interop]'") from error
    return tokenizers


def from_json(description: str) -> Any:
    """A `tokenizers.Tokenizer` without truncation, padding and random splits (dropout), so ids are a function of
    the text.

    Raises InputError if the package is missing, or if the JSON is not a tokenizer.
    """
    tokenizers = import_tokenizers()
    try:
        tokenizer = tokenizers.Tokenizer.from_str(description)
    except Exception as error:  # the package raises plain Exception
        raise InputError(f"tokenizer.json cannot be read as a tokenizer ({error}); restore an intact copy") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for setting in ("dropout", "alpha", "nbest_size"):  # of BPE; of Unigram
        if getattr(tokenizer.model, setting, None) is not None:
            setattr(tokenizer.model, setting, None)
    return tokenizer


def match_any(tokens: Collection[str]) -> re.Pattern[str] | None:
    """A pattern for any of the tokens, longest first; None without tokens."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def split_at(pattern: re.Pattern[str] | None, tokens: dict[str, int], text: str) -> Iterator[str | int]:
    """The text split at matches of `match_any(tokens)`: ids for the matches, and the text between, if not empty."""
    start = 0
    for found in pattern.finditer(text) if pattern else ():
        if found.start() > start:
            yield text[start : found.start()]
        yield tokens[found[0]]
        start = found.end()
    if start < len(text):
        yield text[start:]


@functools.cache
def byte_letters() -> dict[str, int]:
    """The letter of each byte in a byte-level vocabulary, as defined by GPT-2.

    Printable Latin-1 characters represent themselves. U+0100, U+0101, ... represent the other bytes, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


@functools.cache
def _letter_of_byte() -> list[str]:
    return sorted(byte_letters(), key=byte_letters().__getitem__)


def bytes_to_letters(token: bytes) -> str:
    """The spelling of a token's bytes in a byte-level vocabulary."""
    letters = _letter_of_byte()
    return "".join([letters[byte] for byte in token])


def letters_to_bytes(piece: str) -> bytes:
    """The bytes of a piece of a byte-level vocabulary; its UTF-8 if it has other letters than `byte_letters`."""
    letters = byte_letters()
    if all(letter in letters for letter in piece):
        return bytes(letters[letter] for letter in piece)
    return piece.encode()


def _piece_decoder(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """The function that maps a piece of the vocabulary to its bytes, for the decoder of a tokenizer.json.

    Steps that act on a whole text are left out: they only remove the space before it. Raises InputError for a decoder
    that does more.
    """
    steps = decoder.get("decoders", [decoder]) if decoder else []
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return letters_to_bytes
    order = "".join(f"{kind} " for kind in kinds)
    if not re.fullmatch("((Replace|Metaspace|ByteFallback) )+(Fuse )?(Strip )?", order):
        raise InputError(
            f"tokenizer.json has the decoder {', '.join(kinds) or 'none'}, which is not supported; use a byte-level "
            "BPE or SentencePiece tokenizer"
        )
    if kinds[-1] == "Strip" and (steps[-1]["content"], steps[-1]["stop"]) != (" ", 0):
        raise InputError(f"tokenizer.json has the decoder {steps[-1]}; only removing leading spaces is supported")
    replacements: list[tuple[str, str]] = []
    for step in steps:
        if step["type"] == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif step["type"] == "Replace" and "String" not in step["pattern"]:
            raise InputError(f"tokenizer.json has the decoder {step}; only replacing a string is supported")
        elif step["type"] == "Replace":
            replacements.append((step["pattern"]["String"], step["content"]))

    def to_bytes(piece: str) -> bytes:
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    if "ByteFallback" not in kinds:
        return to_bytes
    return lambda piece: bytes([int(piece[3:5], 16)]) if _BYTE_PIECE.fullmatch(piece) else to_bytes(piece)


def missing_bytes(ranks: dict[bytes, int]) -> list[bytes]:
    """The single bytes that the ranks lack."""
    return [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]


def parse_ranks(text: bytes, where: str) -> dict[bytes, int]:
    """The ranks in tiktoken's text format; `where` names the file in errors. Raises InputError."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"{where} line {number} is not 'base64-token rank'; give a .tiktoken file") from error
    if not ranks:
        raise InputError(f"{where} holds no ranks; give a .tiktoken file")
    if min(ranks.values()) < 0 or max(ranks.values()) >= 2**31:
        raise InputError(f"{where} has a rank outside 0 to 2^31; give a .tiktoken file")
    return ranks


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """The ranks in tiktoken's text format, sorted."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def sha256(content: bytes) -> str:
    """The sha256 of some bytes, in hex."""
    return hashlib.sha256(content).hexdigest()


def _split_blanks(text: str) -> list[str]:
    """The text split within long runs of whitespace, on which tiktoken's pattern engine would overflow its stack."""
    cuts = [0]
    for run in re.finditer(r"\s+", text):
        cuts.extend(range(run.start() + _LONGEST_BLANK, run.end(), _LONGEST_BLANK))
    return [text[start:stop] for start, stop in itertools.pairwise([*cuts, len(text)])]
