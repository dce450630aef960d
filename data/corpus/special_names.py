"""Names of special tokens written in a text ("</s>", "<|im_end|>"): which documents hold some."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from rekindle.data.corpus.packing import Position
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.source.documents import Document

SHORTEST = 3  # shorter names, and those that are words, say nothing where they stand in a text


class SpecialNames:
    """The documents with the name of a special token among those that were read."""

    def __init__(self, tokenizer: Tokenizer):
        known = {tokenizer.hf.convert_ids_to_tokens(number) for number in tokenizer.special_ids}
        names = sorted(n for n in known if len(n) >= SHORTEST and not n.isalnum())
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self._holders: list[int] = []

    def watch(self, documents: Iterable[Document], first: int) -> Iterator[Document]:
        """The documents as they come; ``first`` is the index of the first one in the corpus."""
        for index, document in enumerate(documents, first):
            pattern = self._pattern
            if pattern is not None and any(map(pattern.search, document.texts)):
                self._holders.append(index)
            yield document

    def count(self, start: Position, end: Position) -> int:
        """How many documents hold some, of those that begin from ``start`` on and before ``end``.

        All of them must have been read.
        """
        begins = [bisect_left(self._holders, _next_document(place)) for place in (start, end)]
        return begins[1] - begins[0]


def _next_document(place: Position) -> int:
    """The index of the first document that begins at ``place`` or after it."""
    return place.document_index + (place.token > 0)
