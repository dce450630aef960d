"""Packing ``packed``: join the sequences of single documents to rows, several in each.

In a row each sequence is what it is alone, with its own special tokens, and none is cut: a row ends
where the next sequence does not fit (next fit), or has another domain, because a row has one
domain. So a document that fits into a row lies whole in one, and each piece of a longer document is
the first of its row.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import xxhash

from rekindle.data.corpus.packing import Ints, next_fit
from rekindle.data.corpus.rows import PIECE_SEPARATOR, Rows, digests_of, join_texts, sums_before


def join_rows(parts: Iterable[Rows], room: int) -> Iterator[Rows]:
    """Yield rows of at most ``room`` tokens; ``parts`` are sequences of one document each, in
    order.

    document_starts are the positions where each document's tokens begin, its special tokens
    included. A row's document is its first one.
    """
    pending: Rows | None = None  # its last row may have room for more
    for rows in parts:
        if not len(rows):
            continue
        pending = Rows.concatenate([pending, rows]) if pending is not None else rows
        counts = next_fit(pending.lengths.tolist(), room, pending.domains)[:-1]
        if counts:
            complete = sum(counts)
            yield _join(pending.part(0, complete), counts)
            pending = pending.part(complete, len(pending))
    if pending is not None:
        yield _join(pending, [len(pending)])


def _join(rows: Rows, counts: Sequence[int]) -> Rows:
    """Return rows with that many sequences each."""
    edges = sums_before(np.array(counts, np.int64))
    firsts, lasts = edges[:-1], edges[1:] - 1
    token_starts = sums_before(rows.lengths)
    row_of = np.repeat(np.arange(len(counts)), counts)
    document_starts = token_starts[:-1] - token_starts[firsts][row_of]
    # Where each one's text begins in its row's text: sequences without text add nothing.
    sizes = np.array([len(text) + len(PIECE_SEPARATOR) for text in rows.texts], np.int64)
    characters = sums_before(sizes)
    shifts = characters[:-1] - characters[firsts][row_of]
    bounds = list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))
    texts = [join_texts(rows.texts[a:b]) for a, b in bounds]
    char_starts = rows.char_starts + np.repeat(shifts, rows.lengths).astype(np.int32)
    lengths = np.add.reduceat(rows.lengths, firsts)
    untrained = rows.untrained
    digests = digests_of(lengths, rows.input_ids, texts, rows.trained)
    for number, (a, b) in enumerate(bounds):
        if b > a + 1:  # where documents begin decides what each token sees
            digests[number] = _with_starts(digests[number], document_starts[a:b])
    return Rows(
        lengths=lengths,
        input_ids=rows.input_ids,
        char_starts=np.where(rows.char_starts < 0, np.int32(-1), char_starts),
        word_starts=rows.word_starts,
        token_types=rows.token_types,
        pieces=np.array(counts, np.int64),
        document_starts=document_starts.astype(np.int32),
        documents=[rows.documents[first] for first in firsts],
        domains=[rows.domains[first] for first in firsts],
        groups=[rows.groups[first] for first in firsts],
        spans=rows.spans[firsts],
        buckets=rows.buckets[firsts],
        texts=texts,
        digests=digests,
        lost=np.add.reduceat(rows.lost, firsts),
        ends=rows.ends[lasts],
        trained=rows.trained,
        untrained=None if untrained is None else np.add.reduceat(untrained, firsts),
    )


def _with_starts(digest: str, document_starts: Ints) -> str:
    state = xxhash.xxh3_128(bytes.fromhex(digest))
    state.update(document_starts.astype("<i8").tobytes())
    return state.hexdigest()
