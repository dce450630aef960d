"""Do batches of work in parallel, and give the results in the batches' order: in threads here, in
other processes or on a cluster through what ``pipeline`` passes in.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from rekindle.data.cores import cores

BATCHES_AHEAD_PER_THREAD = 4

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class InOrder(Protocol):
    """Does batches of work. ``load`` makes the function for one; it, the batches and the results
    must be picklable. Batches are taken as needed, some ahead, in the thread that asks for results.
    A batch's error is raised where its result would be.
    """

    def __call__(
        self, load: Callable[[], Callable[[Batch], Result]], batches: Iterable[Batch]
    ) -> Generator[Result, None, None]:
        """Yield the result of each batch, in order."""
        ...


def in_threads(
    load: Callable[[], Callable[[Batch], Result]],
    batches: Iterable[Batch],
    threads: int | None = None,
) -> Generator[Result, None, None]:
    """An ``InOrder`` of this process with that many threads (None: one per core).

    It first takes one batch ahead, then more and more, up to BATCHES_AHEAD_PER_THREAD. Whoever
    needs only the first results does not wait for others, and no thread is idle while a result is
    written to disk.
    """
    work, threads = load(), threads or cores()
    waiting = deque[Future[Result]]()
    batches_ahead = 1
    pool = ThreadPoolExecutor(threads)
    try:
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > batches_ahead:
                batches_ahead = min(2 * batches_ahead, BATCHES_AHEAD_PER_THREAD * threads)
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
