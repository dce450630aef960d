"""Trains the students of a sweep side by side, each in a process of its own, one per device.

A process takes its device before it touches CUDA. It ends with its parent, and what it does is told
to the parent, which draws the progress.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from rekindle.data.errors import InputError
from rekindle.pipeline.devices import Place, places_for
from rekindle.pipeline.progress import Progress, Task
from rekindle.pipeline.sweep.grid import SweepRun
from rekindle.pipeline.sweep.run import Failure, train_one

# What students import, seconds of work. On CPUs it is done once, by the server that they are forked
# from; with CUDA each imports for itself, as nothing may look at a device before a fork.
_PRELOADED = [
    "rekindle.pipeline.train_student",
    "torch.utils.tensorboard",
    "transformers.modeling_utils",
]


@dataclass(frozen=True)
class _Running:
    run: SweepRun
    place: Place
    process: multiprocessing.process.BaseProcess
    messages: Connection
    task: Task
    shown: ExitStack


def train_in_processes(
    runs: Sequence[SweepRun], out: Path, workers: int, progress: Progress
) -> list[Failure]:
    """Train ``runs``, ``workers`` at a time; returns those that failed, in the order of ``runs``.

    More workers than devices share them in turn; all share the threads that one would have.
    """
    waiting, free = deque(runs), _places(workers)
    running: list[_Running] = []
    failures: dict[str, Failure] = {}
    try:
        while waiting or running:
            while waiting and free:
                running.append(_start(waiting.popleft(), out, free.pop(0), progress))
            heard = wait([one.messages for one in running])
            for one in [one for one in running if one.messages in heard]:
                if _take(one, failures):
                    running.remove(one)
                    free.append(one.place)
    finally:
        for one in running:  # on Ctrl-C: what is not in a checkpoint is done again
            one.process.kill()
            one.process.join()
    return [failures[run.name] for run in runs if run.name in failures]


def _places(workers: int) -> list[Place]:
    places = places_for(workers)
    if places[0].device is None:
        multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    return places


def _start(run: SweepRun, out: Path, place: Place, progress: Progress) -> _Running:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(run, out, place, theirs), daemon=True)
    process.start()
    theirs.close()
    shown = ExitStack()
    name, steps = str(out / run.name), run.config.train.steps
    task = shown.enter_context(progress.task(name, unit="steps", total=steps))
    return _Running(run, place, process, ours, task, shown)


def _take(one: _Running, failures: dict[str, Failure]) -> bool:
    """Take one message of a running student; whether it was its last."""
    try:
        message = one.messages.recv()
    except EOFError:
        one.process.join()
        message = Failure(
            one.run.name,
            f"its process was killed (exit code {one.process.exitcode}; out of memory? Then with "
            "fewer --workers)",
            InputError.exit_code,
        )
    if isinstance(message, _Advance):
        one.task.advance(message.steps, **message.counts)
        return False
    if isinstance(message, _Begin):
        one.task.begin(message.done)
        return False
    if isinstance(message, str):
        one.task.note(message)
        return False
    if message is None:
        one.shown.close()
    else:
        failures[one.run.name] = message
    one.process.join()
    one.messages.close()
    return True


# --- the student's own process --------------------------------------------------------------------


@dataclass(frozen=True)
class _Advance:
    steps: int
    counts: dict[str, float]


@dataclass(frozen=True)
class _Begin:
    done: int


class _Told(Progress):
    """Hands everything on to the parent: advances, notes as plain strings."""

    def __init__(self, messages: Connection):
        super().__init__()
        self.messages = messages

    @contextmanager
    def task(self, name: str, unit: str, total: int | None = None) -> Iterator[Task]:
        yield _ToldTask(name, unit, self.messages)


class _ToldTask(Task):
    def __init__(self, name: str, unit: str, messages: Connection):
        super().__init__(name, unit)
        self.messages = messages

    def begin(self, done: int) -> None:
        super().begin(done)
        self.messages.send(_Begin(done))

    def advance(self, amount: int = 1, **counts: float) -> None:
        super().advance(amount, **counts)
        self.messages.send(_Advance(amount, counts))

    def note(self, text: str) -> None:
        self.messages.send(text)


def _work(run: SweepRun, out: Path, place: Place, messages: Connection) -> None:
    """The life of a student's process; its last message is None, or a Failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format=f"{run.name}: %(message)s")
    logging.getLogger("rekindle").setLevel(logging.INFO)
    place.take()
    messages.send(train_one(run, out, _Told(messages)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
