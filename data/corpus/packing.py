"""Where sequences begin and end in documents, and how many a shard has: pure index arithmetic, no
text, no input or output.

Three packings. "document": no sequence crosses a document. "contiguous": documents follow each
other and fill every sequence but the last. "packed": the sequences of "document" follow each other
in rows, each whole. Packing can begin at any Position it has given, and then gives exactly the
remaining sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.tokenizer import Tokenizer

Ints = NDArray[np.int64]
PackingName = Literal["document", "contiguous", "packed"]
MIN_SHARD_SIZE, MAX_SHARD_SIZE = 64, 4096  # sequences in a shard, if the configuration does not say
MIN_SHARDS = 16  # least number for a corpus that is neither very small nor large


class Position(NamedTuple):
    """Where the next sequence begins: a token of the document_index-th document of the corpus."""

    document_index: int
    token: int


BEGINNING = Position(0, 0)


@dataclass(frozen=True)
class Packing:
    """How sequences are formed: ``room`` for tokens of text and separators, within ``prefix`` and
    ``suffix``. ``between`` two documents of a sequence, and as the ``end`` of each, there is a
    token or none. ``one_document``: no sequence crosses a document.
    ``joins_rows``: these then follow each other in rows.
    """

    room: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    between: tuple[int, ...]
    end: tuple[int, ...]
    one_document: bool
    joins_rows: bool = False


def packing_of(
    tokenizer: Tokenizer,
    sequence_length: int,
    packing: PackingName,
    end_of_text: bool = True,
) -> Packing:
    """Return how documents become sequences. No token of a document is dropped; a document without
    tokens gives nothing.

    document: every document is cut into pieces of sequence_length − |prefix| − |suffix| tokens; the
    last may be shorter. A tokenizer that puts nothing after a text (GPT-2; Llama, which puts <s>
    before it) but has an end-of-sequence token gets it after each document: it tells a causal LM
    that a text ends. Without ``end_of_text``, as corpora were packed before format 3, only if it
    puts nothing before a text either. contiguous: documents are joined with the end-of-sequence
    token after each, or, if the suffix ends with that token or there is none, with the suffix's
    last token between two of them. In both, an end-of-sequence token that would begin a sequence is
    left out, as there is nothing before it. packed: like document; ``joining.py`` says what happens
    to the sequences then.

    Raises ValueError for an unknown packing and a sequence_length without room for content.
    """
    special = len(tokenizer.prefix) + len(tokenizer.suffix)
    if sequence_length <= special:
        raise ValueError(
            f"sequence_length {sequence_length} leaves no room for text beside the {special} "
            "special tokens of each sequence"
        )
    if packing not in get_args(PackingName):
        raise ValueError(f"packing must be one of {get_args(PackingName)}, not {packing!r}")
    one_document = packing != "contiguous"
    between, end = document_separators(tokenizer)
    if one_document:
        between, end = (), document_end(tokenizer, end_of_text)
    room = sequence_length - special
    joins_rows = packing == "packed"
    return Packing(room, tokenizer.prefix, tokenizer.suffix, between, end, one_document, joins_rows)


def document_end(tokenizer: Tokenizer, end_of_text: bool) -> tuple[int, ...]:
    """Return what comes after each document if no sequence crosses one; see ``packing_of``."""
    if tokenizer.suffix or tokenizer.eos_id is None:
        return ()
    return (tokenizer.eos_id,) if end_of_text or not tokenizer.prefix else ()


def lacks_end(tokenizer: Tokenizer) -> bool:
    """Return whether it has an end-of-sequence token, begins a text and does not end it (Llama)."""
    return bool(tokenizer.prefix) and bool(document_end(tokenizer, end_of_text=True))


def document_separators(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens between two documents of one sequence, and those after each document."""
    last_of_suffix = tokenizer.suffix[-1:]
    if tokenizer.eos_id is None or (tokenizer.eos_id,) == last_of_suffix:
        return last_of_suffix, ()
    return (), (tokenizer.eos_id,)


class Plan(NamedTuple):
    """R sequences, of P pieces in all, which take the tokens of consecutive documents.

    document_of_piece, piece_lengths [P]: a piece's document, and its number of tokens; has_between,
    has_end [P] bool: whether ``between`` comes before it, and ``end`` after it. pieces [R]: the
    number of pieces of each sequence; ends [R,2]: the Position after each.
    """

    document_of_piece: Ints
    piece_lengths: Ints
    has_between: NDArray[np.bool_]
    has_end: NDArray[np.bool_]
    pieces: Ints
    ends: Ints


def plan(lengths: Sequence[int], token: int, packing: Packing, last: bool) -> Plan:
    """Return the sequences of documents with that many tokens, from a token of the first one on.

    Unless these documents are the ``last`` ones, sequences with room left are not included.
    """
    places: list[tuple[int, int, bool, bool]] = []
    pieces: list[int] = []
    ends: list[tuple[int, int]] = []
    between, end = len(packing.between), len(packing.end)
    room_left, piece_count, position = packing.room, 0, (0, 0)  # of the open sequence; its end
    for document, length in enumerate(lengths):
        while token < length:
            before = between if piece_count else 0
            if room_left <= before:  # no room for a separator and a token after it
                pieces.append(piece_count)
                ends.append((document, token))
                room_left, piece_count, before = packing.room, 0, 0
            stop = min(token + room_left - before, length)
            room_left -= before + stop - token
            after = end if room_left else 0
            room_left -= after
            places.append((document, stop - token, before > 0, after > 0))
            piece_count, token = piece_count + 1, stop
            position = (document, token) if token < length else (document + 1, 0)
            if not room_left or (packing.one_document and token == length):
                pieces.append(piece_count)
                ends.append(position)
                room_left, piece_count = packing.room, 0
        token = 0
    if piece_count and last:
        pieces.append(piece_count)
        ends.append(position)
    planned = np.array(places[: sum(pieces)], np.int64).reshape(-1, 4)
    document_of, tokens, *marks = planned.T
    before_of, after_of = (mark.astype(np.bool_) for mark in marks)
    counts, positions = np.array(pieces, np.int64), np.array(ends, np.int64).reshape(-1, 2)
    return Plan(document_of, tokens, before_of, after_of, counts, positions)


def next_fit(lengths: Sequence[int], room: int, keys: Sequence[object]) -> list[int]:
    """Return how many of the sequences of ``lengths`` are in each row of at most ``room`` tokens:
    each joins the row of the one before it if there is room and both have the same value in
    ``keys``.
    """
    counts: list[int] = []
    room_left, key = -1, object()  # of no row
    for length, own_key in zip(lengths, keys, strict=True):
        if length > room_left or own_key != key:
            counts.append(0)
            room_left, key = room, own_key
        counts[-1] += 1
        room_left -= length
    return counts


def default_shard_size(sequences: int | None) -> int:
    """Return how many sequences a shard has in a new corpus of about that many; MAX_SHARD_SIZE if
    unknown.

    A shard is the unit of work, and of what a kill loses: a small corpus has small shards.
    """
    if sequences is None:
        return MAX_SHARD_SIZE
    size = MIN_SHARD_SIZE
    while size < MAX_SHARD_SIZE and 2 * size * MIN_SHARDS <= sequences:
        size *= 2
    return size
