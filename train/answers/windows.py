"""Cut texts into windows for a language model and choose the predicted tokens: index arithmetic.

A text is the ids [L] of its tokens, including special tokens around it. No models or files here.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Places = NDArray[np.int64]
Piece = tuple[Ids, Places]  # a piece of a text, and the places to be masked, one at a time


class Window(NamedTuple):
    """What the model sees at once: ids [L]; the places [P] whose states predict ``labels`` [P]."""

    ids: Ids
    places: Places
    labels: Places


def causal_windows(ids: Ids, window: int, stride: int) -> Iterator[Window]:
    """Yield windows of at most ``window`` tokens, each ``stride`` after the one before.

    Every token but the first is predicted once: in the first window that contains it.
    """
    predicted, begin = 1, 0
    while predicted < len(ids):
        window_ids = ids[begin : begin + window]
        targets = np.arange(predicted, begin + len(window_ids))
        yield Window(window_ids, targets - 1 - begin, ids[targets].astype(np.int64))
        predicted, begin = begin + len(window_ids), begin + stride


def masked_pieces(
    texts: Iterable[Ids], prefix: tuple[int, ...], suffix: tuple[int, ...], window: int
) -> Iterator[Piece]:
    """Yield each text in pieces of at most ``window`` tokens, special tokens around each piece
    included, with the places of the text's own tokens.
    """
    room = window - len(prefix) - len(suffix)
    for ids in texts:
        for begin in range(0, len(ids), room):
            part = ids[begin : begin + room]
            piece = np.concatenate([prefix, part, suffix]).astype(np.int32)
            yield piece, np.arange(len(part), dtype=np.int64) + len(prefix)


def draw_places(pieces: Iterable[Piece], count: int, seed: int) -> list[Piece]:
    """Return at most ``count`` of all places, drawn uniformly, grouped by piece.

    Keeps the places with the lowest random keys, so memory does not grow with the number of pieces.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    chosen: list[tuple[float, int, int, Ids]] = []  # key, number of the piece, place, its ids
    limit = np.inf
    for number, (ids, places) in enumerate(pieces):
        keys = generator.random(len(places))
        candidates = np.flatnonzero(keys < limit)
        chosen += [(float(keys[i]), number, int(places[i]), ids) for i in candidates]
        if len(chosen) > 2 * count:
            chosen = sorted(chosen, key=lambda one: one[0])[:count]
            limit = chosen[-1][0]
    chosen = sorted(chosen, key=lambda one: one[0])[:count]
    by_piece: dict[int, tuple[Ids, list[int]]] = {}
    for _, number, place, ids in sorted(chosen, key=lambda one: one[1:3]):
        by_piece.setdefault(number, (ids, []))[1].append(place)
    return [(ids, np.array(places, np.int64)) for ids, places in by_piece.values()]


def masked_windows(pieces: Iterable[Piece], mask_id: int) -> Iterator[Window]:
    """Yield one window for each place, in which only that place is masked."""
    for ids, places in pieces:
        for place in places:
            masked_ids = ids.copy()
            masked_ids[place] = mask_id
            yield Window(masked_ids, np.array([place]), np.array([ids[place]], np.int64))
