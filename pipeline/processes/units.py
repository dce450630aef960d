"""Do the units of one work, each once, in this process or in several on this machine.

For a cluster see ``on_ray``. Knows no model.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast, runtime_checkable

from rekindle.data.cores import cores
from rekindle.data.corpus.in_order import in_threads
from rekindle.data.errors import InputError
from rekindle.pipeline.processes.jobs import GO_ON
from rekindle.pipeline.processes.worker import (
    Place,
    Returned,
    Worker,
    WorkerKilled,
    killed_at_exit,
    places_for,
    warm_up,
)
from rekindle.train.interrupts import Interrupted

log = logging.getLogger("rekindle")

QUEUED_UNITS = 2  # units per process when done in order, so that it never waits
UNITS_BEFORE_WARM_UP, UNITS_IN_THREADS = (
    512,
    768,
)  # units of 64 kB of text: about 20 and 30 seconds on two cores

UNITS_IN_PROGRESS = 3  # units in progress or being written before one is finished

Unit = TypeVar("Unit")
Result = TypeVar("Result")
# Makes the large object that all units need, a function of a unit. Each process does it once.
Load = Callable[[], Callable[[Unit], Result]]


@runtime_checkable
class Overlapping(Protocol):
    """A function of units that may begin one before the last is finished."""

    def run_many(self, units: Iterable[Any]) -> Iterator[Any]:
        """Do units and yield their results in order. At most BEGUN units are taken before a result
        is given.
        """
        ...


@dataclass(frozen=True)
class Work(Generic[Unit, Result]):
    """Units that need one large object.

    ``name`` appears in messages; ``load`` and the units must be picklable. ``needs``: resources per
    process on a cluster, by Ray's names (``num_gpus``). ``time_limits``: seconds after which a
    process is ended during a ``load`` or a ``unit``; without an entry, never.
    """

    name: str
    load: Load[Unit, Result]
    units: Sequence[Unit]
    needs: Mapping[str, float] = field(default_factory=dict)
    time_limits: Mapping[str, float] = field(default_factory=dict)


class Executor(Protocol):
    """Does one work after another. ``on_other_machines``: on machines that may see other files."""

    on_other_machines: ClassVar[bool]

    def run(self, work: Work[Unit, Result], report: Callable[[Result], None]) -> None:
        """Do the units of ``work``; ``report`` takes each result as it comes.

        Raise the error of a unit or of ``work.load``, and KeyboardInterrupt when told to end.
        """
        ...

    def in_order(
        self, name: str, load: Load[Unit, Result], units: Iterable[Unit]
    ) -> Generator[Result, None, None]:
        """Do ``units`` that need no device in parallel; yield the results in their order.

        For ``InOrder`` of ``data``, which states the rules. Raise as ``run`` does.
        """
        ...


@dataclass(frozen=True)
class OnThisMachine:
    """In this process, or in several others that share the CUDA devices."""

    on_other_machines: ClassVar[bool] = False

    processes: int = 1
    text_processes: int = 1  # processes for a long work in order, if ``processes`` is 1

    def run(self, work: Work[Unit, Result], report: Callable[[Result], None]) -> None:
        """As for any ``Executor``; an error ends everything. Raise InputError if a process was
        killed.
        """
        if self.processes == 1 or not work.units:
            function = work.load()
            for result in _results_of(function, work.units):
                report(result)
        else:
            run_units(work.name, work.load, work.units, places_for(self.processes), report)

    def in_order(
        self, name: str, load: Load[Unit, Result], units: Iterable[Unit]
    ) -> Generator[Result, None, None]:
        """As for any ``Executor``: in threads of this process, or in several others.

        Processes are not started for fewer units than processes; ``text_processes`` processes start
        only after enough units that their imports will pay off.
        """
        remaining = iter(units)
        processes = self.processes
        if processes == 1 < self.text_processes:
            processes = self.text_processes
            yield from in_threads(load, _with_warm_up(islice(remaining, UNITS_IN_THREADS)))
        first_units = list(islice(remaining, processes))
        if processes == 1 or len(first_units) < processes:
            yield from in_threads(load, chain(first_units, remaining))
            return
        if self.processes == 1:
            log.info("%s: it is long; %d processes make it from here on", name, processes)
        places = [Place(None, max(1, cores() // processes))] * processes
        yield from units_in_order(name, load, chain(first_units, remaining), places)


def _with_warm_up(units: Iterable[Unit]) -> Iterator[Unit]:
    """Yield ``units``; after WARM_UP of them, begin to prepare other processes."""
    for number, unit in enumerate(units):
        if number == UNITS_BEFORE_WARM_UP:
            warm_up()
        yield unit


def run_units(
    name: str,
    load: Load[Unit, Result],
    units: Sequence[Unit],
    places: Sequence[Place],
    report: Callable[[Result], None],
) -> None:
    """Do ``units`` in a process at each of ``places``; ``report`` takes each result as it comes.

    An error of a unit, or of ``load``, ends everything (see ``Worker.receive``). Raise InputError
    if a process was killed.
    """
    waiting, workers = deque(units), list[Worker]()
    with killed_at_exit(workers):
        for place in places[: len(units)]:
            workers.append(Worker(name, partial(_do_each, load), place))
        # In turns, so that few units are spread evenly; None when no more are left.
        for number in range(UNITS_IN_PROGRESS):
            for worker in workers:
                if number < _units_in_progress(worker.place):
                    worker.send(waiting.popleft() if waiting else None)
        while workers:
            for worker in Worker.with_messages(workers):
                try:
                    message = worker.receive()
                except (Interrupted, WorkerKilled) as error:
                    raise _end_error(name, error) from None
                if isinstance(message, Returned):
                    workers.remove(worker)
                    continue
                report(cast(Result, message))
                worker.send(waiting.popleft() if waiting else None)


def _end_error(name: str, error: Interrupted | WorkerKilled) -> BaseException:
    """Return the error for a process that was told to end, or was killed."""
    if isinstance(error, Interrupted):  # the caller reports what was made
        return KeyboardInterrupt()
    return InputError(f"{name}: {error}. {GO_ON}, with fewer --workers if need be")


def units_in_order(
    name: str, load: Load[Unit, Result], units: Iterable[Unit], places: Sequence[Place]
) -> Generator[Result, None, None]:
    """Do ``units`` in a process at each of ``places``; yield the results in the order of the units.

    Raise as ``run_units`` does.
    """
    workers, free_workers = list[Worker](), SimpleQueue[_QueuedWorker]()

    def do(unit: Unit) -> Result:
        """Have a process do it; one thread per unit in progress waits for its answer."""
        queued = free_workers.get()
        try:
            with queued.in_turn(unit):
                return cast(Result, queued.worker.receive())
        except (Interrupted, WorkerKilled) as error:
            raise _end_error(name, error) from None
        finally:
            free_workers.put(queued)

    with killed_at_exit(workers):
        for place in places:
            workers.append(Worker(name, partial(_do_units, load), place))
        # few units are spread over all
        for queued in QUEUED_UNITS * [_QueuedWorker(worker) for worker in workers]:
            free_workers.put(queued)
        with closing(in_threads(lambda: do, units, QUEUED_UNITS * len(workers))) as results:
            yield from results
        for worker in workers:
            worker.send(None)
            worker.receive()
        workers.clear()


class _QueuedWorker:
    """A process that already holds the next unit while it does one; it answers in order."""

    def __init__(self, worker: Worker):
        self.worker, self._sending, self._answered = worker, Lock(), Event()
        self._answered.set()

    @contextmanager
    def in_turn(self, unit: object) -> Iterator[None]:
        """Send a unit, and wait until its answer comes next."""
        own_turn = Event()
        with self._sending:
            self.worker.send(unit)
            previous, self._answered = self._answered, own_turn
        previous.wait()
        try:
            yield
        finally:
            own_turn.set()


def _units_in_progress(place: Place) -> int:
    """Return how many units a process holds; on a device it begins some before one is finished."""
    return 1 if place.device is None else UNITS_IN_PROGRESS


def _results_of(function: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[Result]:
    """Do units one after another, or as ``Overlapping`` does."""
    return function.run_many(units) if isinstance(function, Overlapping) else map(function, units)


def _do_each(load: Load[Unit, Result], parent: Connection) -> None:
    """Run in each process of ``run_units``: do what the parent sends, until it sends None."""
    for result in _results_of(load(), iter(parent.recv, None)):
        parent.send(result)


def _do_units(load: Load[Unit, Result], parent: Connection) -> None:
    """Run in each process of ``units_in_order``: one unit at a time, until there are no more."""
    function = load()
    while (unit := parent.recv()) is not None:
        parent.send(function(unit))
