"""The sequences of a corpus as columns, made from the tokens of many documents at a time."""

import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

from rekindle.data.corpus.encoded import Encoded, EncodedPairs
from rekindle.data.corpus.packing import BEGINNING, Ints, Packing, Position, plan
from rekindle.data.forms.marks import Marks
from rekindle.data.source.documents import Document

PIECE_SEPARATOR = "\n\n"  # between the texts of two documents in one sequence
BUCKETS = 10_000  # documents fall into these by hash: a range of them is a stable sample


@dataclass(frozen=True)
class EncodedDocuments:
    """Consecutive documents and their tokens: ``lengths`` [documents] of each, and their ``marks``
    in a corpus that is only partly trained.
    """

    documents: list[Document]
    tokens: Encoded
    lengths: Ints
    marks: Marks | None = None

    def __reduce__(self) -> tuple[object, ...]:
        # Pickle by columns: an object for each of many short documents would take longer to pickle
        # than making their tokens into sequences.
        columns = [*zip(*self.documents, strict=True)]
        return _from_columns, (columns, self.tokens, self.lengths, self.marks)

    def followed_by(self, other: "EncodedDocuments") -> "EncodedDocuments":
        """Return these, followed by others."""
        tokens = Encoded.concatenate([self.tokens, other.tokens])
        lengths = np.concatenate([self.lengths, other.lengths])
        marks = self.marks.followed_by(other.marks) if self.marks and other.marks else None
        return EncodedDocuments(self.documents + other.documents, tokens, lengths, marks)

    def from_document(self, first: int) -> "EncodedDocuments":
        """Return these from a document on."""
        before = int(self.lengths[:first].sum())
        tokens = self.tokens.part(slice(before, None))
        marks = self.marks and self.marks.without_first(first, before)
        return EncodedDocuments(self.documents[first:], tokens, self.lengths[first:], marks)


def _from_columns(
    columns: Sequence[Sequence[str]], tokens: Encoded, lengths: Ints, marks: Marks | None
) -> EncodedDocuments:
    documents = [*map(Document._make, zip(*columns, strict=True))]
    return EncodedDocuments(documents, tokens, lengths, marks)


@dataclass(frozen=True)
class Rows:
    """R sequences; L tokens in all, special ones included, of P pieces of documents.

    lengths [R]; input_ids [L] int32; char_starts [L] int32: where the token's text starts in the
    sequence's text, −1 for special tokens; word_starts [L] bool: False for special tokens, and for
    a first token that continues a word of the sequence before; token_types [L] int32: the segments
    of pairs, None for other sequences. pieces [R], document_starts [P] int32: in each sequence the
    positions where a document begins or is resumed. documents (their ids), domains, groups: of the
    first token's document; spans [R,2]: the characters of that document; buckets [R] uint16: its
    hash bucket. texts: the sequences' own, the documents' parts joined by a blank line; for a pair
    both texts uncut, whatever was cut of their tokens, and its span is the first one's. digests:
    the identity of each, 128 bits over its token ids and its text (and what is trained, if not all
    is), as 32 hex digits. lost [R]: tokens cut from pairs and dialogues. ends [R,2]: the Position
    after each. trained [L] bool: what is learnt; None: all. untrained [R]: how many sequences
    without a trained token were left out before each; the last one's includes those after it.
    """

    lengths: Ints
    input_ids: NDArray[np.int32]
    char_starts: NDArray[np.int32]
    word_starts: NDArray[np.bool_]
    token_types: NDArray[np.int32] | None
    pieces: Ints
    document_starts: NDArray[np.int32]
    documents: list[str]
    domains: list[str | None]
    groups: list[str | None]
    spans: Ints
    buckets: NDArray[np.uint16]
    texts: list[str]
    digests: list[str]
    lost: Ints
    ends: Ints
    trained: NDArray[np.bool_] | None = None
    untrained: Ints | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def _row_offsets(self) -> tuple[Ints, Ints]:
        return sums_before(self.lengths), sums_before(self.pieces)

    def part(self, first: int, last: int) -> "Rows":
        """Return some of the sequences."""
        row = slice(first, last)
        token, piece = (slice(offsets[first], offsets[last]) for offsets in self._row_offsets)
        types = self.token_types
        return Rows(
            lengths=self.lengths[row],
            input_ids=self.input_ids[token],
            char_starts=self.char_starts[token],
            word_starts=self.word_starts[token],
            token_types=None if types is None else types[token],
            pieces=self.pieces[row],
            document_starts=self.document_starts[piece],
            documents=self.documents[row],
            domains=self.domains[row],
            groups=self.groups[row],
            spans=self.spans[row],
            buckets=self.buckets[row],
            texts=self.texts[row],
            digests=self.digests[row],
            lost=self.lost[row],
            ends=self.ends[row],
            trained=None if self.trained is None else self.trained[token],
            untrained=None if self.untrained is None else self.untrained[row],
        )

    def select(self, is_kept: NDArray[np.bool_]) -> "Rows":
        """Return the sequences [R] that stay."""
        if is_kept.all():
            return self.part(0, len(self))
        edges = np.flatnonzero(np.diff(is_kept, prepend=False, append=False))
        return Rows.concatenate([self.part(a, b) for a, b in edges.reshape(-1, 2).tolist()])

    def after(self, start: Position) -> "Rows":
        """Return those after ``start``; ValueError if it is inside a document and ends none."""
        ends = [Position(*end) for end in self.ends.tolist()]
        first = bisect_right(ends, start)
        if start.token and ends[first - 1 : first] != [start]:
            raise _no_such_start(start)
        return self.part(first, len(self))

    def shifted_by(self, documents: int) -> "Rows":
        """Return these with that many documents before them: ``ends`` is shifted."""
        return replace(self, ends=self.ends + np.array([documents, 0]))

    @staticmethod
    def concatenate(parts: "Sequence[Rows]") -> "Rows":
        """Return those of several, concatenated."""
        if len(parts) == 1:
            return parts[0]
        columns: dict[str, object] = {}
        for name in Rows.__dataclass_fields__:
            arrays = [getattr(part, name) for part in parts]
            if isinstance(arrays[0], list):
                columns[name] = [value for column in arrays for value in column]
            else:
                columns[name] = None if arrays[0] is None else np.concatenate(arrays)
        return Rows(**columns)  # type: ignore[arg-type]


