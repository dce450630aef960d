"""The texts of a corpus's sequences, singly or by slices, read on access."""

from collections.abc import Sequence
from typing import overload

import numpy as np

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.storage.cuts import join_cuts


class CorpusTexts(Sequence[str]):
    """The text of each sequence, by its number. Only its record batch is read.

    It is the source's text, cut like the sequence; if the source was tokens only, the tokens
    decoded.
    """

    def __init__(self, corpus: Corpus, numbers: range | None = None):
        self._corpus = corpus
        self._numbers = range(len(corpus)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "CorpusTexts": ...
    def __getitem__(self, index: int | slice) -> "str | CorpusTexts":
        """Return the text of a sequence, or a reader of those of a slice."""
        if isinstance(index, slice):
            return CorpusTexts(self._corpus, self._numbers[index])
        shards, rows = self._corpus.locate(np.array([self._numbers[index]]))
        place = int(shards[0]), int(rows[0])
        if text := self._corpus.text("text", place):
            return text
        ids = join_cuts([self._corpus.cut(place)])["input_ids"]
        return str(self._corpus.tokenizer.hf.decode(ids.tolist(), skip_special_tokens=True))

    def __repr__(self) -> str:
        return f"<the texts of {len(self):,} sequences>"
