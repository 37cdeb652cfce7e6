"""Counts what a corpus holds while it is read, for a report: duplicates, and characters that were not valid."""

import array
from collections.abc import Iterable, Iterator

import numpy as np

from nextllm_jax.data.corpora import Document, document_hash

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Census:
    """The counts of one pass over the documents of a corpus. It keeps 8 bytes for each document."""

    def __init__(self) -> None:
        self._training, self._held_out = array.array("Q"), array.array("Q")
        self._replaced = self._with_replaced = 0
        self._example = ""

    def count(self, documents: Iterable[Document], limit: int) -> Iterator[Document]:
        """The documents, which are counted. Those with a hash up to `limit` are held out."""
        for document in documents:
            is_held_out = document_hash(document) <= limit
            (self._held_out if is_held_out else self._training).append(int.from_bytes(document.digest[:8], "big"))
            if replaced := document.text.count(_REPLACEMENT):
                self._example = self._example or document.location
                self._replaced += replaced
                self._with_replaced += 1
            yield document

    def describe_duplicates(self) -> str | None:
        """A line about documents with the same text, if there are any."""
        training, held_out = (np.frombuffer(each, np.uint64) for each in (self._training, self._held_out))
        total = len(training) + len(held_out)
        repeated = total - len(np.unique(np.concatenate([training, held_out])))
        if not repeated:
            return None
        in_both = int(np.isin(training, held_out).sum())
        leak = f", and {in_both:,} training documents are also in the validation split" if in_both else ""
        return (
            f"{repeated:,} of {total:,} documents repeat the text of another{leak}; data.deduplicate exact keeps one "
            "of each"
        )

    def describe_replaced(self) -> str | None:
        """A line about invalid UTF-8, if there is any."""
        if not self._replaced:
            return None
        return (
            f"{self._replaced:,} characters in {self._with_replaced:,} documents are U+FFFD, which stands for invalid "
            f"UTF-8, first in {self._example}; convert files in other encodings to UTF-8"
        )
