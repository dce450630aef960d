"""The batches of training steps, read in the background: a pure function of (seed, step), whatever
ran before, on any number of processes and threads. ``sequences.py`` chooses the sequences.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from rekindle.data.batch import Batch
from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.train.order.groups import check_processes
from rekindle.train.order.sequences import Order

AHEAD = 2  # batches per thread: one is read while another waits
PATIENCE = 1.0  # seconds that the end of a run waits for reading threads

_Request = tuple[int, Future[Any]]  # a step to read, and where to put its batch


@dataclass
class TrainingStream:
    """Batches of training steps, prefetched by ``threads`` threads.

    All ranks together read the ``batch_sequences`` of the order per step; this one reads every
    ``world_size``-th of them from the ``rank``-th on. ``teachers_at(step)`` returns the teachers
    whose targets are read: those with weight 0 are not touched. ``longest_first`` sorts the share
    by length, so that micro-batches have little padding, and one that does not fit into memory
    shows at once. ``ready(step, batch)`` makes what the loop gets, in the thread that has read the
    batch.

    Raises InputError if there is nothing to train on, and if the world size does not divide the
    batch.
    """

    cache: Cache
    order: Order
    teachers_at: Callable[[int], Sequence[str]]
    masked_view: str | None
    allow_missing: tuple[str, ...] = ()
    rank: int = 0
    world_size: int = 1
    threads: int = 1
    longest_first: bool = False
    ready: Callable[[int, Batch], Any] = field(default=lambda step, batch: batch)
    waited: float = field(default=0.0, init=False)  # seconds that the loop has waited for data

    def __post_init__(self) -> None:
        if not len(self.order):
            raise InputError(
                "there is no sequence to train on: the corpus is empty or all of it is held out. "
                "Give a longer corpus, or a smaller train.held_out"
            )
        batch = self.order.batch_sequences
        if batch % self.world_size:
            raise InputError(
                f"train.batch_sequences {batch} cannot be divided among {self.world_size} "
                "processes: "
                "it is the batch of all of them together, and each must get the same number. Use a "
                f"multiple of {self.world_size}, or a number of processes that divides {batch}"
            )
        if self.order.groups is not None:
            check_processes(batch, int(self.order.groups.sizes.max()), self.world_size)

    def batch(self, step: int) -> Batch:
        """Read this rank's share of ``step``.

        A step that goes beyond an epoch's end reads on in the next, with the masks of the epoch it
        began in: one step, one replica, on every rank.
        """
        numbers = self.order.at(step)[self.rank :: self.world_size]
        return self.cache.gather(
            self.cache.longest_first(numbers) if self.longest_first else numbers,
            self.teachers_at(step),
            epoch=self.order.epoch(step),
            masked_view=self.masked_view,
            allow_missing=self.allow_missing,
            scalars=False,
        )

    def steps(self, start: int, stop: int) -> Generator[tuple[int, Any], None, None]:
        """Yield (step, what ``ready`` made of its batch) from ``start`` to ``stop``, in that order.

        Reads ahead at most AHEAD batches per thread, and only as far as ``order`` knows: an order
        that follows evaluations gets each before the next batch is taken. A reading error comes
        after the batches before it. Closing the generator ends all threads.
        """
        requests: SimpleQueue[_Request | None] = SimpleQueue()
        pending: deque[Future[Any]] = deque()  # of the next step, and of those after it
        threads = [
            threading.Thread(target=self._read, args=(requests,), name="prefetch", daemon=True)
            for _ in range(min(self.threads, stop - start))
        ]
        for thread in threads:
            thread.start()
        try:
            for step in range(start, stop):
                self._ask(step, stop, pending, requests)  # evaluations may have extended the order
                started = time.perf_counter()
                batch = pending.popleft().result()
                self.waited += time.perf_counter() - started
                self._ask(step + 1, stop, pending, requests)
                yield step, batch
        finally:  # a moment only: a shard may come from far away, and Ctrl-C must not wait for it
            for future in pending:
                future.cancel()
            for _ in threads:
                requests.put(None)
            deadline = time.monotonic() + PATIENCE
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _ask(
        self,
        step: int,
        stop: int,
        pending: deque[Future[Any]],
        requests: SimpleQueue[_Request | None],
    ) -> None:
        """Have batches from ``step`` on read, as many as allowed."""
        last = min(stop, step + AHEAD * self.threads)
        while (number := step + len(pending)) < last and self.order.replay.knows(number):
            pending.append(Future())
            requests.put((number, pending[-1]))

    def _read(self, requests: SimpleQueue[_Request | None]) -> None:
        while (request := requests.get()) is not None:
            step, future = request
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self.ready(step, self.batch(step)))
            except BaseException as error:
                future.set_exception(error)
