"""The sequences to train on and those to hold out: a few stretches of whole documents, spread over
a corpus.

Takes constant memory and a bounded number of reads for any number of sequences: a side is a short
list of ranges, and only rows near the ends of stretches are read. A corpus is split addition by
addition (``data/corpus/additions.py``): when it grows, what was held out stays held out, and what
was trained on stays so too.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rekindle.data.cache import Cache
from rekindle.data.corpus.columns import GROUP
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.seal import REPAIR

Range = tuple[int, int]  # from, up to but not including

PLACES = 64  # of an addition at which a stretch may be held out
# of an addition: if documents would be more than this, hold out sequences instead
MOST_DOCUMENTS = 0.25


class Ranges:
    """Ascending, disjoint ranges of sequence numbers, used like one long index array."""

    def __init__(self, ranges: Iterable[Range] | NDArray[np.int64]):
        array = ranges if isinstance(ranges, np.ndarray) else np.array(list(ranges), np.int64)
        bounds = array.reshape(-1, 2)
        bounds = bounds[bounds[:, 1] > bounds[:, 0]]
        if (bounds[:-1, 1] > bounds[1:, 0]).any():
            raise ValueError(f"ranges must ascend and not overlap, got {bounds[:8].tolist()}")
        self.bounds: NDArray[np.int64] = bounds  # [R,2]
        self._places = np.concatenate([[0], np.cumsum(bounds[:, 1] - bounds[:, 0])])

    @classmethod
    def of(cls, numbers: NDArray[np.int64]) -> "Ranges":
        """Return the ranges of ascending, distinct sequence numbers [B]."""
        return cls(np.stack([numbers, numbers + 1], axis=1)).joined()

    def __len__(self) -> int:
        return int(self._places[-1])

    def __repr__(self) -> str:
        return f"Ranges({self.bounds.tolist()})"

    def select(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequence numbers [B] at ``places`` [B] (0 ≤ place < len); IndexError
        outside.
        """
        if not len(places):
            return np.zeros(0, np.int64)
        if places.min() < 0 or places.max() >= len(self):
            raise IndexError(
                f"places lie in 0..{len(self) - 1}, got {places.min()}..{places.max()}"
            )
        range_index = np.searchsorted(self._places, places, side="right") - 1
        return self.bounds[range_index, 0] + (places - self._places[range_index])

    def spread(self, count: int) -> NDArray[np.int64]:
        """Return at most ``count`` of the sequence numbers, evenly over all of them, ascending."""
        count = min(count, len(self))
        return self.select(np.array([i * len(self) // count for i in range(count)], np.int64))

    def joined(self) -> "Ranges":
        """Return the same numbers, with adjacent ranges joined."""
        begins = np.append(True, self.bounds[1:, 0] != self.bounds[:-1, 1])[: len(self.bounds)]
        ends = np.append(begins[1:], True)[: len(self.bounds)]
        return Ranges(np.stack([self.bounds[begins, 0], self.bounds[ends, 1]], axis=1))

    def complement(self, size: int) -> "Ranges":
        """Return the rest of 0..size-1."""
        edges = np.concatenate([[0], self.bounds.reshape(-1), [size]])
        return Ranges(edges.reshape(-1, 2))

    def intersection(self, other: "Ranges") -> "Ranges":
        """Return what is in both."""
        own_bounds, other_bounds = self.bounds, other.bounds
        first_other = np.searchsorted(other_bounds[:, 1], own_bounds[:, 0], side="right")
        counts = np.maximum(np.searchsorted(other_bounds[:, 0], own_bounds[:, 1]) - first_other, 0)
        # of each pair of ranges that meet: the index in `own_bounds`, and in `other_bounds`
        own_index = np.repeat(np.arange(len(own_bounds)), counts)
        earlier = np.repeat(np.cumsum(counts) - counts, counts)
        other_index = np.repeat(first_other, counts) + np.arange(len(own_index)) - earlier
        start = np.maximum(own_bounds[own_index, 0], other_bounds[other_index, 0])
        stop = np.minimum(own_bounds[own_index, 1], other_bounds[other_index, 1])
        return Ranges(np.stack([start, stop], axis=1))


@dataclass(frozen=True)
class Split:
    """The sequences to train on and those to evaluate on.

    Together they are the corpus, except for sequences with parts of two documents, one of either
    side (with ``contiguous`` packing, at the ends of a stretch): those are on neither side.
    """

    train: Ranges
    held_out: Ranges


def group_numbers(corpus: Corpus) -> NDArray[np.int64]:
    """Return the group [N] of each sequence of a corpus with groups, numbered as they come."""
    numbers: dict[str, int] = {}
    parts = [np.zeros(0, np.int64)]
    for shard in range(len(corpus.commits)):
        for batch in corpus.shard(shard).read_unverified([GROUP]):
            encoded = batch[GROUP].dictionary_encode()
            names = encoded.dictionary.to_pylist()
            of_names = np.array(
                [numbers.setdefault(name, len(numbers)) for name in names], np.int64
            )
            parts.append(of_names[encoded.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(parts)


def split_corpus(cache: Cache, fraction: float) -> Split:
    """Hold out about ``fraction`` of the sequences, as whole documents, evenly over the corpus.

    Every run on a corpus holds out the same ones, also after it has grown; at least one document if
    there are several. If whole documents would be far too much (a corpus of one document),
    sequences are held out, whatever document they belong to. An unfinished corpus is split anew
    with every shard. In a corpus with groups (``corpus.group_field``) groups take the place of
    documents; all of them are read.
    """
    rows, held_out, not_trained = _Rows(cache.corpus), list[Range](), list[Range]()
    for span in _spans(cache.corpus) if fraction else ():
        stretches = Ranges(_whole_documents(rows, span, fraction)).joined().bounds.tolist()
        if stretches:
            held_out += [(start, rows.unshared_end(stop, span)) for start, stop in stretches]
            not_trained += [(rows.shared_start(start, span), stop) for start, stop in stretches]
        elif not held_out:  # a later addition without short documents has nothing to hold out
            held_out = _single_sequences(span, fraction)
            not_trained = list(held_out)
    split = Split(Ranges(not_trained).complement(len(cache.corpus)), Ranges(held_out))
    return _keep_groups_whole(cache.corpus, split) if cache.corpus.has_groups else split


def _keep_groups_whole(corpus: Corpus, split: Split) -> Split:
    """Return the split without the sequences of groups that began on the other side: in a corpus
    where sequences of one group are not adjacent, or that has grown.
    """
    groups = group_numbers(corpus)
    firsts = np.unique(groups, return_index=True)[1]
    is_held_out = np.zeros(len(groups), bool)
    for start, stop in split.held_out.bounds.tolist():
        is_held_out[start:stop] = True
    began_held_out = is_held_out[firsts][groups]
    train = np.flatnonzero(~(began_held_out | is_held_out))
    held_out = np.flatnonzero(began_held_out & is_held_out)
    return Split(Ranges.of(train), Ranges.of(held_out))


@dataclass(frozen=True)
class _Span:
    """The sequences of one addition to a corpus. ``cut``: its last document may continue in the
    next.
    """

    start: int
    stop: int
    cut: bool

    def __len__(self) -> int:
        return self.stop - self.start


def _spans(corpus: Corpus) -> Iterator[_Span]:
    shards = [min(addition.first_shard, len(corpus.commits)) for addition in corpus.additions]
    if shards != sorted(shards) or shards[0] < 0:
        raise CacheFormatError(
            f"{corpus.store.location}/corpus: its additions begin at shards {shards}, not one "
            f"after another. {REPAIR}"
        )
    edges = [*map(corpus.first, shards), len(corpus)]
    for addition, (start, stop) in zip(corpus.additions, pairwise(edges), strict=True):
        if stop > start:
            # Source files are read to their ends, unless there is a limit that can be raised.
            yield _Span(start, stop, cut=addition.config.get("limit_sequences") is not None)


class _Rows:
    """Finds the documents of a corpus's sequences, reading only the rows asked for."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self.unit = GROUP if corpus.has_groups else "document"
        # Only with this packing can a sequence hold more than the document of its first token.
        self.shared = corpus.info["config"].get("packing") == "contiguous"

    def _value(self, number: int, column: str) -> str | int:
        shards, rows = self.corpus.locate(np.array([number]))
        value: str | int = self.corpus.rows(int(shards[0]), int(rows[0]), 1)[column][0].as_py()
        return value

    def end_of(self, number: int, limit: int) -> int:
        """Return the first sequence after ``number`` whose first token is of another document, or
        ``limit``; reads logarithmically few rows of a long document.
        """
        document = self._value(number, self.unit)
        same, step = number, 1
        while same + step < limit and self._value(same + step, self.unit) == document:
            same, step = same + step, 2 * step
        other = min(same + step, limit)
        after = range(same + 1, other)
        return after.start + bisect_left(
            after, True, key=lambda number: self._value(number, self.unit) != document
        )

    def _resumes(self, number: int) -> bool:
        """Return whether the sequence before holds the beginning of this one's first document."""
        return self.shared and int(self._value(number, "span_start")) > 0

    def first_document(self, span: _Span) -> int:
        """Return where a span's first own document begins: a continued one was trained on
        before.
        """
        number = span.start
        if number == 0:
            return number
        before, first = (self._value(i, self.unit) for i in (number - 1, number))
        resumed = before == first or self._resumes(number)
        return self.end_of(number, span.stop) if resumed else number

    def shared_start(self, start: int, span: _Span) -> int:
        """Return the first sequence with a part of the documents that begin a stretch."""
        return start - (start > span.start and self._resumes(start))

    def unshared_end(self, stop: int, span: _Span) -> int:
        """Return the end of the stretch's sequences that hold nothing of the document after it."""
        return stop - (stop < span.stop and self._resumes(stop))


def _whole_documents(rows: _Rows, span: _Span, fraction: float) -> list[Range]:
    """Return stretches of documents at places evenly over ``span``; empty if all are far too long.

    If one is too short or too long, the next ones make up for it. If documents are longer than the
    amount due at one place, only some places hold one out.
    """
    first = rows.first_document(span)
    shared_rows = int(rows.shared)  # the sequence at each end of a stretch may be on neither side
    stretches: list[Range] = []
    shortest: Range | None = None
    held_out_count = used_count = 0
    earliest = first
    for number in range(PLACES):
        amount_due = fraction * len(span) * (number + 1) / PLACES - held_out_count
        place = first + (span.stop - first) * number // PLACES
        start = max(earliest, rows.end_of(place - 1, span.stop) if place > first else first)
        last = start + shared_rows + max(int(amount_due), 1) - 1
        if start >= span.stop:
            break
        stop = rows.end_of(min(last, span.stop - 1), span.stop)
        length = stop - start - shared_rows
        room = len(span) - used_count - shared_rows - (stop - start)
        if length < 1 or room < 1 or (span.cut and stop == span.stop):
            continue
        if shortest is None or stop - start < shortest[1] - shortest[0]:
            shortest = (start, stop)
        if length <= 2 * amount_due:  # nearer to the amount due than nothing
            stretches.append((start, stop))
            held_out_count += length
            used_count += stop - start + shared_rows
            earliest = stop
    if not stretches and shortest is not None:
        largest_allowed = max(MOST_DOCUMENTS, 4 * fraction) * len(span)
        stretches = [shortest] if shortest[1] - shortest[0] <= largest_allowed else []
    return stretches


def _single_sequences(span: _Span, fraction: float) -> list[Range]:
    """Return stretches of sequences evenly over ``span``, each in the middle of an equal part."""
    if len(span) < 2:
        return []
    count = max(1, int(fraction * len(span)))
    stretch_count = min(PLACES, count)
    length = count // stretch_count
    edges = [span.start + len(span) * i // stretch_count for i in range(stretch_count + 1)]
    starts = [(start + stop - length) // 2 for start, stop in pairwise(edges)]
    return [(start, start + length) for start in starts]
