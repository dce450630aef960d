"""What a language model is shown of texts, and which tokens it predicts there: index arithmetic.

A text is the ids [L] of its tokens, special ones around it included. Knows no model and no file.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Places = NDArray[np.int64]
Piece = tuple[Ids, Places]  # of a text, and which places are to be masked, each by itself


class Window(NamedTuple):
    """What the model sees at once: ids [L]; the places [P] whose states predict ``labels`` [P]."""

    ids: Ids
    places: Places
    labels: Places


def causal_windows(ids: Ids, window: int, stride: int) -> Iterator[Window]:
    """Windows of at most ``window`` tokens, each ``stride`` after the one before.

    Every token but the first is predicted once: in the first window that it is in.
    """
    predicted, begin = 1, 0
    while predicted < len(ids):
        seen = ids[begin : begin + window]
        targets = np.arange(predicted, begin + len(seen))
        yield Window(seen, targets - 1 - begin, ids[targets].astype(np.int64))
        predicted, begin = begin + len(seen), begin + stride


def masked_pieces(
    texts: Iterable[Ids], prefix: tuple[int, ...], suffix: tuple[int, ...], window: int
) -> Iterator[Piece]:
    """Each text, without special tokens, in pieces of at most ``window`` tokens with these around
    them, and the places of the text's own tokens.
    """
    room = window - len(prefix) - len(suffix)
    for ids in texts:
        for begin in range(0, len(ids), room):
            part = ids[begin : begin + room]
            whole = np.concatenate([prefix, part, suffix]).astype(np.int32)
            yield whole, np.arange(len(part), dtype=np.int64) + len(prefix)


def drawn(pieces: Iterable[Piece], most: int, seed: int) -> list[Piece]:
    """At most ``most`` of all places, each as likely as any other, in the pieces that have them.

    Those with the lowest of evenly drawn keys: what is held does not grow with the pieces.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    kept: list[tuple[float, int, int, Ids]] = []  # key, number of the piece, place, its ids
    limit = np.inf
    for number, (ids, places) in enumerate(pieces):
        keys = generator.random(len(places))
        low = np.flatnonzero(keys < limit)
        kept += [(float(keys[i]), number, int(places[i]), ids) for i in low]
        if len(kept) > 2 * most:
            kept = sorted(kept, key=lambda one: one[0])[:most]
            limit = kept[-1][0]
    kept = sorted(kept, key=lambda one: one[0])[:most]
    by_piece: dict[int, tuple[Ids, list[int]]] = {}
    for _, number, place, ids in sorted(kept, key=lambda one: one[1:3]):
        by_piece.setdefault(number, (ids, []))[1].append(place)
    return [(ids, np.array(places, np.int64)) for ids, places in by_piece.values()]


def masked_windows(pieces: Iterable[Piece], mask_id: int) -> Iterator[Window]:
    """A window for each place, in which it alone is masked."""
    for ids, places in pieces:
        for place in places:
            seen = ids.copy()
            seen[place] = mask_id
            yield Window(seen, np.array([place]), np.array([ids[place]], np.int64))
