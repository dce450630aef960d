"""Do the units of one work on a Ray cluster. The only file that imports ray.

Each actor loads the work's large object once and does one unit at a time. Actors come and go with
the cluster; another actor takes over the unit of a lost one. Results are small (what a unit makes
is in the cache), and only the process started here hands out units.
"""

import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from typing import Any, ClassVar, Generic

from rekindle.data.corpus.in_order import in_threads
from rekindle.data.counted import counted
from rekindle.data.errors import InputError, RekindleError
from rekindle.pipeline.processes.handing_out import (
    Done,
    Failed,
    HandingOut,
    describe_nodes,
)
from rekindle.pipeline.processes.same_code import running_code
from rekindle.pipeline.processes.units import Load, OnThisMachine, Result, Unit, Work

log = logging.getLogger("rekindle")

CONNECT_SECONDS = 10.0  # seconds
EXTRA_UNITS = 4  # units in progress beyond two per actor, if results are given in order


# --- on the cluster's nodes -----------------------------------------------------------------------


class _WarningKeeper(logging.Handler):
    """Keep the warnings of this process for the process the user looks at."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def take_lines(self) -> tuple[str, ...]:
        lines, self.lines = tuple(dict.fromkeys(self.lines)), []
        return lines


class _Actor:
    """The large object of a work, on one of the cluster's nodes."""

    def __init__(self) -> None:
        self.warnings = _WarningKeeper()
        log.addHandler(self.warnings)
        self.function: Callable[[Any], Any] | None = None

    def describe_node(self) -> tuple[str, dict[str, str]]:
        """Return the node, and the versions it runs."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return f"{ray.util.get_node_ip_address()} ({node[:8]})", running_code()

    def load(
        self, load: Callable[[], Callable[[Any], Any]], folder: str, threads: int, gpus: float
    ) -> object:
        """Load the object as the process in ``folder`` would, before any unit."""
        return self._answer(lambda: self._load(load, folder, threads, gpus))

    def _load(
        self, load: Callable[[], Callable[[Any], Any]], folder: str, threads: int, gpus: float
    ) -> None:
        if not gpus:  # whatever this version of ray hides by itself
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import torch

        try:
            os.chdir(folder)  # relative paths in the run file start there
        except OSError as error:
            raise InputError(
                f"the folder of this command, {folder}, cannot be entered there "
                f"({error.strerror}): every node must see the same files under the same names"
            ) from None
        torch.set_num_threads(threads)
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # the threads of tokenizers
        self.function = load()

    def make(self, unit: Any) -> object:
        """Do a unit."""
        assert self.function is not None
        function = self.function
        return self._answer(lambda: function(unit))

    def _answer(self, work: Callable[[], object]) -> object:
        try:
            return Done(work(), self.warnings.take_lines())
        except (RekindleError, OSError) as error:
            return Failed(error)
        except Exception:  # its class may be unknown where it is received
            return Failed(RuntimeError(traceback.format_exc()))


# --- in the process that was started --------------------------------------------------------------


@contextmanager
def on_ray(address: str | None, actors: int | None) -> Iterator["OnRay"]:
    """Join the cluster at ``address`` for at most ``actors`` actors (None: as many as fit).

    Without an address: the cluster of RAY_ADDRESS or one running on this machine, else a new one of
    this machine alone. Raise InputError without ray, or if there is no cluster.
    """
    try:
        import ray
    except ImportError:
        raise InputError(
            "--executor ray needs the package ray, which is not installed: in the checkout, "
            "pip install -e '.[ray]'"
        ) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = address or os.environ.get("RAY_ADDRESS")
    former_handler = signal.getsignal(signal.SIGTERM)
    try:
        _check_answers(cluster)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        place_note = f" at {cluster}" if cluster else ""
        raise InputError(
            f"no Ray cluster could be joined{place_note}: {str(error).splitlines()[0]}. Give the "
            "--address of one that runs (`ray start --head` says it), or none for a new one of "
            "this machine alone"
        ) from None
    try:
        if signal.getsignal(signal.SIGTERM) != former_handler and former_handler is not None:
            signal.signal(signal.SIGTERM, former_handler)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        log.info("ray: %s, %s", counted(len(nodes), "node"), describe_nodes(nodes))
        yield OnRay(ray, actors)
    finally:
        ray.shutdown()


def _check_answers(address: str | None) -> None:
    """Raise OSError if nothing listens at ``host:port``; Ray itself would retry for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        place = host.removeprefix("[").removesuffix("]"), int(port)  # [::1]:6379
        socket.create_connection(place, timeout=CONNECT_SECONDS).close()


@dataclass(frozen=True)
class OnRay:
    """An ``Executor`` on the cluster that this process has joined."""

    on_other_machines: ClassVar[bool] = True

    ray: Any
    actors: int | None

    def run(self, work: Work[Unit, Result], report: Callable[[Result], None]) -> None:
        """As for any ``Executor``. A failed unit is retried elsewhere; one that fails TRIES times
        ends the work with an error that names it, after all other units are done.
        """
        if not work.units:
            OnThisMachine().run(work, report)
            return
        max_actors = self.actors or len(work.units)
        handing_out = HandingOut(
            self.ray, self.ray.remote(_Actor), work, lambda _, result: report(result), max_actors
        )
        try:
            handing_out.run()
        finally:
            handing_out.close()

    def in_order(
        self, name: str, load: Load[Unit, Result], units: Iterable[Unit]
    ) -> Generator[Result, None, None]:
        """As for any ``Executor``. Units are retried as by ``run``; one that fails TRIES times ends
        the work at once. A single unit is done here.
        """
        following = iter(units)
        first_units = list(islice(following, 2))
        if len(first_units) < 2:
            yield from in_threads(load, first_units)
            return
        results: dict[int, Result] = {}

        def report(unit: _Numbered[Unit], result: Result) -> None:
            results[unit.number] = result

        work = Work(
            name, partial(_NumberedFunction, load), list[_Numbered[Unit]](), {"num_gpus": 0.0}
        )
        max_actors = self.actors or sys.maxsize
        handing_out = HandingOut(self.ray, self.ray.remote(_Actor), work, report, max_actors)
        numbered = map(_Numbered, count(), chain(first_units, following))
        taken_count = yielded_count = 0
        try:
            while True:
                in_progress_limit = 2 * len(handing_out.actors) + EXTRA_UNITS
                next_units = list(
                    islice(numbered, max(0, in_progress_limit - (taken_count - yielded_count)))
                )
                handing_out.waiting.extend(next_units)
                taken_count += len(next_units)
                if not handing_out.pending:
                    return
                handing_out.go_on()
                if handing_out.given_up:  # later units would wait for it
                    raise handing_out.given_up_error()
                while yielded_count in results:
                    yield results.pop(yielded_count)
                    yielded_count += 1
        finally:
            handing_out.close()


@dataclass(frozen=True, eq=False)
class _Numbered(Generic[Unit]):
    """A unit and its index."""

    number: int
    unit: Unit

    @property
    def name(self) -> str:
        """Its name in messages."""
        return str(self.number)


class _NumberedFunction(Generic[Unit, Result]):
    """Do numbered units."""

    def __init__(self, load: Load[Unit, Result]):
        self._function = load()

    def __call__(self, numbered: _Numbered[Unit]) -> Result:
        return self._function(numbered.unit)
