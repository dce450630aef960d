"""What each training step reads, in the background: a pure function of (seed, step), whatever ran
before.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rekindle.data.batch import Batch
from rekindle.data.cache import Cache
from rekindle.data.corpus import BUCKETS
from rekindle.data.order import stream_batch


@dataclass(frozen=True)
class Split:
    """Sequence numbers to train on and to evaluate on, by document."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split_corpus(cache: Cache, fraction: float) -> Split:
    """Hold out about ``fraction`` of the documents, those with the lowest hashes; at least one.

    The same documents for every run on a corpus. Where whole documents would be far too much of it
    (a corpus of one document), every n-th sequence is held out instead.
    """
    everything = np.arange(len(cache), dtype=np.int64)
    if fraction == 0:
        return Split(everything, everything[:0])
    buckets = cache.corpus.buckets()
    held = buckets <= max(buckets.min(), math.ceil(fraction * BUCKETS) - 1)
    if held.mean() > max(0.25, 4 * fraction) or held.all():
        held[:] = False
        held[:: max(2, round(min(1 / fraction, len(held))))] = len(held) > 1
    return Split(everything[~held], everything[held])


class TrainingStream:
    """Batches of training steps, prefetched by one thread.

    ``teachers_at(step)`` says whose targets are read: those whose weight is 0 are not touched.
    """

    def __init__(
        self,
        cache: Cache,
        indices: NDArray[np.int64],
        batch_sequences: int,
        seed: int,
        teachers_at: Callable[[int], list[str]],
        masked_view: str | None,
        allow_missing: tuple[str, ...] = (),
        rank: int = 0,
        world_size: int = 1,
    ):
        self.cache, self.indices, self.batch_sequences, self.seed = (
            cache,
            indices,
            batch_sequences,
            seed,
        )
        self.teachers_at, self.masked_view = teachers_at, masked_view
        self.allow_missing = allow_missing
        self.rank, self.world_size = rank, world_size
        self.waited = 0.0  # seconds the training loop has waited for data

    def batch(self, step: int) -> Batch:
        """What this rank reads at ``step``.

        A step that reaches past an epoch's end reads on in the next, in the masks of the epoch it
        began in: one step, one replica.
        """
        parts = stream_batch(
            step,
            len(self.indices),
            self.batch_sequences,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        index = self.indices[np.concatenate([places for _, places in parts])]
        return self.cache.gather(
            index,
            self.teachers_at(step),
            epoch=parts[0][0],
            masked_view=self.masked_view,
            allow_missing=self.allow_missing,
            scalars=False,
        )

    def steps(
        self, start: int, stop: int, depth: int = 2
    ) -> Generator[tuple[int, Batch], None, None]:
        """(step, batch) for every step from ``start`` to ``stop``, read ahead by ``depth``."""
        ready: queue.Queue[tuple[int, Batch] | BaseException | None] = queue.Queue(depth)
        halt = threading.Event()

        def put(item: tuple[int, Batch] | BaseException | None) -> bool:
            while not halt.is_set():
                try:
                    ready.put(item, timeout=0.1)
                except queue.Full:
                    continue
                return True
            return False

        def read() -> None:
            try:
                for step in range(start, stop):
                    if not put((step, self.batch(step))):
                        return
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=read, name="prefetch", daemon=True)
        thread.start()
        try:
            while True:
                began = time.perf_counter()
                item = ready.get()
                self.waited += time.perf_counter() - began
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            halt.set()
            thread.join()
