"""Encodes a text in which a mark says where the spelling of a control token is ordinary text.

A text cannot be encoded in pieces around such places: a SentencePiece tokenizer may put a space before the first piece
only, and tokens may strip the whitespace next to them.
"""

import functools
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable
from typing import Any

from nextllm_jax.tokenizer.backends import ByteBPE, HuggingFaceBPE, match_any, split_at

_QUOTE = "\ufdd0"
"""A Unicode noncharacter around the id of a control token. In texts, U+FFFD replaces it."""


@functools.lru_cache(2)
def control_tokens(backend: ByteBPE | HuggingFaceBPE, names: frozenset[str]) -> "ControlTokens":
    """A cached `ControlTokens`: making one takes a second for a large vocabulary."""
    return ControlTokens(backend, names)


class ControlTokens:
    """Encodes texts with the control tokens `names`, which are recognized by their spellings without a mark.

    Other added tokens are recognized by their spellings as usual.
    """

    def __init__(self, backend: ByteBPE | HuggingFaceBPE, names: Collection[str]) -> None:
        self._backend = backend
        self._spelling = {id: token for token, id in backend.tokens.items()}
        self._pattern = match_any(backend.tokens)
        self._quoted: dict[int, str] = dict(self._spelling)
        self._encoder: Any = None
        if isinstance(backend, HuggingFaceBPE):
            # Some normalizers keep a token from being recognized within a text. Then it is ordinary text anyway.
            known = [name for name in names if backend.tokens[name] in backend.encode(f"\n{name}\n", "all")]
            quoted = {name: f"{_QUOTE}{backend.tokens[name]}{_QUOTE}" for name in known if len(name) > 1}
            self._encoder = backend.renamed(quoted)
            self._quoted |= {backend.tokens[name]: spelling for name, spelling in quoted.items()}

    def encode(self, text: str, mark: str, cuts: Iterable[int] = ()) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of the text without the marks, and two numbers for each of the increasing positions `cuts` in it.

        These are the numbers of ids that end at or before the position, and of those that begin before it.
        """
        waiting = list(cuts)[::-1]
        parts: list[str | int] = []
        places: list[int] = []  # of the cuts, in the unit of _width
        position = place = 0
        for part in split_at(self._pattern, self._backend.tokens, text):
            is_token = isinstance(part, int)
            size = len(self._spelling[part]) if is_token else len(part)
            while waiting and waiting[-1] < position + size:
                cut = waiting.pop() - position
                before = (part if cut else "") if is_token else part[:cut].replace(mark, "")
                places.append(place + self._width(before))
            parts.append(part if is_token else part.replace(mark, ""))
            position += size
            place += self._width(parts[-1])
        places += [place] * len(waiting)
        ids, starts, ends = self._encode(parts)
        return ids, [(bisect_right(ends, place), bisect_left(starts, place)) for place in places]

    def _encode(self, parts: list[str | int]) -> tuple[list[int], list[int], list[int]]:
        """The ids, and where each starts and ends, in bytes or, for HuggingFaceBPE, in characters."""
        backend = self._backend
        if isinstance(backend, ByteBPE):
            ids = [id for part in parts for id in ([part] if isinstance(part, int) else backend.encode(part, "none"))]
            ends = list(itertools.accumulate(len(backend.bytes_of[id]) for id in ids))
            return ids, [0, *ends[:-1]], ends
        found = self._encoder.encode("".join(map(self._quote, parts)), add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets], [end for _, end in found.offsets]

    def _width(self, part: str | int) -> int:
        backend = self._backend
        if isinstance(backend, HuggingFaceBPE):
            return len(self._quote(part))
        return len(backend.bytes_of[part]) if isinstance(part, int) else backend.num_bytes(part)

    def _quote(self, part: str | int) -> str:
        return self._quoted[part] if isinstance(part, int) else part.replace(_QUOTE, "\ufffd")
