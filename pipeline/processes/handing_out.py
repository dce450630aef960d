"""Hand out the units of one work to cluster actors that come and go, until all are done.

``ray`` is an argument that stands for the cluster: this file does not import it.
"""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic

from rekindle.data.counted import counted
from rekindle.data.errors import InputError, RekindleError
from rekindle.pipeline.processes.jobs import GO_ON
from rekindle.pipeline.processes.same_code import other_versions, running_code, unlike
from rekindle.pipeline.processes.units import Result, Unit, Work

log = logging.getLogger("rekindle")

TRIES = 3  # tries per unit, each on another node if possible, before giving it up
LOADS = 3  # failed loads in a row before a node, or work that never loaded anywhere, is given up
UNPLACED = 10  # processes lost in a row before they have begun
LOOK_AGAIN = 1.0  # seconds between two checks for room in the cluster
TELL_AGAIN = 60.0  # seconds between two messages that nothing can run
_NAMED = {"num_cpus", "num_gpus", "memory"}  # resources for which Ray has keywords


@dataclass(frozen=True)
class Failed:
    """An actor's answer when its work raised ``error``."""

    error: Exception


@dataclass(frozen=True)
class Done:
    """An actor's answer: a result, and the warnings of its code meanwhile."""

    value: Any
    warnings: tuple[str, ...] = ()


@dataclass(eq=False)
class _Held(Generic[Unit]):
    """An actor as seen from this process."""

    handle: Any
    answer: Any  # the answer waited for
    address: str = ""  # of its machine; empty while it has no room
    loaded: bool = False
    blocked: bool = False  # it cannot load; it keeps others from its place
    unit: Unit | None = None
    asked: float = 0.0  # clock time of the request
    idle: bool = False  # there was nothing for it; it may have been lost unnoticed since


