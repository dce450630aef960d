"""Make the sequences of a source: parts of it in parallel, wherever they are done; in sequence only
what crosses from one part to the next.

A process that gets a part reads its records, tokenises its texts and, if no sequence crosses a
document, makes the sequences too. The asking process only counts, and joins what crosses documents.
"""

import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import numpy as np

from rekindle.data.corpus.encoder import Encoder, GivenEncoder
from rekindle.data.corpus.in_order import InOrder
from rekindle.data.corpus.joining import joined_rows
from rekindle.data.corpus.packing import BEGINNING, Packing, Position
from rekindle.data.corpus.rows import EncodedDocuments, Rows, pack, rows_of_pairs, rows_of_texts
from rekindle.data.corpus.special_names import Holders, holders_of
from rekindle.data.errors import InputError
from rekindle.data.forms.marks import Marks
from rekindle.data.source.documents import Document, warn_empty
from rekindle.data.source.left_out import LeftOut
from rekindle.data.source.parts import Part, Reader, cut_parts
from rekindle.data.source.sources import Origin


@dataclass(frozen=True)
class Made:
    """The result of a part: its number of documents, the ``holders`` among them of names of special
    tokens; their sequences, or their tokens if sequences cross documents.
    """

    documents: int
    left_out: LeftOut
    with_text: set[int]
    reached: int
    error: InputError | None
    holders: list[int] = field(default_factory=list)
    made: Rows | EncodedDocuments | None = None


@dataclass(frozen=True)
class Maker:
    """Makes parts into sequences or tokens. ``how`` they are packed; ``length``: for pairs."""

    reader: Reader
    encoder: Encoder
    names: re.Pattern[str] | None
    how: Packing
    length: int
    given: GivenEncoder | None = None

    def __call__(self, part: Part) -> Made:
        """Return the part read, tokenised, and packed as far as no other part is needed."""
        found = self.reader(part)
        documents = found.documents
        texts = [text for document in documents for text in document.texts]
        made: Rows | EncodedDocuments
        if self.reader.fields.pair is not None:
            made = rows_of_pairs(documents, self.encoder.pairs(texts, self.length))
        else:
            made, how = self._encoded(part, documents, texts), self.how
            if how.alone:
                if part.content != "text":  # given tokens are complete
                    how = Packing(self.length, (), (), (), (), alone=True)
                made = rows_of_texts(made, 0, how, last=True)[0]
        return Made(
            len(documents),
            found.left_out,
            found.with_text,
            found.reached,
            found.error,
            holders_of(self.names, documents),
            made,
        )

    def _encoded(self, part: Part, documents: list[Document], texts: list[str]) -> EncodedDocuments:
        if self.given is None:
            return EncodedDocuments(documents, *self.encoder.texts(texts))
        if part.content == "text" or not documents:
            tokens, lengths = self.encoder.texts(texts)
            marks = Marks.of_texts(len(documents), len(tokens.ids))
            return EncodedDocuments(documents, tokens, lengths, marks)
        if self.how.alone:
            tokens, lengths, marks = self.given.cut(documents, self.length)
        else:
            end = self.how.end or self.how.suffix
            tokens, lengths, marks = self.given.bare(documents, self.how.prefix, end)
        return EncodedDocuments([d._replace(given=None) for d in documents], tokens, lengths, marks)


@dataclass(frozen=True)
class _Counter:
    """Counts the documents of parts."""

    reader: Reader

    def __call__(self, part: Part) -> Made:
        found = self.reader(part)
        more = found.with_text, found.reached, found.error
        return Made(len(found.documents), found.left_out, *more)


