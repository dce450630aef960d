"""Which actor does what when nodes load at other times, fail or go: on a pretended cluster, whose
time is pretended, too. On a real one: tests/extras/ray.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from rekindle.data.errors import InputError
from rekindle.pipeline.processes import handing_out
from rekindle.pipeline.processes.handing_out import Done, Failed, HandingOut, running_code
from rekindle.pipeline.processes.units import Work

NEVER = float("inf")


class Lost(Exception):
    """As Ray's errors of an actor that is gone."""


@dataclass(eq=False)
class Node:
    """A node with room for so many actors, how it loads and does units, and how long it loads."""

    name: str
    places: int = 1
    loading: float = 1.0
    load: Callable[[], object] = lambda: Done(None)
    do: Callable[[int], object] = Done
    doing: float = 0.1
    code: str = ""  # other than ours
    dies_idle: bool = False  # its first process, when it has done a unit
    taken: int = 0
    loads: int = 0


class Cluster:
    """What of Ray is asked for. An answer is (when, number, what gives it)."""

    exceptions = SimpleNamespace(RayError=Lost)

    def __init__(self, *nodes: Node, later: Sequence[Node] = ()):
        self.there, self.later, self.now, self._numbers = [*nodes], [*later], 0.0, count()

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "NodeID": n.name, "Resources": {"CPU": float(n.places)}}
            for n in self.there
        ]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": float(sum(node.places - node.taken for node in self.there))}

    def options(self, **asked: object) -> "Cluster":
        return self

    def remote(self) -> object:
        node = next((node for node in self.there if node.taken < node.places), None)
        if node is None:  # it waits for room
            return SimpleNamespace(describe_node=self._method(NEVER, lambda: None))
        node.taken += 1
        lost = list[bool]()

        def where() -> tuple[str, dict[str, str]]:
            if lost:
                raise Lost("it went")
            return node.name, running_code() | ({"rekindle": node.code} if node.code else {})

        def load(*_: object) -> object:
            node.loads += 1
            return node.load()

        def make(unit: int) -> object:
            if lost:
                raise Lost("it went")
            lost.extend([True] * node.dies_idle)
            node.dies_idle = False
            return node.do(unit)

        return SimpleNamespace(
            node=node,
            describe_node=self._method(0.1, where),
            load=self._method(node.loading, load),
            make=self._method(node.doing, make),
        )

    def _method(self, seconds: float, answer: Callable[..., object]) -> object:
        def ask(*given: object) -> tuple[float, int, Callable[[], object]]:
            return self.now + seconds, next(self._numbers), lambda: answer(*given)

        return SimpleNamespace(remote=ask)

    def wait(self, answers: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], None]:
        first = min(answers, key=lambda answer: answer[:2])
        if first[0] == NEVER and self.later:
            self.there.append(self.later.pop())  # or else nothing will ever be answered
            return [], None
        if first[0] > self.now + (100.0 if timeout else 0.0):  # nothing for a while
            self.now += 1.0 if timeout else 0.0
            return [], None
        self.now = max(self.now, first[0])
        return [first], None

    def get(self, answer: Any) -> object:
        return answer[2]()

    def kill(self, handle: Any) -> None:
        if (node := getattr(handle, "node", None)) is not None:
            node.taken -= 1


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handing_out, "ROOM_CHECK_SECONDS", 1e-9)


def handing_out_of(cluster: Cluster, found: list[int], units: int, **within: float) -> Any:
    work = Work("numbers", lambda: lambda unit: unit, range(units), time_limits=within)
    report, clock = (lambda _, unit: found.append(unit)), (lambda: cluster.now)
    return HandingOut(cluster, cluster, work, report, max_actors=12, clock=clock)


def done_by(cluster: Cluster, **within: float) -> list[int]:
    """The units that are done of twelve."""
    found = list[int]()
    handing_out_of(cluster, found, 12, **within).run()
    return sorted(found)


def no_model() -> Failed:
    return Failed(InputError("there is no such model"))


def test_a_node_that_cannot_load_does_not_end_it_while_another_loads() -> None:
    """However many places it has, and however soon it fails."""
    bad, good = Node("bad", places=4, load=no_model), Node("good", loading=60.0)
    assert done_by(Cluster(bad, good)) == [*range(12)]


def test_nowhere_to_load() -> None:
    with pytest.raises(InputError, match=r"numbers cannot be loaded on node .*no such model"):
        done_by(Cluster(Node("one", load=no_model), Node("two", load=no_model, loading=60.0)))


