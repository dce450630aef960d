"""Units of work that all need the same large object: each process loads it once.

``load`` makes that object, a function of a unit; it and the units are picklable, and nothing else
is shared. An executor for many machines can take the same arguments.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import TypeVar, cast

from rekindle.data.errors import InputError
from rekindle.pipeline.processes.devices import Place
from rekindle.pipeline.processes.worker import Returned, Worker, WorkerKilled, killed_at_exit

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Load = Callable[[], Callable[[Unit], Result]]


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
            workers.append(Worker(name, partial(_do_units, load), place))
            workers[-1].send(waiting.popleft())
        while workers:
            for worker in Worker.with_messages(workers):
                try:
                    message = worker.receive()
                except WorkerKilled as error:
                    raise InputError(
                        f"{name}: {error}. What is finished is kept; run the same command again to "
                        "go on, with fewer --workers if need be"
                    ) from None
                if isinstance(message, Returned):
                    workers.remove(worker)
                    continue
                report(cast(Result, message))
                worker.send(waiting.popleft() if waiting else None)


def _do_units(load: Load[Unit, Result], parent: Connection) -> None:
    """What each process does: a unit at a time, until the parent has no more."""
    do = load()
    while (unit := parent.recv()) is not None:
        parent.send(do(unit))