def sums_before(counts: Ints) -> Ints:
    """Return how many there are before each, and in all."""
    return np.append(0, np.cumsum(counts))


# --- texts ----------------------------------------------------------------------------------------


def pack(
    batches: Iterable[EncodedDocuments], packing: Packing, start: Position = BEGINNING
) -> Iterator[Rows]:
    """Yield sequences that cross documents, wherever one batch ends and another begins.

    ``batches`` begin with the document of index start.document_index. Raises ValueError for a start
    inside a document that is not that long.
    """
    index, token = start
    pending: EncodedDocuments | None = None
    for batch in batches:
        pending = pending.followed_by(batch) if pending else batch
        if token and len(pending.lengths) and token >= pending.lengths[0]:
            raise _no_such_start(start)
        rows, (complete, token) = rows_of_texts(pending, token, packing, last=False)
        yield rows.shifted_by(index)
        index, pending = index + complete, pending.from_document(complete)
    if pending and len(pending.lengths):
        yield rows_of_texts(pending, token, packing, last=True)[0].shifted_by(index)


def _no_such_start(start: Position) -> ValueError:
    return ValueError(
        f"packing cannot start at token {start.token} of document {start.document_index}, where no "
        "sequence ends: the corpus or the tokenizer was changed"
    )


def rows_of_texts(
    batch: EncodedDocuments, token: int, packing: Packing, last: bool
) -> tuple[Rows, Position]:
    """Return the sequences of a batch from a token of its first document on, and the Position after
    them; unless it is the ``last`` batch, without those that have room left.
    """
    planned = plan(batch.lengths.tolist(), token, packing, last)
    document_of_piece, piece_lengths, has_between, has_end, pieces, ends = planned
    P, R, C = len(piece_lengths), len(pieces), int(piece_lengths.sum())
    widths = piece_lengths + len(packing.between) * has_between + len(packing.end) * has_end
    affixes = len(packing.prefix) + len(packing.suffix)
    row_of, first_piece = np.repeat(np.arange(R), pieces), sums_before(pieces)
    width_sums = sums_before(widths)
    row_starts = width_sums[first_piece] + affixes * np.arange(R + 1)  # [R+1] of each sequence
    leading_width = len(packing.prefix) + len(packing.between) * has_between
    piece_starts = width_sums[:-1] + affixes * row_of + leading_width  # [P]
    # Tokens are taken in order, so all that is needed is where each one goes.
    token_numbers = np.arange(C)
    taken_tokens = slice(token, token + C)
    first_token = sums_before(piece_lengths)
    destinations = token_numbers + np.repeat(piece_starts - first_token[:-1], piece_lengths)
    ids, starts, text_ends, is_word_start = batch.tokens.part(taken_tokens)
    input_ids = np.empty(row_starts[-1], np.int32)
    char_starts = np.full(row_starts[-1], -1, np.int32)
    word_starts = np.zeros(row_starts[-1], np.bool_)
    input_ids[destinations], word_starts[destinations] = ids, is_word_start
    for number, special in enumerate(packing.prefix):
        input_ids[row_starts[:-1] + number] = special
    for number, special in enumerate(reversed(packing.suffix), start=1):
        input_ids[row_starts[1:] - number] = special
    for special in packing.between:  # one token or none
        input_ids[piece_starts[has_between] - 1] = special
    for special in packing.end:
        input_ids[(piece_starts + piece_lengths)[has_end]] = special
    spans = np.zeros((P, 2), np.int64)
    spans[:, 0], spans[:, 1] = starts[first_token[:-1]], text_ends[first_token[1:] - 1]
    characters = sums_before(spans[:, 1] - spans[:, 0] + len(PIECE_SEPARATOR))
    shifts = characters[:-1] - np.repeat(characters[first_piece[:-1]], pieces) - spans[:, 0]
    char_starts[destinations] = starts + np.repeat(shifts, piece_lengths).astype(np.int32)
    documents = batch.documents
    cuts = zip(document_of_piece.tolist(), *spans.T.tolist(), strict=True)
    parts = [documents[number].text[begin:end] for number, begin, end in cuts]
    bounds = first_piece.tolist()
    texts = [parts[a] if b - a == 1 else join_texts(parts[a:b]) for a, b in pairwise(bounds)]
    leading = document_of_piece[first_piece[:-1]].tolist()
    trained, lost = None, np.zeros(R, np.int64)
    if (marks := batch.marks) is not None:
        special_places = destinations[marks.special[taken_tokens]]
        char_starts[special_places], word_starts[special_places] = -1, False
        lost = marks.lost[leading]
        # What stands beside a document is trained if its own text is.
        trained = np.zeros(row_starts[-1], np.bool_)
        document_trained = marks.trained_beside[document_of_piece]
        trained[destinations] = marks.trained[taken_tokens]
        for place in range(len(packing.prefix)):
            trained[row_starts[:-1] + place] = document_trained[first_piece[:-1]]
        for place in range(1, len(packing.suffix) + 1):
            trained[row_starts[1:] - place] = document_trained[first_piece[1:] - 1]
        for _ in packing.between:
            preceding_pieces = np.flatnonzero(has_between) - 1
            trained[piece_starts[has_between] - 1] = document_trained[preceding_pieces]
        for _ in packing.end:
            trained[(piece_starts + piece_lengths)[has_end]] = document_trained[has_end]
    rows = _make_rows(
        lengths=np.diff(row_starts),
        input_ids=input_ids,
        char_starts=char_starts,
        word_starts=word_starts,
        token_types=None,
        pieces=pieces,
        document_starts=(piece_starts - row_starts[row_of]).astype(np.int32),
        documents=[documents[number] for number in leading],
        spans=spans[first_piece[:-1]],
        texts=texts,
        lost=lost,
        ends=ends,
        trained=trained,
    )
    return rows, Position(*ends[-1].tolist()) if R else Position(0, token)