@dataclass
class HandingOut(Generic[Unit, Result]):
    """The units of one work, and the actors that do them."""

    ray: Any
    actor: Any  # the class of the actors after ``ray.remote``
    work: Work[Unit, Result]
    report: Callable[[Unit, Result], None]
    most: int
    waiting: deque[Unit] = field(default_factory=deque)
    actors: list[_Held[Unit]] = field(default_factory=list)
    tried: Counter[str] = field(default_factory=Counter)
    failed_at: set[tuple[str, str]] = field(default_factory=set)  # unit, address
    given_up: dict[str, Exception] = field(default_factory=dict)
    done: int = 0
    ever_loaded: bool = False
    unloadable: int = 0  # failed loads
    in_a_row: Counter[str] = field(default_factory=Counter)  # failed loads in a row, by address
    # nodes by address, with the reason
    left_out: dict[str, Exception] = field(default_factory=dict)
    cannot: tuple[str, Exception] | None = None  # the last node that cannot do the work, and why
    unplaced: int = 0  # processes lost in a row before they had begun
    told: set[str] = field(default_factory=set)
    looked: float = float("-inf")
    idle_since: float = field(default_factory=time.monotonic)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.waiting.extend(self.work.units)
        self.needs = {"num_cpus": 1.0} | dict(self.work.needs)
        gpus = any(node["Resources"].get("GPU") for node in self._nodes())
        self.needs.setdefault("num_gpus", 1.0 if gpus else 0.0)

    def run(self) -> None:
        """Do all units."""
        while self.pending:
            self.go_on()
        if self.given_up:
            raise self.of_given_up()

    @property
    def pending(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting) or any(actor.unit is not None for actor in self.actors)

    def go_on(self) -> None:
        """Hand out what is possible, and wait a while for answers."""
        self._grow()
        self._hand_out()
        if self.cannot is not None and self.waiting:  # the others may have gone since
            self._go_on_elsewhere(*self.cannot)
        answers = {actor.answer: actor for actor in self.actors if actor.answer is not None}
        if not answers:  # the last one is lost: look for room for another
            time.sleep(LOOK_AGAIN)
            return
        ready, _ = self.ray.wait([*answers], num_returns=1, timeout=LOOK_AGAIN)
        for answer in ready:
            self._take(answers[answer])
        self._end_late()
        self._tell_waiting()

    def close(self) -> None:
        """Release the machines at once; uncommitted work of a unit is done again later."""
        for actor in self.actors:
            self.ray.kill(actor.handle)

    # --- actors ---

    def _grow(self) -> None:
        """Ask for as many actors as the cluster has room for now, plus one.

        The extra one starts when a machine joins, or makes a scheduler add a machine.
        """
        if time.monotonic() - self.looked < LOOK_AGAIN:
            return
        self.looked = time.monotonic()
        starting = sum(not actor.address for actor in self.actors)
        usable = sum(not actor.blocked for actor in self.actors)
        busy = sum(actor.unit is not None for actor in self.actors)
        wanted = min(self.most, len(self.waiting) + busy) - usable
        named = {name: self.needs[name] for name in _NAMED & self.needs.keys()}
        others = {name: amount for name, amount in self.needs.items() if name not in _NAMED}
        kind = self.actor.options(**named, resources=others, max_restarts=0)
        for _ in range(min(wanted, self._room(self.ray.available_resources()) + 1 - starting)):
            handle = kind.remote()
            self.actors.append(_Held(handle, handle.where.remote()))

    def _room(self, free: Mapping[str, float]) -> int:
        """Return how many actors fit into the ``free`` resources, by Ray's names."""
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        asked = {names.get(name, name): amount for name, amount in self.needs.items() if amount}
        return int(min((free.get(name, 0) // amount for name, amount in asked.items()), default=0))

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _places(self) -> int:
        """Return how many actors the whole cluster has room for."""
        return sum(self._room(node["Resources"]) for node in self._nodes())

    def _take(self, actor: _Held[Unit]) -> None:
        """Process an actor's answer."""
        try:
            answer = self.ray.get(actor.answer)
        except self.ray.exceptions.RayError as error:
            told = str(error).strip().splitlines()[-1].strip()
            self._gone(actor, f"its process was lost ({told})")
            return
        actor.answer = None
        if not actor.address:
            self._arrived(actor, *answer)
        elif not actor.loaded:
            self._begun(actor, answer)
        elif actor.unit is not None:
            self._made(actor, answer)
        else:  # an idle one is still there
            actor.idle = False

    def _ask(self, actor: _Held[Unit], answer: Any) -> None:
        actor.answer, actor.asked = answer, self.clock()

    def _arrived(self, actor: _Held[Unit], address: str, there: Mapping[str, str]) -> None:
        actor.address, self.unplaced, here = address, 0, running_code()
        if (error := unlike(address, there, here)) is not None:
            self._leave_out(address, error)
        if address in self.left_out:
            actor.blocked = True
            self._go_on_elsewhere(address, self.left_out[address])
            return
        if told := other_versions(address, there, here):
            self._tell(Done(None, (told,)))
        threads, gpus = max(1, int(self.needs["num_cpus"])), self.needs["num_gpus"]
        self._ask(actor, actor.handle.load.remote(self.work.load, os.getcwd(), threads, gpus))

    def _begun(self, actor: _Held[Unit], answer: object) -> None:
        if isinstance(answer, Failed):
            actor.blocked = True
            self._cannot_load(actor.address, answer.error)
            return
        self._tell(answer)
        actor.loaded = self.ever_loaded = True
        self.in_a_row[actor.address] = 0

    def _cannot_load(self, address: str, error: Exception) -> None:
        """Continue where the work can still be loaded; raise ``error`` if that is nowhere."""
        self.unloadable += 1
        self.in_a_row[address] += 1
        error = _as_here(error, f"{self.work.name} cannot be loaded on node {address}")
        if self.in_a_row[address] >= LOADS:
            self._leave_out(address, error)
        else:
            log.warning("%s", _last_line(error))
        self.cannot = address, error
        self._go_on_elsewhere(address, error)

    def _leave_out(self, address: str, error: Exception) -> None:
        """Stop using a node, and say so once."""
        if address not in self.left_out:
            self.left_out[address], self.cannot = error, (address, error)
            log.warning("%s. The node is left out from now on", _last_line(error).rstrip("."))

    def _go_on_elsewhere(self, address: str, error: Exception) -> None:
        """Raise ``error`` of the node at ``address`` if no other node can do the work."""
        blocked = sum(actor.blocked for actor in self.actors)
        full = 0 < self._places() <= blocked  # a cluster without nodes waits for one
        nodes = [node["NodeID"][:8] for node in self._nodes() if self._room(node["Resources"])]
        none_left = bool(nodes) and all(any(node in one for one in self.left_out) for node in nodes)
        vain = not self.ever_loaded and self.unloadable >= LOADS
        if not self._usable() and (full or none_left or vain):
            raise error

    def _end_late(self) -> None:
        """End processes that take longer than the work allows."""
        for actor in [*self.actors]:
            which = "unit" if actor.loaded else "load"
            limit = self.work.within.get(which)
            if actor.answer is None or not actor.address or limit is None:
                continue
            late = self.clock() - actor.asked > limit
            if not late or self.ray.wait([actor.answer], num_returns=1, timeout=0)[0]:
                continue
            told = f"its process was ended after {limit / 60:g} minutes"
            self._gone(actor, f"{told} (resources.{which}_minutes of the teacher)")

    def _gone(self, actor: _Held[Unit], told: str) -> None:
        """Do elsewhere what a lost actor was doing."""
        self.actors.remove(actor)
        self.ray.kill(actor.handle)  # an actor that is only out of reach would go on
        if actor.unit is not None:
            self._again(actor.unit, actor.address, InputError(told))
        elif actor.loaded:  # idle: nothing is lost, and another is asked for
            return
        elif actor.address:
            self._cannot_load(actor.address, InputError(told))
        else:  # its place disappeared before it had begun: another is asked for
            self.unplaced += 1
            if self.unplaced >= UNPLACED:
                raise InputError(
                    f"{self.work.name}: no process could be started on the cluster ({told}). Is "
                    "rekindle installed on its nodes, for the same Python?"
                )

    # --- units ---

    def _usable(self) -> list[_Held[Unit]]:
        """Return the actors that have loaded, or are loading."""
        return [actor for actor in self.actors if actor.address and not actor.blocked]

    def _hand_out(self) -> None:
        """Give each idle actor a unit that has not failed on its machine. Repeat a unit on the same
        machine only if no other is left for it.
        """
        usable = self._usable()
        for actor in usable:
            if actor.answer is not None or not actor.loaded:
                continue
            unit = next((unit for unit in self.waiting if self._suits(unit, actor, usable)), None)
            if unit is None:
                actor.idle = True
            elif actor.idle:  # a lost actor must not cost a unit a try
                self._ask(actor, actor.handle.where.remote())
            else:
                self.waiting.remove(unit)
                actor.unit = unit
                self._ask(actor, actor.handle.make.remote(unit))

    def _suits(self, unit: Unit, actor: _Held[Unit], usable: list[_Held[Unit]]) -> bool:
        places = {other.address for other in usable if not self._failed(unit, other)}
        return not places or actor.address in places

    def _failed(self, unit: Unit, actor: _Held[Unit]) -> bool:
        return (_name(unit), actor.address) in self.failed_at

    def _made(self, actor: _Held[Unit], answer: object) -> None:
        unit, actor.unit = actor.unit, None
        assert unit is not None
        if isinstance(answer, Failed):
            self._again(unit, actor.address, answer.error)
            return
        assert isinstance(answer, Done)
        self._tell(answer)
        self.done += 1
        self.report(unit, answer.value)

    def _again(self, unit: Unit, address: str, error: Exception) -> None:
        name = _name(unit)
        self.tried[name] += 1
        self.failed_at.add((name, address))
        if self.tried[name] < TRIES:
            told = (self.work.name, name, address, _last_line(error))
            log.warning("%s: unit %s failed on node %s: %s", *told)
            self.waiting.appendleft(unit)
            return
        self.given_up[name] = error
        if not self.done and len(self.given_up) >= TRIES:  # the others will fail as well
            raise self.of_given_up()

    def of_given_up(self) -> Exception:
        """Return the error for units that were given up."""
        (first, error), *others = self.given_up.items()
        more = f", and so did {counted(len(others), 'other unit')}" if others else ""
        left = f"{counted(self.done, 'other unit')} are done. {GO_ON}"
        told = f"{self.work.name}: unit {first} failed {self.tried[first]} times{more}; {left}"
        return _as_here(error, told)

    # --- what is said ---

    def _tell(self, answer: object) -> None:
        """Log what an actor warned of, each line once for all actors."""
        assert isinstance(answer, Done)
        for line in answer.warnings:
            if line not in self.told:
                self.told.add(line)
                log.warning("%s", line)

    def _tell_waiting(self) -> None:
        """Say now and then that no machine has room, and for what."""
        if self._usable():
            self.idle_since = time.monotonic()
        elif time.monotonic() - self.idle_since > TELL_AGAIN:
            self.idle_since = time.monotonic()
            asked = ", ".join(f"{name} {amount:g}" for name, amount in self.needs.items() if amount)
            log.warning(
                "%s waits for a node with room for %s (`resources` of the teacher); the cluster "
                "has %s, and room for %s in all",
                *(self.work.name, asked, told_of_nodes(self._nodes())),
                counted(self._places(), "process"),
            )


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _name(unit: object) -> str:
    return str(getattr(unit, "name", unit))


def _as_here(error: Exception, told: str) -> Exception:
    """Return ``error`` as one process would raise it, with ``told`` in front."""
    if isinstance(error, RekindleError | OSError):
        return InputError(f"{told}: {error}")
    return RuntimeError(f"{told}:\n{error}")


def told_of_nodes(nodes: list[dict[str, Any]]) -> str:
    """Describe the total resources of the ``nodes``, given as Ray describes them."""
    found: Counter[str] = Counter()
    for node in nodes:
        found.update({k: v for k, v in node["Resources"].items() if k in ("CPU", "GPU")})
    return ", ".join(f"{amount:g} {name}" for name, amount in found.items()) or "no CPU"
