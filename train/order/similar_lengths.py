"""``train.batching: similar_lengths``: texts of similar length share a batch, with little padding.

The shuffled order is cut into windows of steps. A window reads the same sequences as it would
shuffled; they are sorted by length, cut into batches, and the batches get a new random order. What
a step reads follows from (seed, step) and the lengths, so it is the same for every number of
processes and after a resume; memory holds one window.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import xxhash

from rekindle.data.batch import Ints
from rekindle.data.permutation import permute

STEPS = 64  # of a window, at most: with more, only a few per cent of padding is left to save
# at least this many per stretch, if it has enough steps: batches must get changing members
WINDOWS = 4
CACHED_WINDOWS = 3  # windows that are kept: reading threads are around the edge of two


def window_of(step: int, first: int, stop: int) -> range:
    """Return the window of ``step`` within the stretch of steps from ``first`` to ``stop``: all are
    about equally long, at most STEPS.
    """
    count = stop - first
    windows = max(-(-count // STEPS), min(WINDOWS, count))
    # Window w begins at ⌊w · count / windows⌋; this is the last one that begins at the step or
    # before.
    number = ((step - first + 1) * windows - 1) // count
    return range(first + number * count // windows, first + (number + 1) * count // windows)


def batch_turns(window: range, *seed: int) -> Ints:
    """Return, for each step of a window, which of its batches it reads; 0 has the longest texts.

    The first window begins with those: a batch that does not fit into memory fails at once.
    """
    order_seed = xxhash.xxh3_64_intdigest("\0".join(["similar lengths", *map(str, seed)]).encode())
    places = np.arange(len(window), dtype=np.int64)
    turns_of_steps = permute(places, len(window), seed=order_seed, epoch=window.start)
    if window.start == 0:
        longest = int(np.argmin(turns_of_steps))
        turns_of_steps[[0, longest]] = turns_of_steps[[longest, 0]]
    return turns_of_steps


def deal_batches(lengths: Ints, sizes: Sequence[int], order: Ints) -> list[Ints]:
    """Return which of the sequences of ``lengths`` [B] each step of a window reads, the longest
    first. ``sizes``: how many, by step; ``order``: from ``batch_turns``.
    """
    by_length = np.argsort(-lengths, kind="stable")
    steps = np.argsort(order)  # the step that reads the longest, the next ones, …
    ends = np.cumsum(np.asarray(sizes, np.int64)[steps])
    parts = np.split(by_length, ends[:-1])
    return [parts[turn] for turn in order.tolist()]


def padding_ratios(lengths: Ints, batch: int, micro_batch: int | None = None) -> dict[str, float]:
    """Return, by ``train.batching``, how many tokens a model computes per token of text, estimated
    from the ``lengths`` [N] of some sequences: every row of a pass is as wide as its longest.

    ``micro_batch``: rows of a pass; they are cut from a batch in order of length.
    """
    sample = np.random.default_rng(0).choice(np.maximum(lengths, 1), (STEPS, batch))
    by_length = np.sort(sample, axis=None).reshape(STEPS, batch)
    size = micro_batch or batch
    orders = {"shuffled": np.sort(sample, axis=1), "similar_lengths": by_length}
    padding = {}
    for name, rows in orders.items():
        parts = np.split(rows[:, ::-1], range(size, batch, size), axis=1)
        padding[name] = (
            sum(float(part[:, 0].sum()) * part.shape[1] for part in parts) / sample.sum()
        )
    return padding


class Windows:
    """The latest windows, each made once; threads may ask at the same time."""

    def __init__(self, make: Callable[[range], list[Ints]]):
        self._make = make
        self._cached: deque[tuple[range, list[Ints]]] = deque(maxlen=CACHED_WINDOWS)
        self._lock = threading.Lock()

    def at(self, step: int, window: Callable[[int], range]) -> Ints:
        """Return what ``step`` reads; ``window(step)`` returns its window."""
        with self._lock:
            for steps, parts in self._cached:
                if step in steps:
                    return parts[step - steps.start]
            steps = window(step)
            parts = self._make(steps)
            self._cached.append((steps, parts))
            return parts[step - steps.start]