def join_texts(parts: Sequence[str]) -> str:
    """Return the joined texts of pieces; "" if these are tokens without a text."""
    return PIECE_SEPARATOR.join(parts) if any(parts) else ""


# --- pairs ----------------------------------------------------------------------------------------


def rows_of_pairs(documents: list[Document], encoded: EncodedPairs) -> Rows:
    """Return one sequence per pair, joined by the tokenizer; none for a pair without a token. What
    was cut of a pair is in no sequence.
    """
    content = encoded.text_of >= 0
    row_of = np.repeat(np.arange(len(documents)), encoded.lengths)
    char_starts = np.full(len(content), -1, np.int32)
    word_starts = np.zeros(len(content), np.bool_)
    tokens, kept_lengths = encoded.texts.tokens, encoded.texts.lengths
    second_text_starts = [len(document.text) + len(PIECE_SEPARATOR) for document in documents]
    shifts = np.array(second_text_starts, np.int32).repeat(2)
    shifts[0::2] = 0
    char_starts[content] = tokens.starts + np.repeat(shifts, kept_lengths)
    word_starts[content] = tokens.word_starts
    has_content = np.zeros(len(documents), np.bool_)
    has_content[row_of[content]] = True
    is_kept = has_content[row_of]
    first_content = np.searchsorted(row_of[content], np.flatnonzero(has_content))
    row_starts = sums_before(encoded.lengths)[:-1][has_content]
    starts = np.flatnonzero(content)[first_content] - row_starts
    kept = [document for document, has in zip(documents, has_content.tolist(), strict=True) if has]
    spans = [(0, len(document.text)) for document in kept]
    ends = np.flatnonzero(has_content) + 1
    return _make_rows(
        lengths=encoded.lengths[has_content],
        input_ids=encoded.ids[is_kept],
        char_starts=char_starts[is_kept],
        word_starts=word_starts[is_kept],
        token_types=encoded.types[is_kept],
        pieces=np.ones(len(kept), np.int64),
        document_starts=starts.astype(np.int32),
        documents=kept,
        spans=np.array(spans, np.int64).reshape(-1, 2),
        texts=[PIECE_SEPARATOR.join(document.texts) for document in kept],
        lost=encoded.lost[has_content],
        ends=np.stack([ends, np.zeros_like(ends)], axis=1),
    )