@dataclass
class Making:
    """The sequences of ``origins`` from a position on, made by ``maker`` through ``in_order``. Also
    counts what was left out, and the holders of names.
    """

    origins: Sequence[Origin]
    maker: Maker
    left_out: LeftOut
    in_order: InOrder
    start: Position = BEGINNING
    holders: Holders = field(default_factory=Holders)
    _told: int = 0  # number of origins already checked for text
    _with_text: set[int] = field(default_factory=set)

    def rows(self) -> Iterator[Rows]:
        """Yield the sequences in order, those of one part at a time."""
        if self.maker.how.alone:
            rows = with_trained(self._after_start())
            return joined_rows(rows, self.maker.length) if self.maker.how.joined else rows
        return with_trained(pack(self._tokens(), self.maker.how, self.start))

    def read_on(self) -> None:
        """Read up to the start and the next document, to count what is left out before it."""
        with closing(self._made()) as made:
            next(made, None)

    def _after_start(self) -> Iterator[Rows]:
        for index, made in self._made():
            assert isinstance(made, Rows)
            rows = made.moved(index)
            yield rows.after(self.start) if index <= self.start.document_index else rows

    def _tokens(self) -> Iterator[EncodedDocuments]:
        for index, made in self._made():
            assert isinstance(made, EncodedDocuments)
            yield made.rest(max(0, self.start.document_index - index))

    def _made(self) -> Generator[tuple[int, Rows | EncodedDocuments], None, None]:
        """Yield the result of each part, and the index of its first document."""
        parts = cut_parts(self.origins, self.maker.reader.fields)
        if self.start.document_index:
            parts = self._from_start(parts)
        with closing(self.in_order(partial(_itself, self.maker), parts)) as each:
            for made in each:
                index = self.left_out.documents
                self.holders.extend(index + holder for holder in made.holders)
                self._count(made)
                assert made.made is not None
                yield index, made.made
                if made.error:
                    raise made.error
        self._tell_until(len(self.origins))

    def _from_start(self, parts: Iterator[Part]) -> Iterator[Part]:
        """Return the parts from the one that contains the start; those before it are only
        counted.
        """
        ahead = deque[Part]()

        def taken() -> Iterator[Part]:
            for part in parts:
                ahead.append(part)
                yield part

        load = partial(_itself, _Counter(self.maker.reader))
        with closing(self.in_order(load, taken())) as each:
            for made in each:
                if self.left_out.documents + made.documents > self.start.document_index:
                    break
                ahead.popleft()
                self._count(made)
                if made.error:
                    raise made.error
        return chain(ahead, parts)

    def _count(self, made: Made) -> None:
        self.left_out.extend(made.left_out)
        self._with_text |= made.with_text
        self._tell_until(made.reached)

    def _tell_until(self, number: int) -> None:
        """Log which of the origins before that number have no text."""
        for passed in range(self._told, number):
            if passed not in self._with_text:
                warn_empty(self.origins[passed])
        self._told = max(self._told, number)


def _itself(do: Callable[[Part], Made]) -> Callable[[Part], Made]:
    return do


# --- what is learnt -------------------------------------------------------------------------------


def with_trained(parts: Iterable[Rows]) -> Iterator[Rows]:
    """Yield the sequences with a trained token; each has the number without one before it."""
    held: Rows | None = None  # until it is known whether others follow
    count, end = 0, np.zeros(2, np.int64)
    for rows in parts:
        if rows.trained is None:
            yield rows
            continue
        row_of = np.repeat(np.arange(len(rows)), rows.lengths)
        learnt = np.bincount(row_of, rows.trained, len(rows)) > 0
        stays = np.flatnonzero(learnt)
        if len(rows) and not len(stays):
            count, end = count + len(rows), rows.ends[-1]
        if not len(stays):
            continue
        if held is not None:
            yield held
        before = np.diff(stays, prepend=-1) - 1
        before[0] += count
        held = replace(rows.chosen(learnt), untrained=before)
        count, end = len(rows) - 1 - int(stays[-1]), rows.ends[-1]
    if held is not None and held.untrained is not None:
        if count:
            held.untrained[-1] += count
            held.ends[-1] = end
        yield held