def test_it_ends_where_those_that_could_have_done_it_go_later() -> None:
    """A node full of somebody else's work may get room: it is waited for as long as it is there."""
    leaving = Node("leaving", taken=1)

    class Shrinking(Cluster):
        def wait(self, *given: Any, **how: Any) -> Any:
            assert self.now < 1000, "it waits for ever"
            if self.now > 20 and leaving in self.there:
                self.there.remove(leaving)
            return super().wait(*given, **how)

    cluster = Shrinking(Node("one", load=no_model), Node("two", load=no_model), leaving)
    with pytest.raises(InputError, match=r"numbers cannot be loaded on node .*no such model"):
        done_by(cluster)
    assert cluster.now > 20


def test_a_node_that_fails_at_every_unit_leaves_them_to_one_that_still_loads() -> None:
    tried = list[int]()

    def fail(unit: int) -> Failed:
        tried.append(unit)
        return Failed(InputError("its device is broken"))

    cluster = Cluster(Node("broken", do=fail), Node("good", loading=60.0))
    assert done_by(cluster) == [*range(12)]
    assert tried == [*range(12)]


def test_the_only_node_goes_while_it_loads() -> None:
    """Another is waited for, though there is no place meanwhile."""

    def go() -> object:
        cluster.there.clear()
        raise Lost("its node went")

    cluster = Cluster(Node("first", load=go), later=[Node("another")])
    assert done_by(cluster) == [*range(12)]


def die(*_: object) -> object:
    raise Lost("killed: out of memory")


def test_a_node_whose_process_dies_at_every_load_is_left_out(caplog: Any) -> None:
    bad, good = Node("bad", load=die), Node("good", doing=5.0)
    assert done_by(Cluster(bad, good)) == [*range(12)]
    assert bad.loads == handing_out.LOADS
    assert sum("left out" in line for line in caplog.messages) == 1


def test_it_ends_where_every_node_is_left_out() -> None:
    """Also where a load has succeeded before."""
    node = Node("one")

    def once(unit: int) -> object:
        node.load = die
        return die() if unit else Done(unit)

    node.do = once
    with pytest.raises(InputError, match=r"numbers cannot be loaded on node one.*out of memory"):
        done_by(Cluster(node))
    assert node.loads == 1 + handing_out.LOADS


@pytest.mark.parametrize("what", ["load", "unit"])
def test_a_node_that_hangs_does_not_hold_the_run(what: str) -> None:
    hung = Node("hung", loading=1e9) if what == "load" else Node("hung", doing=1e9)
    cluster = Cluster(hung, Node("good", loading=30.0, doing=50.0))
    assert done_by(cluster, **{what: 60.0}) == [*range(12)]
    assert cluster.now < 2000


def test_a_node_of_other_code_that_joins_takes_no_part(caplog: Any) -> None:
    stranger = Node("stranger", code="other")

    def joins(unit: int) -> Done:
        if unit == 2:
            cluster.there.append(stranger)
        return Done(unit)

    cluster = Cluster(Node("good", do=joins))
    assert done_by(cluster) == [*range(12)]
    assert (stranger.taken, stranger.loads) == (1, 0)
    assert sum("has other code" in line for line in caplog.messages) == 1


def test_an_idle_process_that_is_lost_costs_no_unit_a_try() -> None:
    """What has failed on the one node is for the other, whose process has gone."""
    answers = [Failed(InputError("its device is broken"))]
    fails = Node("fails", doing=9.0, do=lambda unit: answers.pop() if answers else Done(unit))
    found = list[int]()
    made = handing_out_of(Cluster(fails, Node("other", dies_idle=True)), found, 2)
    made.run()
    assert sorted(found) == [0, 1]
    assert made.tried == {"0": 1}


def test_it_ends_where_the_last_other_node_goes_after_one_was_left_out() -> None:
    """An idle node without an answer to come tells nobody that it went."""
    stranger = Node("stranger", code="other")
    going = Node("going", taken=1)  # others fill it
    cluster = Cluster(going, stranger)
    made = handing_out_of(cluster, list[int](), 2)
    go_on(made, 5)
    cluster.there.remove(going)
    with pytest.raises(InputError, match="has other code"):
        go_on(made, 5)


def go_on(made: Any, times: int) -> None:
    for _ in range(times):
        made.go_on()
