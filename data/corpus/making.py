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
from rekindle.data.corpus.joining import join_rows
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
class PartResult:
    """The result of a part: its number of documents, the ``holders`` among them of names of special
    tokens; their sequences, or their tokens if sequences cross documents.
    """

    documents: int
    left_out: LeftOut
    with_text: set[int]
    reached: int
    error: InputError | None
    holders: list[int] = field(default_factory=list)
    result: Rows | EncodedDocuments | None = None


@dataclass(frozen=True)
class PartMaker:
    """Makes parts into sequences or tokens. ``packing``: how; ``length``: of a pair."""

    reader: Reader
    encoder: Encoder
    names: re.Pattern[str] | None
    packing: Packing
    length: int
    given_encoder: GivenEncoder | None = None

    def __call__(self, part: Part) -> PartResult:
        """Return the part read, tokenised, and packed as far as no other part is needed."""
        read = self.reader(part)
        documents = read.documents
        texts = [text for document in documents for text in document.texts]
        made: Rows | EncodedDocuments
        if self.reader.fields.pair is not None:
            made = rows_of_pairs(documents, self.encoder.pairs(texts, self.length))
        else:
            made, packing = self._encoded(part, documents, texts), self.packing
            if packing.one_document:
                if part.content != "text":  # given tokens are complete
                    packing = Packing(self.length, (), (), (), (), one_document=True)
                made = rows_of_texts(made, 0, packing, last=True)[0]
        return PartResult(
            len(documents),
            read.left_out,
            read.with_text,
            read.reached,
            read.error,
            holders_of(self.names, documents),
            made,
        )

    def _encoded(self, part: Part, documents: list[Document], texts: list[str]) -> EncodedDocuments:
        if self.given_encoder is None:
            return EncodedDocuments(documents, *self.encoder.texts(texts))
        if part.content == "text" or not documents:
            tokens, lengths = self.encoder.texts(texts)
            marks = Marks.of_texts(len(documents), len(tokens.ids))
            return EncodedDocuments(documents, tokens, lengths, marks)
        if self.packing.one_document:
            tokens, lengths, marks = self.given_encoder.cut(documents, self.length)
        else:
            end = self.packing.end or self.packing.suffix
            tokens, lengths, marks = self.given_encoder.cut_affixes(
                documents, self.packing.prefix, end
            )
        documents = [document._replace(content=None) for document in documents]
        return EncodedDocuments(documents, tokens, lengths, marks)


@dataclass(frozen=True)
class _Counter:
    """Counts the documents of parts."""

    reader: Reader

    def __call__(self, part: Part) -> PartResult:
        read = self.reader(part)
        outcome = read.with_text, read.reached, read.error
        return PartResult(len(read.documents), read.left_out, *outcome)


@dataclass
class CorpusStream:
    """The sequences of ``origins`` from a position on, made by ``maker`` through ``in_order``. Also
    counts what was left out, and the holders of names.
    """

    origins: Sequence[Origin]
    maker: PartMaker
    left_out: LeftOut
    in_order: InOrder
    start: Position = BEGINNING
    holders: Holders = field(default_factory=Holders)
    _checked_origins: int = 0  # number of origins already checked for text
    _with_text: set[int] = field(default_factory=set)

    def rows(self) -> Iterator[Rows]:
        """Yield the sequences in order, those of one part at a time."""
        if self.maker.packing.one_document:
            rows = drop_untrained(self._after_start())
            return join_rows(rows, self.maker.length) if self.maker.packing.joins_rows else rows
        return drop_untrained(pack(self._tokens(), self.maker.packing, self.start))

    def read_on(self) -> None:
        """Read up to the start and the next document, to count what is left out before it."""
        with closing(self._results()) as made:
            next(made, None)

    def _after_start(self) -> Iterator[Rows]:
        for index, made in self._results():
            assert isinstance(made, Rows)
            rows = made.shifted_by(index)
            yield rows.after(self.start) if index <= self.start.document_index else rows

    def _tokens(self) -> Iterator[EncodedDocuments]:
        for index, made in self._results():
            assert isinstance(made, EncodedDocuments)
            yield made.from_document(max(0, self.start.document_index - index))

    def _results(self) -> Generator[tuple[int, Rows | EncodedDocuments], None, None]:
        """Yield the result of each part, and the index of its first document."""
        parts = cut_parts(self.origins, self.maker.reader.fields)
        if self.start.document_index:
            parts = self._from_start(parts)
        with closing(self.in_order(partial(_identity, self.maker), parts)) as results:
            for made in results:
                index = self.left_out.kept_documents
                self.holders.extend(index + holder for holder in made.holders)
                self._count(made)
                assert made.result is not None
                yield index, made.result
                if made.error:
                    raise made.error
        self._log_empty_until(len(self.origins))

    def _from_start(self, parts: Iterator[Part]) -> Iterator[Part]:
        """Return the parts from the one that contains the start; those before it are only
        counted.
        """
        pending = deque[Part]()

        def recorded_parts() -> Iterator[Part]:
            for part in parts:
                pending.append(part)
                yield part

        load = partial(_identity, _Counter(self.maker.reader))
        with closing(self.in_order(load, recorded_parts())) as results:
            for made in results:
                if self.left_out.kept_documents + made.documents > self.start.document_index:
                    break
                pending.popleft()
                self._count(made)
                if made.error:
                    raise made.error
        return chain(pending, parts)

    def _count(self, made: PartResult) -> None:
        self.left_out.extend(made.left_out)
        self._with_text |= made.with_text
        self._log_empty_until(made.reached)

    def _log_empty_until(self, end: int) -> None:
        """Log which of the origins before that number have no text."""
        for number_of_origin in range(self._checked_origins, end):
            if number_of_origin not in self._with_text:
                warn_empty(self.origins[number_of_origin])
        self._checked_origins = max(self._checked_origins, end)


def _identity(do: Callable[[Part], PartResult]) -> Callable[[Part], PartResult]:
    return do


# --- what is learnt -------------------------------------------------------------------------------


def drop_untrained(parts: Iterable[Rows]) -> Iterator[Rows]:
    """Yield the sequences with a trained token; each has the number without one before it."""
    previous: Rows | None = None  # until it is known whether others follow
    count, end = 0, np.zeros(2, np.int64)
    for rows in parts:
        if rows.trained is None:
            yield rows
            continue
        row_of = np.repeat(np.arange(len(rows)), rows.lengths)
        has_trained = np.bincount(row_of, rows.trained, len(rows)) > 0
        kept_rows = np.flatnonzero(has_trained)
        if len(rows) and not len(kept_rows):
            count, end = count + len(rows), rows.ends[-1]
        if not len(kept_rows):
            continue
        if previous is not None:
            yield previous
        skipped_before = np.diff(kept_rows, prepend=-1) - 1
        skipped_before[0] += count
        previous = replace(rows.select(has_trained), untrained=skipped_before)
        count, end = len(rows) - 1 - int(kept_rows[-1]), rows.ends[-1]
    if previous is not None and previous.untrained is not None:
        if count:
            previous.untrained[-1] += count
            previous.ends[-1] = end
        yield previous
