"""Converts SentencePiece BPE vocabularies, from a tokenizer.model or a GGUF file, to the content of a tokenizer.json.

The `tokenizers` package then runs them, not the sentencepiece package. So one library gives the ids for every source of
a vocabulary, and exporting only has to write its file.
"""

from pathlib import Path
from typing import Any, NamedTuple

from nextllm_jax.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces, numbered as in SentencePiece's model files and in GGUF."""


class Piece(NamedTuple):
    """An entry of the vocabulary; its index is its id. Higher scores merge first."""

    text: str
    score: float
    kind: int


def placeholder(id: int) -> str:
    """The text of the UNUSED piece that GGUF files have for a row of the embedding without a token."""
    return f"[PAD{id}]"


def describe(pieces: list[Piece], *, add_space_prefix: bool) -> dict[str, Any]:
    """The content of a tokenizer.json for the pieces.

    `add_space_prefix` puts a space before the text, and before the text that follows an added token.
    """
    added = {id: piece for id, piece in enumerate(pieces) if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)}
    prepend = [{"type": "Prepend", "prepend": "▁"}] if add_space_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_space_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    restore = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            # A piece with spaces is matched after normalization, which replaces spaces as in the vocabulary.
            {"id": id, "content": piece.text, **flags, "normalized": "▁" in piece.text and not add_space_prefix,
             "special": piece.kind != USER_DEFINED}
            for id, piece in added.items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((piece.text for piece in pieces if piece.kind == UNKNOWN), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == BYTE for piece in pieces),
            "ignore_merges": False,
            "vocab": {
                piece.text: id
                for id, piece in enumerate(pieces)
                if piece.kind != UNUSED or piece.text != placeholder(id)
            },
            "merges": _merges(pieces),
        },
    }  # fmt: skip


def _merges(pieces: list[Piece]) -> list[list[str]]:
    """Every pair of normal pieces whose concatenation is a normal piece, highest score first."""
    scores = {piece.text: (-piece.score, id) for id, piece in enumerate(pieces) if piece.kind == NORMAL}
    cuts = [
        (*scores[text], scores[text[:middle]], scores[text[middle:]], text[:middle], text[middle:])
        for text in scores
        for middle in range(1, len(text))
        if text[:middle] in scores and text[middle:] in scores
    ]
    return [[left, right] for *_, left, right in sorted(cuts)]


def read_model(file: Path) -> dict[str, Any]:
    """The content of a tokenizer.json for a SentencePiece model file.

    Raises InputError if the file is not such a model, if it is not BPE, or if it normalizes text.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise InputError(
            f"{file} needs the sentencepiece and protobuf packages; pip install 'nextllm_jax[interop]'"
        ) from error
    model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's DecodeError
        raise InputError(f"{file} is not a SentencePiece model ({error}); restore an intact copy") from error
    if not model.pieces:
        raise InputError(f"{file} is not a SentencePiece model: it holds no pieces; restore an intact copy")
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise InputError(f"{file} is not a BPE model; use the model's tokenizer.json")
    rules = model.normalizer_spec
    changes = rules.precompiled_charsmap or rules.remove_extra_whitespaces or not rules.escape_whitespaces
    if changes or model.trainer_spec.treat_whitespace_as_suffix:
        raise InputError(f"{file} normalizes text in an unsupported way; use the model's tokenizer.json")
    pieces = [Piece(piece.piece, piece.score, piece.type) for piece in model.pieces]
    return describe(pieces, add_space_prefix=rules.add_dummy_prefix)
