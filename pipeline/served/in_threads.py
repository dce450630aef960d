"""Ask several questions at a time, and yield the answers in the order of the questions."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")

ANSWERS_AHEAD = 4  # questions per thread that wait, or whose answers wait


def ask_in_order(
    answer: Callable[[Question], Answer],
    questions: Iterable[Question],
    threads: int,
    stop: Callable[[], None] = lambda: None,
) -> Generator[Answer, None, None]:
    """Yield ``answer`` of each question, in order; ``threads`` of them run at a time.

    An error is raised in place of its answer. When the work ends early, ``stop`` is called and
    nothing is waited for: the threads are daemons, so a server that hangs delays no exit.
    """
    tasks: queue.SimpleQueue[tuple[Question, Future[Answer]] | None] = queue.SimpleQueue()
    futures: list[Future[Answer]] = []
    is_ended = threading.Event()

    def answer_tasks() -> None:
        while (task := tasks.get()) is not None and not is_ended.is_set():
            question, future = task
            try:
                future.set_result(answer(question))
            except BaseException as error:
                is_ended.set()  # earlier questions are under way; later ones are not needed
                future.set_exception(error)

    thread_count = 0
    try:
        for question in questions:
            if thread_count < threads:
                threading.Thread(target=answer_tasks, daemon=True).start()
                thread_count += 1
            future: Future[Answer] = Future()
            futures.append(future)
            tasks.put((question, future))
            if len(futures) > ANSWERS_AHEAD * threads:
                yield futures.pop(0).result()
        while futures:
            yield futures.pop(0).result()
    finally:
        if futures:
            is_ended.set()
            stop()
        for _ in range(thread_count):
            tasks.put(None)
