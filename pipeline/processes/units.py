"""Does the units of one work, each once: in this process, or in several of this machine.

On a cluster: ``on_ray``. Knows no model.
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

AT_HAND = 2  # units of a process that does them in order: it waits for nobody
WARM_UP, IN_THREADS = 512, 768  # of 64 kB of text: some 20 and 30 seconds of two cores

BEGUN = 3  # units that are begun, or being written, before one is through

Unit = TypeVar("Unit")
Result = TypeVar("Result")
# Makes the large object that all units need, a function of a unit: each process does it once.
Load = Callable[[], Callable[[Unit], Result]]


@runtime_checkable
class Several(Protocol):
    """What does units and may begin one before the last is through."""

    def several(self, units: Iterable[Any]) -> Iterator[Any]:
        """Do units; give a result of each, in their order. At most BEGUN are taken of which none
        has been given.
        """
        ...


@dataclass(frozen=True)
class Work(Generic[Unit, Result]):
    """Units that need one large object.

    ``name`` stands in messages; ``load`` and the units must be picklable. ``needs``: what a process
    takes of a cluster's machine, by Ray's names (``num_gpus``). ``within``: the seconds after which
    a process that is at a ``load`` or a ``unit`` there is ended; none is where none are given.
    """

    name: str
    load: Load[Unit, Result]
    units: Sequence[Unit]
    needs: Mapping[str, float] = field(default_factory=dict)
    within: Mapping[str, float] = field(default_factory=dict)


class Executor(Protocol):
    """Does works one after another. ``elsewhere``: on machines that may see other files."""

    elsewhere: ClassVar[bool]

    def run(self, work: Work[Unit, Result], report: Callable[[Result], None]) -> None:
        """Do the units of ``work``; ``report`` takes each result as it comes.

        Raises the error of a unit or of ``work.load``, KeyboardInterrupt when told to end.
        """
        ...

    def in_order(
        self, name: str, load: Load[Unit, Result], units: Iterable[Unit]
    ) -> Generator[Result, None, None]:
        """Do ``units`` of what needs no device, side by side; give the results in their order.

        For ``InOrder`` of ``data``, which says what holds. Raises as ``run`` does.
        """
        ...


@dataclass(frozen=True)
class OnThisMachine:
    """In this process, or in so many others; they share the CUDA devices."""

    elsewhere: ClassVar[bool] = False

    processes: int = 1
    for_text: int = 1  # processes for a long work in order, where ``processes`` is 1

    def run(self, work: Work[Unit, Result], report: Callable[[Result], None]) -> None:
        """As for any ``Executor``; an error ends all. Raises InputError if a process was killed."""
        if self.processes == 1 or not work.units:
            do = work.load()
            for result in _each(do, work.units):
                report(result)
        else:
            run_units(work.name, work.load, work.units, places_for(self.processes), report)

    def in_order(
        self, name: str, load: Load[Unit, Result], units: Iterable[Unit]
    ) -> Generator[Result, None, None]:
        """As for any ``Executor``: in threads of this process, or in so many others. These are not
        begun for fewer units than there would be processes; nor ``for_text`` ones before so many
        units are done that what they import is soon made up for.
        """
        following = iter(units)
        processes = self.processes
        if processes == 1 < self.for_text:
            processes = self.for_text
            yield from in_threads(load, _with_warm_up(islice(following, IN_THREADS)))
        first = list(islice(following, processes))
        if processes == 1 or len(first) < processes:
            yield from in_threads(load, chain(first, following))
            return
        if self.processes == 1:
            log.info("%s: it is long; %d processes make it from here on", name, processes)
        places = [Place(None, max(1, cores() // processes))] * processes
        yield from units_in_order(name, load, chain(first, following), places)


def _with_warm_up(units: Iterable[Unit]) -> Iterator[Unit]:
    """``units``, at WARM_UP of which other processes begin to be made ready."""
    for number, unit in enumerate(units):
        if number == WARM_UP:
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

    An error of a unit, or of ``load``, ends all (see ``Worker.receive``). Raises InputError if a
    process was killed.
    """
    waiting, workers = deque(units), list[Worker]()
    with killed_at_exit(workers):
        for place in places[: len(units)]:
            workers.append(Worker(name, partial(_do_each, load), place))
        # In turns, so that few units are shared out; None where there are no more of them.
        for number in range(BEGUN):
            for worker in workers:
                if number < _held(worker.place):
                    worker.send(waiting.popleft() if waiting else None)
        while workers:
            for worker in Worker.with_messages(workers):
                try:
                    message = worker.receive()
                except (Interrupted, WorkerKilled) as error:
                    raise _ended(name, error) from None
                if isinstance(message, Returned):
                    workers.remove(worker)
                    continue
                report(cast(Result, message))
                worker.send(waiting.popleft() if waiting else None)


def _ended(name: str, error: Interrupted | WorkerKilled) -> BaseException:
    """What is raised where a process was told to end, or was killed."""
    if isinstance(error, Interrupted):  # what was made is for the caller to tell
        return KeyboardInterrupt()
    return InputError(f"{name}: {error}. {GO_ON}, with fewer --workers if need be")


def units_in_order(
    name: str, load: Load[Unit, Result], units: Iterable[Unit], places: Sequence[Place]
) -> Generator[Result, None, None]:
    """Do ``units`` in a process at each of ``places``; give the results in the order of the units.

    Raises as ``run_units`` does.
    """
    workers, free = list[Worker](), SimpleQueue[_Asked]()

    def do(unit: Unit) -> Result:
        """Have a process do it; a thread for each unit at hand waits for its answer."""
        asked = free.get()
        try:
            with asked.in_turn(unit):
                return cast(Result, asked.worker.receive())
        except (Interrupted, WorkerKilled) as error:
            raise _ended(name, error) from None
        finally:
            free.put(asked)

    with killed_at_exit(workers):
        for place in places:
            workers.append(Worker(name, partial(_do_units, load), place))
        for asked in AT_HAND * [_Asked(worker) for worker in workers]:  # few units go to all
            free.put(asked)
        with closing(in_threads(lambda: do, units, AT_HAND * len(workers))) as results:
            yield from results
        for worker in workers:
            worker.send(None)
            worker.receive()
        workers.clear()


class _Asked:
    """A process that has the next unit at hand while it does one; it answers in their order."""

    def __init__(self, worker: Worker):
        self.worker, self._sending, self._answered = worker, Lock(), Event()
        self._answered.set()

    @contextmanager
    def in_turn(self, unit: object) -> Iterator[None]:
        """Send a unit, and wait until its answer is the next one."""
        mine = Event()
        with self._sending:
            self.worker.send(unit)
            before, self._answered = self._answered, mine
        before.wait()
        try:
            yield
        finally:
            mine.set()


def _held(place: Place) -> int:
    """How many units a process has at hand: on a device it begins some before one is through."""
    return 1 if place.device is None else BEGUN


def _each(do: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[Result]:
    """Do units one after another, or as ``Several`` does."""
    return do.several(units) if isinstance(do, Several) else map(do, units)


def _do_each(load: Load[Unit, Result], parent: Connection) -> None:
    """What each process of ``run_units`` does: all that the parent sends, until that is None."""
    for result in _each(load(), iter(parent.recv, None)):
        parent.send(result)


def _do_units(load: Load[Unit, Result], parent: Connection) -> None:
    """What each process of ``units_in_order`` does: a unit at a time, until there are no more."""
    do = load()
    while (unit := parent.recv()) is not None:
        parent.send(do(unit))
