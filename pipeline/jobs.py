"""Runs jobs that wait for each other, side by side, each in a process of its own. Knows no model.

Unless told otherwise each has one thread: models as small as the demo's do not gain from more, and
sums are then formed in the same order whatever the number of cores, so that no score depends on it.
"""

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rekindle.data.errors import InputError, RekindleError
from rekindle.pipeline.devices import Place, cores
from rekindle.pipeline.progress import Progress, Task

MOST_WORKERS = 4
# What jobs import, seconds of work: done once, by the server that they are forked from.
_PRELOADED = [
    "rekindle.pipeline.caching.cache_teachers",
    "rekindle.pipeline.train_student",
    "rekindle.train.finetune.run",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
]
Report = Callable[[int], None]  # a job calls it with the number of steps it has just done


@dataclass(frozen=True)
class Job:
    """``function(*arguments, report)``, in a process of its own; both must be picklable.

    ``output`` is a path that is there exactly when the job is finished. ``after`` names the jobs
    that must be finished before it starts.
    """

    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    output: Path
    after: tuple[str, ...] = ()
    steps: int | None = None


@dataclass(frozen=True)
class _Running:
    job: Job
    place: Place
    process: multiprocessing.process.BaseProcess
    messages: Connection
    task: Task
    shown: ExitStack


def warm_up() -> None:
    """Begin to import what jobs need, in the background."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    forkserver.ensure_running()


def run_jobs(
    jobs: Sequence[Job], log_file: Path, progress: Progress, places: Sequence[Place] = ()
) -> None:
    """Run those of ``jobs`` whose output is not there, one at each of ``places`` at a time.

    Without ``places``: one thread for each, as many at a time as there are cores (or 4). Among
    those that can start, the first in the list does. What they print or log goes to ``log_file``.
    A RekindleError of a job is raised here (InputError for one whose process was killed), anything
    else as RuntimeError with the job's traceback; the other jobs are then stopped, as they are on
    Ctrl-C.
    """
    waiting, running = [job for job in jobs if not job.output.exists()], list[_Running]()
    free = list(places) or [Place(None, 1)] * min(cores(), MOST_WORKERS)
    try:
        while waiting or running:
            unfinished = {job.name for job in waiting} | {one.job.name for one in running}
            ready = [job for job in waiting if unfinished.isdisjoint(job.after)]
            for job in ready[: len(free)]:
                waiting.remove(job)
                running.append(_start(job, log_file, progress, free.pop(0)))
            heard = wait([one.messages for one in running])
            for one in [one for one in running if one.messages in heard]:
                if _is_done(one):
                    running.remove(one)
                    free.append(one.place)
    finally:
        for one in running:
            one.process.terminate()
            one.process.join()


def _start(job: Job, log_file: Path, progress: Progress, place: Place) -> _Running:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, place, theirs, str(log_file)), daemon=True)
    process.start()
    theirs.close()
    shown = ExitStack()
    task = shown.enter_context(progress.task(job.name, unit="steps", total=job.steps))
    return _Running(job, place, process, ours, task, shown)


def _is_done(one: _Running) -> bool:
    """Take one message: steps done, None at the end, or the exception that ended the job."""
    try:
        message = one.messages.recv()
    except EOFError:
        one.process.join()
        raise InputError(
            f"{one.job.name}: its process was killed (exit code {one.process.exitcode}; out of "
            "memory?). What is finished is kept; run the same command again to go on"
        ) from None
    if isinstance(message, BaseException):
        raise message
    if message is not None:
        one.task.advance(message)
        return False
    one.process.join()
    one.shown.close()
    return True


def _work(job: Job, place: Place, messages: Connection, log_file: str) -> None:
    """The life of a job's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started the jobs stops them
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log_file, "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.WARNING, format=f"{job.name}: %(message)s", force=True)
    logging.getLogger("rekindle").setLevel(logging.INFO)
    place.take()
    try:
        job.function(*job.arguments, messages.send)
    except RekindleError as error:
        messages.send(error)
    except Exception:
        messages.send(RuntimeError(f"{job.name} failed:\n{traceback.format_exc()}"))
    else:
        messages.send(None)


def _end_with_parent() -> None:
    """A job left behind must not go on writing where the same command, run again, writes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class StepReports(Progress):
    """Hands on how far the tasks are whose length is known; shows nothing."""

    def __init__(self, report: Report):
        super().__init__()
        self.report = report

    @contextmanager
    def task(self, name: str, unit: str, total: int | None = None) -> Iterator[Task]:
        """A task that is reported if it has a ``total``."""
        yield Task(name, unit) if total is None else _Reported(name, unit, self.report)


class _Reported(Task):
    def __init__(self, name: str, unit: str, report: Report):
        super().__init__(name, unit)
        self._report = report

    def begin(self, done: int) -> None:
        super().begin(done)
        self._report(done)

    def advance(self, amount: int = 1, **counts: float) -> None:
        super().advance(amount, **counts)
        self._report(amount)
