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
from rekindle.pipeline.processes.same_code import code_difference, running_code, version_differences
from rekindle.pipeline.processes.units import Result, Unit, Work

log = logging.getLogger("rekindle")

TRIES = 3  # tries per unit, each on another node if possible, before giving it up
LOADS = 3  # failed loads in a row before a node, or work that never loaded anywhere, is given up
LOST_STARTS = 10  # processes lost in a row before they have begun
ROOM_CHECK_SECONDS = 1.0  # seconds between two checks for room in the cluster
WAITING_WARNING_SECONDS = 60.0  # seconds between two messages that nothing can run
_RAY_KEYWORDS = {"num_cpus", "num_gpus", "memory"}  # resources for which Ray has keywords


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
class _ActorState(Generic[Unit]):
    """An actor as seen from this process."""

    handle: Any
    answer: Any  # the answer waited for
    address: str = ""  # of its machine; empty while it has no room
    is_loaded: bool = False
    is_blocked: bool = False  # it cannot load; it keeps others from its place
    unit: Unit | None = None
    requested_at: float = 0.0  # clock time of the request
    was_idle: bool = False  # there was nothing for it; it may have been lost unnoticed since


@dataclass
class HandingOut(Generic[Unit, Result]):
    """The units of one work, and the actors that do them."""

    ray: Any
    actor: Any  # the class of the actors after ``ray.remote``
    work: Work[Unit, Result]
    report: Callable[[Unit, Result], None]
    max_actors: int
    waiting: deque[Unit] = field(default_factory=deque)
    actors: list[_ActorState[Unit]] = field(default_factory=list)
    tried: Counter[str] = field(default_factory=Counter)
    failed_at: set[tuple[str, str]] = field(default_factory=set)  # unit, address
    given_up: dict[str, Exception] = field(default_factory=dict)
    done: int = 0
    has_loaded: bool = False
    failed_loads: int = 0  # failed loads
    failed_in_a_row: Counter[str] = field(
        default_factory=Counter
    )  # failed loads in a row, by address
    # nodes by address, with the reason
    left_out: dict[str, Exception] = field(default_factory=dict)
    unable: tuple[str, Exception] | None = None  # the last node that cannot do the work, and why
    lost_starts: int = 0  # processes lost in a row before they had begun
    logged: set[str] = field(default_factory=set)
    room_checked_at: float = float("-inf")
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
            raise self.given_up_error()

    @property
    def pending(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting) or any(actor.unit is not None for actor in self.actors)

    def go_on(self) -> None:
        """Hand out what is possible, and wait a while for answers."""
        self._add_actors()
        self._hand_out()
        if self.unable is not None and self.waiting:  # the others may have gone since
            self._go_on_elsewhere(*self.unable)
        answers = {actor.answer: actor for actor in self.actors if actor.answer is not None}
        if not answers:  # the last one is lost: look for room for another
            time.sleep(ROOM_CHECK_SECONDS)
            return
        ready, _ = self.ray.wait([*answers], num_returns=1, timeout=ROOM_CHECK_SECONDS)
        for answer in ready:
            self._process_answer(answers[answer])
        self._end_overdue()
        self._warn_of_waiting()

    def close(self) -> None:
        """Release the machines at once; uncommitted work of a unit is done again later."""
        for actor in self.actors:
            self.ray.kill(actor.handle)

    # --- actors ---

    def _add_actors(self) -> None:
        """Ask for as many actors as the cluster has room for now, plus one.

        The extra one starts when a machine joins, or makes a scheduler add a machine.
        """
        if time.monotonic() - self.room_checked_at < ROOM_CHECK_SECONDS:
            return
        self.room_checked_at = time.monotonic()
        starting_count = sum(not actor.address for actor in self.actors)
        usable_count = sum(not actor.is_blocked for actor in self.actors)
        busy_count = sum(actor.unit is not None for actor in self.actors)
        missing_count = min(self.max_actors, len(self.waiting) + busy_count) - usable_count
        ray_keywords = {name: self.needs[name] for name in _RAY_KEYWORDS & self.needs.keys()}
        others = {name: amount for name, amount in self.needs.items() if name not in _RAY_KEYWORDS}
        actor_class = self.actor.options(**ray_keywords, resources=others, max_restarts=0)
        for _ in range(
            min(missing_count, self._room(self.ray.available_resources()) + 1 - starting_count)
        ):
            handle = actor_class.remote()
            self.actors.append(_ActorState(handle, handle.describe_node.remote()))

    def _room(self, free: Mapping[str, float]) -> int:
        """Return how many actors fit into the ``free`` resources, by Ray's names."""
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        amounts = {names.get(name, name): amount for name, amount in self.needs.items() if amount}
        return int(
            min((free.get(name, 0) // amount for name, amount in amounts.items()), default=0)
        )

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _cluster_room(self) -> int:
        """Return how many actors the whole cluster has room for."""
        return sum(self._room(node["Resources"]) for node in self._nodes())

    def _process_answer(self, actor: _ActorState[Unit]) -> None:
        """Process an actor's answer."""
        try:
            answer = self.ray.get(actor.answer)
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            self._replace_lost(actor, f"its process was lost ({reason})")
            return
        actor.answer = None
        if not actor.address:
            self._start_loading(actor, *answer)
        elif not actor.is_loaded:
            self._finish_loading(actor, answer)
        elif actor.unit is not None:
            self._finish_unit(actor, answer)
        else:  # an idle one is still there
            actor.was_idle = False

    def _expect(self, actor: _ActorState[Unit], answer: Any) -> None:
        actor.answer, actor.requested_at = answer, self.clock()

    def _start_loading(
        self, actor: _ActorState[Unit], address: str, node_code: Mapping[str, str]
    ) -> None:
        actor.address, self.lost_starts, own_code = address, 0, running_code()
        if (error := code_difference(address, node_code, own_code)) is not None:
            self._leave_out(address, error)
        if address in self.left_out:
            actor.is_blocked = True
            self._go_on_elsewhere(address, self.left_out[address])
            return
        if warning := version_differences(address, node_code, own_code):
            self._log_warnings(Done(None, (warning,)))
        threads, gpus = max(1, int(self.needs["num_cpus"])), self.needs["num_gpus"]
        self._expect(actor, actor.handle.load.remote(self.work.load, os.getcwd(), threads, gpus))

    def _finish_loading(self, actor: _ActorState[Unit], answer: object) -> None:
        if isinstance(answer, Failed):
            actor.is_blocked = True
            self._cannot_load(actor.address, answer.error)
            return
        self._log_warnings(answer)
        actor.is_loaded = self.has_loaded = True
        self.failed_in_a_row[actor.address] = 0

    def _cannot_load(self, address: str, error: Exception) -> None:
        """Continue where the work can still be loaded; raise ``error`` if that is nowhere."""
        self.failed_loads += 1
        self.failed_in_a_row[address] += 1
        error = _as_here(error, f"{self.work.name} cannot be loaded on node {address}")
        if self.failed_in_a_row[address] >= LOADS:
            self._leave_out(address, error)
        else:
            log.warning("%s", _last_line(error))
        self.unable = address, error
        self._go_on_elsewhere(address, error)

    def _leave_out(self, address: str, error: Exception) -> None:
        """Stop using a node, and say so once."""
        if address not in self.left_out:
            self.left_out[address], self.unable = error, (address, error)
            log.warning("%s. The node is left out from now on", _last_line(error).rstrip("."))

    def _go_on_elsewhere(self, address: str, error: Exception) -> None:
        """Raise ``error`` of the node at ``address`` if no other node can do the work."""
        blocked_count = sum(actor.is_blocked for actor in self.actors)
        is_full = 0 < self._cluster_room() <= blocked_count  # a cluster without nodes waits for one
        nodes = [node["NodeID"][:8] for node in self._nodes() if self._room(node["Resources"])]
        is_none_left = bool(nodes) and all(
            any(node in one for one in self.left_out) for node in nodes
        )
        is_in_vain = not self.has_loaded and self.failed_loads >= LOADS
        if not self._usable_actors() and (is_full or is_none_left or is_in_vain):
            raise error

    def _end_overdue(self) -> None:
        """End processes that take longer than the work allows."""
        for actor in [*self.actors]:
            step = "unit" if actor.is_loaded else "load"
            limit = self.work.time_limits.get(step)
            if actor.answer is None or not actor.address or limit is None:
                continue
            is_late = self.clock() - actor.requested_at > limit
            if not is_late or self.ray.wait([actor.answer], num_returns=1, timeout=0)[0]:
                continue
            reason = f"its process was ended after {limit / 60:g} minutes"
            self._replace_lost(actor, f"{reason} (resources.{step}_minutes of the teacher)")

    def _replace_lost(self, actor: _ActorState[Unit], reason: str) -> None:
        """Do elsewhere what a lost actor was doing."""
        self.actors.remove(actor)
        self.ray.kill(actor.handle)  # an actor that is only out of reach would go on
        if actor.unit is not None:
            self._retry(actor.unit, actor.address, InputError(reason))
        elif actor.is_loaded:  # idle: nothing is lost, and another is asked for
            return
        elif actor.address:
            self._cannot_load(actor.address, InputError(reason))
        else:  # its place disappeared before it had begun: another is asked for
            self.lost_starts += 1
            if self.lost_starts >= LOST_STARTS:
                raise InputError(
                    f"{self.work.name}: no process could be started on the cluster ({reason}). Is "
                    "rekindle installed on its nodes, for the same Python?"
                )

    # --- units ---

    def _usable_actors(self) -> list[_ActorState[Unit]]:
        """Return the actors that have loaded, or are loading."""
        return [actor for actor in self.actors if actor.address and not actor.is_blocked]

    def _hand_out(self) -> None:
        """Give each idle actor a unit that has not failed on its machine. Repeat a unit on the same
        machine only if no other is left for it.
        """
        usable = self._usable_actors()
        for actor in usable:
            if actor.answer is not None or not actor.is_loaded:
                continue
            unit = next(
                (unit for unit in self.waiting if self._is_suitable(unit, actor, usable)), None
            )
            if unit is None:
                actor.was_idle = True
            elif actor.was_idle:  # a lost actor must not cost a unit a try
                self._expect(actor, actor.handle.describe_node.remote())
            else:
                self.waiting.remove(unit)
                actor.unit = unit
                self._expect(actor, actor.handle.make.remote(unit))

    def _is_suitable(
        self, unit: Unit, actor: _ActorState[Unit], usable: list[_ActorState[Unit]]
    ) -> bool:
        places = {other.address for other in usable if not self._has_failed(unit, other)}
        return not places or actor.address in places

    def _has_failed(self, unit: Unit, actor: _ActorState[Unit]) -> bool:
        return (_unit_name(unit), actor.address) in self.failed_at

    def _finish_unit(self, actor: _ActorState[Unit], answer: object) -> None:
        unit, actor.unit = actor.unit, None
        assert unit is not None
        if isinstance(answer, Failed):
            self._retry(unit, actor.address, answer.error)
            return
        assert isinstance(answer, Done)
        self._log_warnings(answer)
        self.done += 1
        self.report(unit, answer.value)

    def _retry(self, unit: Unit, address: str, error: Exception) -> None:
        name = _unit_name(unit)
        self.tried[name] += 1
        self.failed_at.add((name, address))
        if self.tried[name] < TRIES:
            arguments = (self.work.name, name, address, _last_line(error))
            log.warning("%s: unit %s failed on node %s: %s", *arguments)
            self.waiting.appendleft(unit)
            return
        self.given_up[name] = error
        if not self.done and len(self.given_up) >= TRIES:  # the others will fail as well
            raise self.given_up_error()

    def given_up_error(self) -> Exception:
        """Return the error for units that were given up."""
        (first, error), *others = self.given_up.items()
        others_note = f", and so did {counted(len(others), 'other unit')}" if others else ""
        done_note = f"{counted(self.done, 'other unit')} are done. {GO_ON}"
        failed = f"unit {first} failed {self.tried[first]} times{others_note}"
        return _as_here(error, f"{self.work.name}: {failed}; {done_note}")

    # --- what is said ---

    def _log_warnings(self, answer: object) -> None:
        """Log what an actor warned of, each line once for all actors."""
        assert isinstance(answer, Done)
        for line in answer.warnings:
            if line not in self.logged:
                self.logged.add(line)
                log.warning("%s", line)

    def _warn_of_waiting(self) -> None:
        """Say now and then that no machine has room, and for what."""
        if self._usable_actors():
            self.idle_since = time.monotonic()
        elif time.monotonic() - self.idle_since > WAITING_WARNING_SECONDS:
            self.idle_since = time.monotonic()
            needs_text = ", ".join(
                f"{name} {amount:g}" for name, amount in self.needs.items() if amount
            )
            log.warning(
                "%s waits for a node with room for %s (`resources` of the teacher); the cluster "
                "has %s, and room for %s in all",
                *(self.work.name, needs_text, describe_nodes(self._nodes())),
                counted(self._cluster_room(), "process"),
            )


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _unit_name(unit: object) -> str:
    return str(getattr(unit, "name", unit))


def _as_here(error: Exception, prefix: str) -> Exception:
    """Return ``error`` as one process would raise it, with ``prefix`` in front."""
    if isinstance(error, RekindleError | OSError):
        return InputError(f"{prefix}: {error}")
    return RuntimeError(f"{prefix}:\n{error}")


def describe_nodes(nodes: list[dict[str, Any]]) -> str:
    """Describe the total resources of the ``nodes``, given as Ray describes them."""
    totals: Counter[str] = Counter()
    for node in nodes:
        totals.update({k: v for k, v in node["Resources"].items() if k in ("CPU", "GPU")})
    return ", ".join(f"{amount:g} {name}" for name, amount in totals.items()) or "no CPU"