def in_chunks(parts: Iterable[Rows], size: int, limit: int | None = None) -> Iterator[Rows]:
    """Yield the sequences in chunks of ``size``, the last one smaller; at most ``limit`` of them,
    taking no more parts than these need.
    """
    chunk: list[Rows] = []
    count = 0
    remaining = sys.maxsize if limit is None else limit
    for rows in parts:
        first = 0
        while first < len(rows) and remaining:
            last = min(first + min(size - count, remaining), len(rows))
            chunk.append(rows.part(first, last))
            count, remaining, first = count + last - first, remaining - (last - first), last
            if count == size:
                yield Rows.concatenate(chunk)
                chunk, count = [], 0
        if not remaining:
            break
    if chunk:
        yield Rows.concatenate(chunk)


# --- for texts and pairs --------------------------------------------------------------------------


def _make_rows(
    *,
    lengths: Ints,
    input_ids: NDArray[np.int32],
    documents: list[Document],
    texts: list[str],
    trained: NDArray[np.bool_] | None = None,
    **columns: object,
) -> Rows:
    """Return those sequences, of the first token's ``documents``."""
    buckets = [_bucket(document.id) for document in documents]
    return Rows(
        lengths=lengths,
        input_ids=input_ids,
        documents=[document.id for document in documents],
        domains=[document.domain for document in documents],
        groups=[document.group for document in documents],
        buckets=np.array(buckets, np.uint16),
        texts=texts,
        digests=digests_of(lengths, input_ids, texts, trained),
        trained=trained,
        **columns,  # type: ignore[arg-type]
    )


def digests_of(
    lengths: Ints,
    input_ids: NDArray[np.int32],
    texts: list[str],
    trained: NDArray[np.bool_] | None,
) -> list[str]:
    """Return the identity of each of those sequences, as ``Rows`` describes it."""
    content = input_ids.astype("<i4", copy=False).view(np.uint8).data
    digests = []
    bounds = pairwise(accumulate((4 * lengths).tolist(), initial=0))
    for (a, b), text in zip(bounds, texts, strict=True):
        state = xxhash.xxh3_128(content[a:b])
        state.update(text.encode("utf-8", "surrogatepass"))
        if trained is not None and not (is_trained := trained[a // 4 : b // 4]).all():
            state.update(np.packbits(is_trained).data)
        digests.append(state.hexdigest())
    return digests


def _bucket(document: str) -> int:
    return int(xxhash.xxh3_64_intdigest(document.encode("utf-8", "surrogatepass"))) % BUCKETS
