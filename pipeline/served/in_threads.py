"""Ask several questions at a time, and yield the answers in the order of the questions."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")

AHEAD = 4  # questions per thread that wait, or whose answers wait


def ask_in_order(
    do: Callable[[Question], Answer],
    questions: Iterable[Question],
    threads: int,
    stop: Callable[[], None] = lambda: None,
) -> Generator[Answer, None, None]:
    """Yield ``do`` of each question, in order; ``threads`` of them run at a time.

    An error is raised in place of its answer. When the work ends early, ``stop`` is called and
    nothing is waited for: the threads are daemons, so a server that hangs delays no exit.
    """
    todo: queue.SimpleQueue[tuple[Question, Future[Answer]] | None] = queue.SimpleQueue()
    waiting: list[Future[Answer]] = []
    over = threading.Event()

    def work() -> None:
        while (one := todo.get()) is not None and not over.is_set():
            question, future = one
            try:
                future.set_result(do(question))
            except BaseException as error:
                over.set()  # earlier questions are under way; later ones are not needed
                future.set_exception(error)

    started = 0
    try:
        for question in questions:
            if started < threads:
                threading.Thread(target=work, daemon=True).start()
                started += 1
            future: Future[Answer] = Future()
            waiting.append(future)
            todo.put((question, future))
            if len(waiting) > AHEAD * threads:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        if waiting:
            over.set()
            stop()
        for _ in range(started):
            todo.put(None)
