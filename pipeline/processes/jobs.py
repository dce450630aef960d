"""Run jobs that depend on each other in parallel, each in its own process. Knows no model.

By default each job has one thread: models as small as the demo's gain nothing from more, and sums
are then added in the same order whatever the number of cores, so no score depends on it.
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
STOP_WITHIN = 60.0  # seconds for jobs to save their work after an interrupt
GO_ON = "To go on after what is finished, run the same command again"
_TaskCall = Callable[[ProgressTask], None]  # what a job reports: a call of a method of its task


class Report(ProgressTask):
    """A job's own task, shown by the process that started the job.

    ``send`` passes on the calls to make on the task there; by default they are dropped.
    """

    def __init__(self, send: Callable[[_TaskCall], None] = lambda call: None):
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
    """Report the tasks of known length as the job's own; show nothing."""

    def __init__(self, report: Report):
        super().__init__()
        self.report = report

    @contextmanager
    def task(self, name: str, unit: str, total: int | None = None) -> Iterator[ProgressTask]:
        """Yield a task that is reported if it has a ``total``."""
        yield ProgressTask(name, unit) if total is None else Report(self.report.send)


@dataclass(frozen=True)
class Job:
    """``function(*arguments, report)``, run in its own process; both must be picklable.

    ``output``: a path that exists exactly when the job is finished (None: unknown, so the job
    runs). ``after``: the names of jobs that must be finished before it starts. ``steps``: the
    number of steps it reports; None if unknown.
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
    """Run the ``jobs`` whose output is missing, one at each of ``places`` at a time. Return the
    results of their functions by name.

    Without ``places``: one thread each, as many at a time as there are cores (at most 4). Of the
    jobs that can start, the first in the list starts. Their output and logs go to ``log_file``
    (None: stderr). An error of a job (see ``Worker.receive``) is raised and stops the others, as
    InputError if its process was killed; with ``keep_going`` the error is the job's result. An
    interrupt reports what the running jobs have kept.
    """
    waiting = [job for job in jobs if job.output is None or not job.output.exists()]
    running, results = dict[Worker, tuple[Job, ProgressTask, ExitStack]](), dict[str, object]()
    free_places = list(places) or [Place(None, 1)] * min(cores(), MOST_WORKERS)
    with killed_at_exit(running), _passing_interrupts_on(running):
        while waiting or running:
            unfinished = {job.name for job in (*waiting, *(entry[0] for entry in running.values()))}
            ready_jobs = [job for job in waiting if unfinished.isdisjoint(job.after)]
            for job in ready_jobs[: len(free_places)]:
                waiting.remove(job)
                task_stack = ExitStack()
                unit = "" if job.steps is None else "steps"
                task = task_stack.enter_context(progress.task(job.name, unit, total=job.steps))
                worker = Worker(job.name, partial(_do, job), free_places.pop(0), log_file)
                running[worker] = job, task, task_stack
            for worker in Worker.with_messages(running):
                job, task, task_stack = running[worker]
                try:
                    message = worker.receive()
                except Interrupted as error:  # only this job was told to end, so everything ends
                    del running[worker]
                    raise Interrupted(f"; {job.name}: interrupted{error.message}") from None
                except Exception as error:
                    if keep_going:
                        results[job.name] = error
                    elif isinstance(error, WorkerKilled):
                        raise InputError(f"{job.name}: {error}. {GO_ON}") from None
                    else:
                        raise
                else:
                    if not isinstance(message, Returned):
                        cast(_TaskCall, message)(task)
                        continue
                    results[job.name] = message.value
                    if not task.done:  # a job of a single piece need not report that it is done
                        task.advance()
                    task_stack.close()
                del running[worker]
                free_places.append(worker.place)
    return results


def run_counted(
    jobs: Sequence[Job], log_file: Path, progress: Progress, places: Sequence[Place] = ()
) -> None:
    """Run ``run_jobs`` for jobs that all have an output; an interrupt says how many are
    finished.
    """
    try:
        run_jobs(jobs, log_file, progress, places)
    except Interrupted as error:
        done = sum(job.output is not None and job.output.exists() for job in jobs)
        message = f"; {done} of {counted(len(jobs), 'job')} are finished{error.message}"
        raise Interrupted(message, is_saved=error.is_saved or done > 0) from None


@contextmanager
def _passing_interrupts_on(
    running: Mapping[Worker, tuple[Job, ProgressTask, ExitStack]],
) -> Iterator[None]:
    """Pass an interrupt on: each of the ``running`` jobs saves what it has done, as far as it can
    within STOP_WITHIN seconds, and this is reported. A second interrupt ends everything at once.
    """
    with Stop.heard(at_once=True) as stop:
        stop.listen()
        try:
            yield
        except KeyboardInterrupt as error:
            stop.note_request()  # a signal to all may have reached a job before this process
            names = {worker: job.name for worker, (job, *_) in running.items()}
            if names:
                log.info(
                    "told to end: within %.0f s the jobs at work keep what they have done; a "
                    "second Ctrl-C leaves at once",
                    STOP_WITHIN,
                )
            for worker in names:
                worker.request_end()
            notes = [error.message] if isinstance(error, Interrupted) else []
            notes += [f"; {name}: {outcome}" for name, outcome in _kept_work(names) if outcome]
            raise Interrupted("".join(notes), is_saved=bool(notes)) from None


def _kept_work(workers: Mapping[Worker, str]) -> Iterator[tuple[str, str]]:
    """Yield the name of each worker that ends in time, and what it kept."""
    deadline, unfinished = time.monotonic() + STOP_WITHIN, dict(workers)
    while unfinished and (seconds := deadline - time.monotonic()) > 0:
        for worker in Worker.with_messages(unfinished, seconds):
            try:
                if not isinstance(worker.receive(), Returned):
                    continue  # a progress report
                yield unfinished[worker], "finished"
            except Interrupted as error:
                yield unfinished[worker], f"interrupted{error.message}" if error.is_saved else ""
            except Exception as error:  # it failed, or its message was cut off
                log.warning("%s: %s", unfinished[worker], error)
            del unfinished[worker]


def _do(job: Job, parent: Connection) -> object:
    """Do a job in its own process."""
    log_to_stderr(logging.INFO, prefix=f"{job.name}: ")
    return job.function(*job.arguments, Report(parent.send))
