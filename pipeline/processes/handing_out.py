"""Hands the units of one work out to actors of a cluster that come and go, until all are done.

What a cluster is, is said by ``ray``, an argument: this file imports none.
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

TRIES = 3  # of a unit, each on another node if there is one, before it is given up
LOADS = 3  # that fail in a row before a node is left out; or the work, where no load succeeded
UNPLACED = 10  # processes in a row that are lost before they have begun
LOOK_AGAIN = 1.0  # seconds between two looks at whether the cluster has room
TELL_AGAIN = 60.0  # seconds between two lines that nothing can run
_NAMED = {"num_cpus", "num_gpus", "memory"}  # needs that Ray has words of its own for


@dataclass(frozen=True)
class Failed:
    """What an actor answers where its work raised ``error``."""

    error: Exception


@dataclass(frozen=True)
class Done:
    """What an actor answers: a result, and what its code warned of meanwhile."""

    value: Any
    warnings: tuple[str, ...] = ()


@dataclass(eq=False)
class _Held(Generic[Unit]):
    """An actor as it is seen from here."""

    handle: Any
    answer: Any  # what is waited for
    address: str = ""  # of its machine; none while it has no room
    loaded: bool = False
    blocked: bool = False  # it cannot load; it keeps others from its place
    unit: Unit | None = None
    asked: float = 0.0  # when, by the clock
    idle: bool = False  # there was nothing for it: it may be lost since, and nobody has noticed


@dataclass
class HandingOut(Generic[Unit, Result]):
    """The units of one work, and the actors that do them."""

    ray: Any
    actor: Any  # what ``ray.remote`` makes of the actors' class
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
    unloadable: int = 0  # loads that failed
    in_a_row: Counter[str] = field(default_factory=Counter)  # the same, by address
    left_out: dict[str, Exception] = field(default_factory=dict)  # nodes, by address, and why
    cannot: tuple[str, Exception] | None = None  # the last node that cannot do it, and why
    unplaced: int = 0  # processes in a row that were lost before they had begun
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
        """Whether there is anything to do."""
        return bool(self.waiting) or any(actor.unit is not None for actor in self.actors)

    def go_on(self) -> None:
        """Hand out what can be, and wait a while for answers."""
        self._grow()
        self._hand_out()
        if self.cannot is not None and self.waiting:  # the others may have gone since
            self._go_on_elsewhere(*self.cannot)
        answers = {actor.answer: actor for actor in self.actors if actor.answer is not None}
        if not answers:  # the last one is lost: room for another is looked for again
            time.sleep(LOOK_AGAIN)
            return
        ready, _ = self.ray.wait([*answers], num_returns=1, timeout=LOOK_AGAIN)
        for answer in ready:
            self._take(answers[answer])
        self._end_late()
        self._tell_waiting()

    def close(self) -> None:
        """Let go of the machines at once; what a unit has not committed is made again."""
        for actor in self.actors:
            self.ray.kill(actor.handle)

    # --- actors ---

    def _grow(self) -> None:
        """Ask for as many actors as the cluster has room for now, and for one more: where a machine
        comes, or a scheduler that adds machines is asked, it begins there.
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
        """How many actors fit into what is ``free``, by Ray's names of resources."""
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        asked = {names.get(name, name): amount for name, amount in self.needs.items() if amount}
        return int(min((free.get(name, 0) // amount for name, amount in asked.items()), default=0))

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _places(self) -> int:
        """How many actors the cluster has room for in all."""
        return sum(self._room(node["Resources"]) for node in self._nodes())

    def _take(self, actor: _Held[Unit]) -> None:
        """Take what an actor answers."""
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
        else:  # an idle one is there still
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
        """Go on where the work can be loaded, or may be; raise ``error`` where that is nowhere."""
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
        """Use a node no more, however often it is met, and say so once."""
        if address not in self.left_out:
            self.left_out[address], self.cannot = error, (address, error)
            log.warning("%s. The node is left out from now on", _last_line(error).rstrip("."))

    def _go_on_elsewhere(self, address: str, error: Exception) -> None:
        """Raise ``error``, of the node at ``address``, where no other can do the work."""
        blocked = sum(actor.blocked for actor in self.actors)
        full = 0 < self._places() <= blocked  # a cluster without a node waits for one
        nodes = [node["NodeID"][:8] for node in self._nodes() if self._room(node["Resources"])]
        none_left = bool(nodes) and all(any(node in one for one in self.left_out) for node in nodes)
        vain = not self.ever_loaded and self.unloadable >= LOADS
        if not self._usable() and (full or none_left or vain):
            raise error

    def _end_late(self) -> None:
        """End the processes that take longer than the work allows."""
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
        """Do what an actor was doing elsewhere."""
        self.actors.remove(actor)
        self.ray.kill(actor.handle)  # one that is only out of reach would go on
        if actor.unit is not None:
            self._again(actor.unit, actor.address, InputError(told))
        elif actor.loaded:  # idle: nothing is lost with it, and another is asked for
            return
        elif actor.address:
            self._cannot_load(actor.address, InputError(told))
        else:  # its place went before it had begun: another is asked for
            self.unplaced += 1
            if self.unplaced >= UNPLACED:
                raise InputError(
                    f"{self.work.name}: no process could be started on the cluster ({told}). Is "
                    "rekindle installed on its nodes, for the same Python?"
                )

    # --- units ---

    def _usable(self) -> list[_Held[Unit]]:
        """Return the actors that have loaded, or are at it."""
        return [actor for actor in self.actors if actor.address and not actor.blocked]

    def _hand_out(self) -> None:
        """Give each idle actor a unit that has not failed where it is, if there is one; another
        only where no machine is left for that.
        """
        usable = self._usable()
        for actor in usable:
            if actor.answer is not None or not actor.loaded:
                continue
            unit = next((unit for unit in self.waiting if self._suits(unit, actor, usable)), None)
            if unit is None:
                actor.idle = True
            elif actor.idle:  # a lost one must not cost a unit a try
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
        if not self.done and len(self.given_up) >= TRIES:  # so will the others
            raise self.of_given_up()

    def of_given_up(self) -> Exception:
        """What is raised for units that were given up."""
        (first, error), *others = self.given_up.items()
        more = f", and so did {counted(len(others), 'other unit')}" if others else ""
        left = f"{counted(self.done, 'other unit')} are done. {GO_ON}"
        told = f"{self.work.name}: unit {first} failed {self.tried[first]} times{more}; {left}"
        return _as_here(error, told)

    # --- what is said ---

    def _tell(self, answer: object) -> None:
        """Log what an actor warned of, each line once, whichever said it."""
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
    """``error`` as it would be raised in one process, with what was ``told`` of it in front."""
    if isinstance(error, RekindleError | OSError):
        return InputError(f"{told}: {error}")
    return RuntimeError(f"{told}:\n{error}")


def told_of_nodes(nodes: list[dict[str, Any]]) -> str:
    """Say what the ``nodes``, as Ray describes them, have in all."""
    found: Counter[str] = Counter()
    for node in nodes:
        found.update({k: v for k, v in node["Resources"].items() if k in ("CPU", "GPU")})
    return ", ".join(f"{amount:g} {name}" for name, amount in found.items()) or "no CPU"
