"""Runs jobs that wait for each other, side by side, each in a process of its own. Knows no model.

Unless told otherwise each has one thread: models as small as the demo's do not gain from more, and
sums are then formed in the same order whatever the number of cores, so that no score depends on it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from operator import methodcaller
from pathlib import Path
from typing import cast

from rekindle.data.cores import cores
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.pipeline.console import log_to_stderr
from rekindle.pipeline.processes.worker import (
    Place,
    Returned,
    Worker,
    WorkerKilled,
    killed_at_exit,
)
from rekindle.pipeline.progress import Progress, ProgressTask
from rekindle.train.interrupts import Interrupted, Stop

log = logging.getLogger("rekindle")

MOST_WORKERS = 4
STOP_WITHIN = 60.0  # seconds that jobs have to keep what they have done, when all is interrupted
GO_ON = "To go on after what is finished, run the same command again"
_Tell = Callable[[ProgressTask], None]  # what a job tells: a call of a method of its task


class Report(ProgressTask):
    """A job's own task, shown by the process that started the job.

    ``send`` takes what is to be done with the task there; by default nobody is told.
    """

    def __init__(self, send: Callable[[_Tell], None] = lambda tell: None):
        super().__init__("", "steps")
        self.send = send

    def begin(self, done: int) -> None:
        """As for any task."""
        super().begin(done)
        self.send(methodcaller("begin", done))

    def advance(self, amount: int = 1, **counts: float) -> None:
        """As for any task."""
        super().advance(amount, **counts)
        self.send(methodcaller("advance", amount, **counts))

    def note(self, text: str) -> None:
        """As for any task."""
        self.send(methodcaller("note", text))


class StepReports(Progress):
    """Reports the tasks whose length is known as the job's own; shows nothing."""

    def __init__(self, report: Report):
        super().__init__()
        self.report = report

    @contextmanager
    def task(self, name: str, unit: str, total: int | None = None) -> Iterator[ProgressTask]:
        """Give a task that is reported if it has a ``total``."""
        yield ProgressTask(name, unit) if total is None else Report(self.report.send)


@dataclass(frozen=True)
class Job:
    """``function(*arguments, report)``, in a process of its own; both must be picklable.

    ``output`` is a path that is there exactly when the job is finished (None: nobody knows, so it
    is run). ``after`` names the jobs that must be finished before it starts; ``steps`` is how many
    it reports, None where that is not known.
    """

    name: str
    function: Callable[..., object]
    arguments: tuple[object, ...]
    output: Path | None
    after: tuple[str, ...] = ()
    steps: int | None = None


def run_jobs(
    jobs: Sequence[Job],
    log_file: Path | None,
    progress: Progress,
    places: Sequence[Place] = (),
    keep_going: bool = False,
) -> dict[str, object]:
    """Run those of ``jobs`` whose output is not there, one at each of ``places`` at a time; return
    what their functions returned, by name.

    Without ``places``: one thread for each, as many at a time as there are cores (or 4). Among
    those that can start, the first in the list does. What they print or log goes to ``log_file``
    (None: to stderr). The error of a job (see ``Worker.receive``) is raised and stops the others,
    as InputError if its process was killed; with ``keep_going`` it is the job's result. An
    interrupt says what the jobs at work have kept.
    """
    waiting = [job for job in jobs if job.output is None or not job.output.exists()]
    running, results = dict[Worker, tuple[Job, ProgressTask, ExitStack]](), dict[str, object]()
    free = list(places) or [Place(None, 1)] * min(cores(), MOST_WORKERS)
    with killed_at_exit(running), _told_to_end(running):
        while waiting or running:
            unfinished = {job.name for job in (*waiting, *(one[0] for one in running.values()))}
            ready = [job for job in waiting if unfinished.isdisjoint(job.after)]
            for job in ready[: len(free)]:
                waiting.remove(job)
                shown = ExitStack()
                unit = "" if job.steps is None else "steps"
                task = shown.enter_context(progress.task(job.name, unit, total=job.steps))
                worker = Worker(job.name, partial(_do, job), free.pop(0), log_file)
                running[worker] = job, task, shown
            for worker in Worker.with_messages(running):
                job, task, shown = running[worker]
                try:
                    message = worker.receive()
                except Interrupted as error:  # it alone was told to end: so is the whole then
                    del running[worker]
                    raise Interrupted(f"; {job.name}: interrupted{error.told}") from None
                except Exception as error:
                    if keep_going:
                        results[job.name] = error
                    elif isinstance(error, WorkerKilled):
                        raise InputError(f"{job.name}: {error}. {GO_ON}") from None
                    else:
                        raise
                else:
                    if not isinstance(message, Returned):
                        cast(_Tell, message)(task)
                        continue
                    results[job.name] = message.value
                    if not task.done:  # a job that is one piece needs not say that it is done
                        task.advance()
                    shown.close()
                del running[worker]
                free.append(worker.place)
    return results


def run_counted(
    jobs: Sequence[Job], log_file: Path, progress: Progress, places: Sequence[Place] = ()
) -> None:
    """``run_jobs`` for jobs that all have an output: an interrupt says how many are finished."""
    try:
        run_jobs(jobs, log_file, progress, places)
    except Interrupted as error:
        done = sum(job.output is not None and job.output.exists() for job in jobs)
        told = f"; {done} of {counted(len(jobs), 'job')} are finished{error.told}"
        raise Interrupted(told, kept=error.kept or done > 0) from None


@contextmanager
def _told_to_end(running: Mapping[Worker, tuple[Job, ProgressTask, ExitStack]]) -> Iterator[None]:
    """An interrupt is sent on: each job that is ``running`` keeps what it has done, as far as it
    can within STOP_WITHIN seconds, and that is told. Another interrupt ends all at once.
    """
    with Stop.heard(at_once=True) as stop:
        stop.listen()
        try:
            yield
        except KeyboardInterrupt as error:
            stop.told()  # a job may have been, by a signal to all, before this process was
            names = {worker: job.name for worker, (job, *_) in running.items()}
            if names:
                log.info(
                    "told to end: within %.0f s the jobs at work keep what they have done; a "
                    "second Ctrl-C leaves at once",
                    STOP_WITHIN,
                )
            for worker in names:
                worker.tell_to_end()
            told = [error.told] if isinstance(error, Interrupted) else []
            told += [f"; {name}: {what}" for name, what in _kept_by(names) if what]
            raise Interrupted("".join(told), kept=bool(told)) from None


def _kept_by(workers: Mapping[Worker, str]) -> Iterator[tuple[str, str]]:
    """Yield, of each of the ``workers`` that ends in time, its name and what it kept."""
    until, left = time.monotonic() + STOP_WITHIN, dict(workers)
    while left and (seconds := until - time.monotonic()) > 0:
        for worker in Worker.with_messages(left, seconds):
            try:
                if not isinstance(worker.receive(), Returned):
                    continue  # of its progress
                yield left[worker], "finished"
            except Interrupted as error:
                yield left[worker], f"interrupted{error.told}" if error.kept else ""
            except Exception as error:  # it failed, or what it said was cut in two
                log.warning("%s: %s", left[worker], error)
            del left[worker]


def _do(job: Job, parent: Connection) -> object:
    """Do a job, in the process that is for it."""
    log_to_stderr(logging.INFO, lead=f"{job.name}: ")
    return job.function(*job.arguments, Report(parent.send))
