"""What each training step reads, in the background: a pure function of (seed, step), whatever ran
before, and on however many processes and threads. Which sequences that are, ``sequences.py`` says.
"""

import threading
import time
from collections.abc import Callable, Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from rekindle.data.batch import Batch
from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.train.order.sequences import Order

AHEAD = 2  # batches per thread: one is read while one waits
PATIENCE = 1.0  # seconds that the end of a run waits for threads that read


class TrainingStream:
    """Batches of training steps, prefetched by ``threads`` threads.

    The ``batch_sequences`` of the order are read per step by all ranks together; this one reads
    every ``world_size``-th of them from the ``rank``-th on. ``teachers_at(step)`` says whose
    targets are read: those whose weight is 0 are not touched.

    Raises InputError when there is nothing to train on, and when the world does not divide the
    batch.
    """

    def __init__(
        self,
        cache: Cache,
        order: Order,
        teachers_at: Callable[[int], Sequence[str]],
        masked_view: str | None,
        allow_missing: tuple[str, ...] = (),
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
    ):
        _check_world(len(order), order.batch_sequences, rank, world_size, threads)
        self.cache, self.order = cache, order
        self.teachers_at, self.masked_view = teachers_at, masked_view
        self.allow_missing = allow_missing
        self.rank, self.world_size, self.threads = rank, world_size, threads
        self.waited = 0.0  # seconds the training loop has waited for data

    def sequences_at(self, step: int) -> NDArray[np.int64]:
        """Return the sequence numbers [batch_sequences] that all ranks together read at ``step``,
        as a single process would. Reads nothing.
        """
        return self.order.at(step)

    def batch(self, step: int) -> Batch:
        """Read this rank's share of ``step``.

        A step that reaches past an epoch's end reads on in the next, in the masks of the epoch it
        began in: one step, one replica, on every rank.
        """
        return self.cache.gather(
            self.order.at(step)[self.rank :: self.world_size],
            self.teachers_at(step),
            epoch=self.order.epoch(step),
            masked_view=self.masked_view,
            allow_missing=self.allow_missing,
            scalars=False,
        )

    def steps(self, start: int, stop: int) -> Generator[tuple[int, Batch], None, None]:
        """Yield (step, batch) for every step from ``start`` to ``stop``, in that order.

        Reads no further ahead than AHEAD batches per thread, nor than ``order`` knows: an order
        that follows evaluations is told of each before the next batch is taken. An error in reading
        comes after the batches before it. Closing it ends all threads.
        """
        ahead = _ReadAhead(self.batch, self.order.knows, start, stop, AHEAD * self.threads)
        try:
            ahead.begin(min(self.threads, stop - start))
            for step in range(start, stop):
                began = time.perf_counter()
                batch = ahead.take(step)
                self.waited += time.perf_counter() - began
                yield step, batch
        finally:
            ahead.end()


def _check_world(
    sequences: int, batch_sequences: int, rank: int, world_size: int, threads: int
) -> None:
    if not sequences:
        raise InputError(
            "there is no sequence to train on: the corpus is empty or all of it is held out. Give "
            "a longer corpus, or a smaller train.held_out"
        )
    if batch_sequences < 1 or threads < 1:
        raise InputError(
            f"a step needs at least one sequence and one thread that reads it, not "
            f"{batch_sequences} and {threads}: raise train.batch_sequences or "
            "train.prefetch_threads"
        )
    if not 0 <= rank < world_size:
        raise InputError(
            f"rank {rank} of {world_size} processes: ranks go from 0 to the number of processes "
            "- 1. Start the processes with torchrun, which numbers them"
        )
    if batch_sequences % world_size:
        raise InputError(
            f"train.batch_sequences {batch_sequences} cannot be shared by {world_size} processes: "
            "it is the batch of all of them together, and each must get the same number. Use a "
            f"multiple of {world_size}, or a number of processes that divides {batch_sequences}"
        )


class _ReadAhead:
    """Reads numbered batches on several threads and gives them out in order."""

    def __init__(
        self,
        read: Callable[[int], Batch],
        may_read: Callable[[int], bool],
        start: int,
        stop: int,
        depth: int,
    ):
        self._read, self._may_read, self._stop, self._depth = read, may_read, stop, depth
        self._next = start  # to be read
        self._given = start  # to be given out
        self._ready: dict[int, Batch | BaseException] = {}
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def begin(self, threads: int) -> None:
        for _ in range(threads):
            thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            thread.start()
            self._threads.append(thread)

    def take(self, step: int) -> Batch:
        """Return the batch of ``step``, or raise the error of reading it; steps come in turn."""
        with self._changed:
            self._changed.notify_all()  # there may be more that may be read since the last one
            self._changed.wait_for(lambda: step in self._ready)
            found = self._ready.pop(step)
            self._given = step + 1
            self._changed.notify_all()
        if isinstance(found, BaseException):
            raise found
        return found

    def end(self) -> None:
        """Let every thread finish the batch that it reads; no other is begun.

        Waits for them a moment only: a shard may come from far away, and Ctrl-C must not.
        """
        with self._changed:
            self._stop = self._next
            self._changed.notify_all()
        until = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while (step := self._claim()) is not None:
            found: Batch | BaseException
            try:
                found = self._read(step)
            except BaseException as error:
                found = error
            with self._changed:
                self._ready[step] = found
                if isinstance(found, BaseException):
                    self._stop = self._next  # nothing after it will be asked for
                self._changed.notify_all()

    def _claim(self) -> int | None:
        """Return the next step to read once there is room for it, None when no step is left."""
        with self._changed:
            # Every batch that is taken wakes it up: what `may_read` says is looked at anew then.
            self._changed.wait_for(lambda: self._next >= self._stop or self._has_room())
            if self._next >= self._stop:
                return None
            self._next += 1
            return self._next - 1

    def _has_room(self) -> bool:
        return self._next < self._given + self._depth and self._may_read(self._next)
