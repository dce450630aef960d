"""``train.batching: similar_lengths``: texts of about one length share a batch, hardly padded.

The shuffled order is cut into windows of steps. A window reads the very sequences it would read
shuffled; they are sorted by length, cut into batches, and the batches come in an order drawn anew.
What a step reads follows from (seed, step) and the lengths, so it is the same for every number of
processes and wherever a run goes on; memory is that of one window.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import xxhash

from rekindle.data.batch import Ints
from rekindle.data.permutation import permute

STEPS = 64  # of a window, at most: from there on less padding than a few per cent is left to save
WINDOWS = 4  # of a stretch, where it has so many steps: who shares a batch must change
KEPT = 3  # windows that are remembered: reading threads are about the edge of two


def window_of(step: int, first: int, stop: int) -> range:
    """Return the window that ``step`` is in, of the stretch of steps from ``first`` to ``stop``:
    all are about equally long, at most STEPS.
    """
    count = stop - first
    windows = max(-(-count // STEPS), min(WINDOWS, count))
    # Window w begins at ⌊w · count / windows⌋: the last one that begins at the step or before.
    number = ((step - first + 1) * windows - 1) // count
    return range(first + number * count // windows, first + (number + 1) * count // windows)


def turns(window: range, *seed: int) -> Ints:
    """Return, for each step of a window, which of its batches it reads; 0 has the longest texts.

    The first window begins with those: a batch that does not fit into memory shows at once.
    """
    own = xxhash.xxh3_64_intdigest("\0".join(["similar lengths", *map(str, seed)]).encode())
    places = np.arange(len(window), dtype=np.int64)
    found = permute(places, len(window), seed=own, epoch=window.start)
    if window.start == 0:
        longest = int(np.argmin(found))
        found[[0, longest]] = found[[longest, 0]]
    return found


def dealt(lengths: Ints, sizes: Sequence[int], order: Ints) -> list[Ints]:
    """Return which of the sequences of ``lengths`` [B] each step of a window reads, the longest
    first. ``sizes``: how many those are, by step; ``order``: of ``turns``.
    """
    by_length = np.argsort(-lengths, kind="stable")
    steps = np.argsort(order)  # the step that reads the longest, the next ones, …
    ends = np.cumsum(np.asarray(sizes, np.int64)[steps])
    parts = np.split(by_length, ends[:-1])
    return [parts[turn] for turn in order.tolist()]


def padded(lengths: Ints, batch: int, micro_batch: int | None = None) -> dict[str, float]:
    """Return, by ``train.batching``, how many tokens a model computes for each of the text, as far
    as ``lengths`` [N] of some sequences tell: every row of a pass is as wide as its longest.

    ``micro_batch``: rows of a pass; they are cut in order of length out of a batch.
    """
    drawn = np.random.default_rng(0).choice(np.maximum(lengths, 1), (STEPS, batch))
    sorted_ = np.sort(drawn, axis=None).reshape(STEPS, batch)
    size = micro_batch or batch
    each = {"shuffled": np.sort(drawn, axis=1), "similar_lengths": sorted_}
    found = {}
    for name, rows in each.items():
        parts = np.split(rows[:, ::-1], range(size, batch, size), axis=1)
        found[name] = sum(float(part[:, 0].sum()) * part.shape[1] for part in parts) / drawn.sum()
    return found


class Windows:
    """The windows that were asked for last, each made once; threads may ask together."""

    def __init__(self, make: Callable[[range], list[Ints]]):
        self._make = make
        self._kept: deque[tuple[range, list[Ints]]] = deque(maxlen=KEPT)
        self._making = threading.Lock()

    def at(self, step: int, window: Callable[[int], range]) -> Ints:
        """What ``step`` reads; ``window(step)`` says in which window it is."""
        with self._making:
            for steps, parts in self._kept:
                if step in steps:
                    return parts[step - steps.start]
            steps = window(step)
            parts = self._make(steps)
            self._kept.append((steps, parts))
            return parts[step - steps.start]
