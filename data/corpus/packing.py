"""Cuts or joins documents into sequences: pure index arithmetic, no input or output.

Two packings. "document": no sequence crosses a document. "contiguous": documents follow each other
and fill every sequence but the last. Documents that are pairs of texts are a sequence each. Packing
can begin at any Position it has yielded and then gives exactly the remaining sequences.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.tokenizer import Encoded, EncodedPair, Tokenizer
from rekindle.data.source.documents import Document

PIECE_SEPARATOR = "\n\n"  # between the texts of two documents in one sequence


class Sequence(NamedTuple):
    """L tokens for the model, special ones included, L ≤ sequence_length.

    input_ids [L] int32. char_starts [L] int32: where the token's text starts in ``text``, −1 for
    special tokens. word_starts [L] bool: False for special tokens, and for a first token that goes
    on with a word of the sequence before. document, domain: of the first token's document; span:
    the characters of that document. text: the sequence's own text, the documents' parts joined by
    a blank line. document_starts [D] int32: positions where a document begins or is resumed.
    token_types [L] int32: the segments of a pair, of which ``span`` is the first text's and
    ``text`` has both whole, whatever was cut of their tokens; None of other sequences. lost: the
    tokens of a pair that were cut.
    """

    input_ids: NDArray[np.int32]
    char_starts: NDArray[np.int32]
    word_starts: NDArray[np.bool_]
    document: str
    domain: str | None
    span: tuple[int, int]
    text: str
    document_starts: NDArray[np.int32]
    token_types: NDArray[np.int32] | None = None
    lost: int = 0


class Position(NamedTuple):
    """Where the next sequence begins: a token of the document_index-th document of the corpus."""

    document_index: int
    token: int


BEGINNING = Position(0, 0)


class _Piece(NamedTuple):
    """Tokens begin:end of one document, and the special tokens just before and after them."""

    document: Document
    encoded: Encoded
    begin: int
    end: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


_Planned = tuple[list[_Piece], Position]
_Left = tuple[int, int, Document, Encoded]  # index, first token, document, its tokens


def pack_documents(
    documents: Iterable[Document],
    *,
    sequence_length: int,
    packing: Literal["document", "contiguous"],
    tokenizer: Tokenizer,
    pairs: bool,
    start: Position = BEGINNING,
    end_of_text: bool = True,
) -> Iterator[tuple[Sequence, Position]]:
    """The sequences of ``documents``, which are pairs of texts or single ones, as ``pack_pairs`` or
    ``pack`` make them.
    """
    if pairs:
        return pack_pairs(tokenizer.encode_pairs(documents, sequence_length), start)
    return pack(
        tokenizer.encode_documents(documents),
        sequence_length=sequence_length,
        packing=packing,
        tokenizer=tokenizer,
        start=start,
        end_of_text=end_of_text,
    )


def pack_pairs(
    documents: Iterable[tuple[Document, EncodedPair]], start: Position = BEGINNING
) -> Iterator[tuple[Sequence, Position]]:
    """A sequence of each pair, as the tokenizer joined it, and the Position after it; nothing of a
    pair without a token. What was cut of a pair is in no sequence.

    ``documents`` begins with the document of index start.document_index.
    """
    for index, (document, encoded) in enumerate(documents, start.document_index):
        if (encoded.of >= 0).any():
            yield _pair(document, encoded), Position(index + 1, 0)


def _pair(document: Document, encoded: EncodedPair) -> Sequence:
    char_starts = np.full(len(encoded.ids), -1, np.int32)
    word_starts = np.zeros(len(encoded.ids), np.bool_)
    before = 0
    for number, (text, part) in enumerate(zip(document.texts, encoded.parts, strict=True)):
        here = encoded.of == number
        char_starts[here] = part.starts + before
        word_starts[here] = part.word_starts
        before += len(text) + len(PIECE_SEPARATOR)
    return Sequence(
        input_ids=encoded.ids,
        char_starts=char_starts,
        word_starts=word_starts,
        document=document.id,
        domain=document.domain,
        span=(0, len(document.text)),
        text=PIECE_SEPARATOR.join(document.texts),
        document_starts=np.flatnonzero(encoded.of >= 0)[:1].astype(np.int32),
        token_types=encoded.types,
        lost=encoded.lost,
    )


def pack(
    documents: Iterable[tuple[Document, Encoded]],
    *,
    sequence_length: int,
    packing: Literal["document", "contiguous"],
    tokenizer: Tokenizer,
    start: Position = BEGINNING,
    end_of_text: bool = True,
) -> Iterator[tuple[Sequence, Position]]:
    """Each sequence of ``documents``, and the Position from which packing would go on after it.

    ``documents`` begins with the document of index start.document_index. No token of a document is
    dropped; a document without tokens gives nothing.

    document: every document is cut into pieces of sequence_length − |prefix| − |suffix| tokens, the
    last as short as it comes. A tokenizer that puts nothing after a text (GPT-2; Llama, which puts
    <s> before it) but has an end-of-sequence token gets it after each document: it is what tells a
    causal LM that a text ends. Without ``end_of_text``, as corpora were packed before format 3,
    only one that puts nothing before a text either.
    contiguous: documents are joined with the end-of-sequence token after each, or, where the suffix
    ends with that token or there is none, with the suffix's last token between two of them.
    In both an end-of-sequence token that would be the first of a sequence is left out: nothing
    stands before it there.

    Raises ValueError for an unknown packing, a sequence_length without room for content, and a
    start inside a document that is not that long.
    """
    room = sequence_length - len(tokenizer.prefix) - len(tokenizer.suffix)
    if room < 1:
        raise ValueError(
            f"sequence_length {sequence_length} leaves no room for text beside the "
            f"{len(tokenizer.prefix) + len(tokenizer.suffix)} special tokens of each sequence"
        )
    if packing not in ("document", "contiguous"):
        raise ValueError(f"packing must be 'document' or 'contiguous', not {packing!r}")
    left = _from_start(documents, start)
    if packing == "contiguous":
        planned = _fill(left, room, *document_separators(tokenizer))
    else:
        end = document_end(tokenizer, end_of_text)
        planned = chain.from_iterable(_fill([one], room, (), end) for one in left)
    return ((_sequence(pieces, tokenizer), position) for pieces, position in planned)


def document_end(tokenizer: Tokenizer, end_of_text: bool) -> tuple[int, ...]:
    """What comes after each document where no sequence crosses one; see ``pack``."""
    if tokenizer.suffix or tokenizer.eos_id is None:
        return ()
    return (tokenizer.eos_id,) if end_of_text or not tokenizer.prefix else ()


def lacks_end(tokenizer: Tokenizer) -> bool:
    """Whether it has an end-of-sequence token, begins a text and does not end it (Llama)."""
    return bool(tokenizer.prefix) and bool(document_end(tokenizer, end_of_text=True))


def document_separators(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens between two documents of one sequence, and those after each document."""
    last_of_suffix = tokenizer.suffix[-1:]
    if tokenizer.eos_id is None or (tokenizer.eos_id,) == last_of_suffix:
        return last_of_suffix, ()
    return (), (tokenizer.eos_id,)


