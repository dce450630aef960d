"""Find documents with names of special tokens written in their text ("</s>", "<|im_end|>")."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from rekindle.data.corpus.packing import Position
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.source.content import Dialogue
from rekindle.data.source.documents import Document

MIN_NAME_LENGTH = 3  # shorter names, and names that are words, may be ordinary text


def special_names(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern that finds one in a text; None if there are none."""
    known = {tokenizer.hf.convert_ids_to_tokens(number) for number in tokenizer.special_ids}
    names = sorted(n for n in known if len(n) >= MIN_NAME_LENGTH and not n.isalnum())
    return re.compile("|".join(map(re.escape, names))) if names else None


def holders_of(names: re.Pattern[str] | None, documents: Sequence[Document]) -> list[int]:
    """Return which of the documents hold some."""
    if names is None:
        return []
    search = names.search
    return [n for n, document in enumerate(documents) if any(map(search, _user_texts(document)))]


def _user_texts(document: Document) -> tuple[str, ...]:
    """Return its texts; for a dialogue, without the special tokens that the template writes."""
    content = document.content
    return (content.written,) if isinstance(content, Dialogue) else document.texts


class Holders:
    """The documents that hold some, among those that were read."""

    def __init__(self) -> None:
        self._indices: list[int] = []

    def extend(self, indices: Iterable[int]) -> None:
        """Add those of the documents read next, by their index in the corpus."""
        self._indices += indices

    def count(self, start: Position, end: Position) -> int:
        """Return how many of the documents that begin from ``start`` on and before ``end`` hold
        some.

        All of them must have been read.
        """
        begins = [bisect_left(self._indices, _next_document(place)) for place in (start, end)]
        return begins[1] - begins[0]


def _next_document(place: Position) -> int:
    """Return the index of the first document that begins at ``place`` or after it."""
    return place.document_index + (place.token > 0)
