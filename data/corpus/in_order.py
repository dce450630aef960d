"""Does batches of work side by side, and gives the results in the batches' order: in threads here,
in other processes or on a cluster by what ``pipeline`` hands in.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from rekindle.data.cores import cores

AHEAD = 4

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class InOrder(Protocol):
    """Who does batches. ``load`` makes what does one; it, the batches and the results must be
    picklable. Batches are taken as they are needed, some ahead, in the thread that asks for
    results. An error of a batch is raised where its result would be.
    """

    def __call__(
        self, load: Callable[[], Callable[[Batch], Result]], batches: Iterable[Batch]
    ) -> Generator[Result, None, None]:
        """The result of each batch, in order."""
        ...


def in_threads(
    load: Callable[[], Callable[[Batch], Result]],
    batches: Iterable[Batch],
    threads: int | None = None,
) -> Generator[Result, None, None]:
    """An ``InOrder`` of this process: so many threads (None: one for each core).

    At first one batch is taken ahead, then ever more up to AHEAD for each thread: whoever wants no
    more than the first results has not waited for others, and while a result is written to a disk
    no thread is idle.
    """
    do, threads = load(), threads or cores()
    waiting = deque[Future[Result]]()
    ahead = 1
    pool = ThreadPoolExecutor(threads)
    try:
        for batch in batches:
            waiting.append(pool.submit(do, batch))
            if len(waiting) > ahead:
                ahead = min(2 * ahead, AHEAD * threads)
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