def _from_start(documents: Iterable[tuple[Document, Encoded]], start: Position) -> Iterator[_Left]:
    """Every document that has tokens left."""
    for index, (document, encoded) in enumerate(documents, start.document_index):
        first = start.token if index == start.document_index else 0
        if first and first >= len(encoded.ids):
            raise ValueError(
                f"packing cannot start at token {first} of document {index} ({document.id}), "
                f"which has {len(encoded.ids)} tokens: the corpus or the tokenizer was changed"
            )
        if len(encoded.ids):
            yield index, first, document, encoded


def _fill(
    documents: Iterable[_Left], room: int, between: tuple[int, ...], end: tuple[int, ...]
) -> Iterator[_Planned]:
    """Cut documents into sequences that follow each other; the last one may be short."""
    pieces: list[_Piece] = []
    left, position = room, BEGINNING
    for index, token, document, encoded in documents:
        length = len(encoded.ids)
        while token < length:
            before = between if pieces else ()
            if left <= len(before):  # no room for a separator and a token after it
                yield pieces, Position(index, token)
                pieces, left, before = [], room, ()
            left -= len(before)
            stop = min(token + left, length)
            left -= stop - token
            after = end if left else ()
            left -= len(after)
            pieces.append(_Piece(document, encoded, token, stop, before, after))
            token = stop
            position = Position(index, token) if token < length else Position(index + 1, 0)
            if not left:
                yield pieces, position
                pieces, left = [], room
    if pieces:
        yield pieces, position


def _sequence(pieces: list[_Piece], tokenizer: Tokenizer) -> Sequence:
    content = sum(p.end - p.begin + len(p.before) + len(p.after) for p in pieces)
    length = len(tokenizer.prefix) + content + len(tokenizer.suffix)
    input_ids = np.empty(length, np.int32)
    char_starts = np.full(length, -1, np.int32)
    word_starts = np.zeros(length, np.bool_)
    document_starts = np.empty(len(pieces), np.int32)
    texts: list[str] = []
    characters = 0
    at = _put(input_ids, 0, tokenizer.prefix)
    for number, piece in enumerate(pieces):
        at = _put(input_ids, at, piece.before)
        document_starts[number] = at
        tokens = slice(piece.begin, piece.end)
        here = slice(at, at + piece.end - piece.begin)
        begin, end = _span(piece)
        input_ids[here] = piece.encoded.ids[tokens]
        char_starts[here] = piece.encoded.starts[tokens] + (characters - begin)
        word_starts[here] = piece.encoded.word_starts[tokens]
        texts.append(piece.document.text[begin:end])
        characters += end - begin + len(PIECE_SEPARATOR)
        at = _put(input_ids, here.stop, piece.after)
    _put(input_ids, at, tokenizer.suffix)
    first = pieces[0]
    return Sequence(
        input_ids=input_ids,
        char_starts=char_starts,
        word_starts=word_starts,
        document=first.document.id,
        domain=first.document.domain,
        span=_span(first),
        text=PIECE_SEPARATOR.join(texts),
        document_starts=document_starts,
    )


def _put(input_ids: NDArray[np.int32], at: int, special: tuple[int, ...]) -> int:
    input_ids[at : at + len(special)] = special
    return at + len(special)


def _span(piece: _Piece) -> tuple[int, int]:
    return int(piece.encoded.starts[piece.begin]), int(piece.encoded.ends[piece.end - 1])
