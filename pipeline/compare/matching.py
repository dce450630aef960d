"""Held-out losses of several runs at equal steps, and at equal total cost. Pure arithmetic.

A teacher that is never read for free is what makes distillation look better than it is: compared at
equal steps, a taught student has had its teachers' passes for nothing. The total cost of a run at a
step is therefore

    seconds of the run so far + seconds of stage 1 for every teacher that it uses, in full,

also where other runs of the cache share those teachers. Nothing is interpolated: at a cost, a run
has the loss of its last evaluation that had cost no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Point:
    """One evaluation. ``seconds`` are those of the run so far; None in logs that have none."""

    step: int
    seconds: float | None
    loss: float


@dataclass(frozen=True)
class Curve:
    """A run's evaluations in order, and what its teachers had cost before; None where unknown."""

    teacher_seconds: float | None = None
    points: list[Point] = field(default_factory=list)

    def cost(self, point: Point) -> float | None:
        """The total cost of the run up to an evaluation, in seconds."""
        if self.teacher_seconds is None or point.seconds is None:
            return None
        return self.teacher_seconds + point.seconds

    @property
    def known(self) -> bool:
        """Whether there are evaluations, each of a known cost."""
        return bool(self.points) and None not in [self.cost(point) for point in self.points]

    def within(self, cost: float) -> Point | None:
        """The last evaluation that had cost no more; None where the first had cost more."""
        costs = [(self.cost(point), point) for point in self.points]
        return next((p for c, p in reversed(costs) if c is not None and c <= cost), None)


@dataclass(frozen=True)
class Match:
    """The runs' evaluations at ``at`` steps, or ``at`` seconds of total cost; None: has none."""

    at: float
    points: list[Point | None]


def match_steps(curves: Sequence[Curve]) -> list[Match]:
    """At every step that all runs with evaluations have evaluated."""
    common = [{point.step for point in curve.points} for curve in curves if curve.points]
    if len(common) < 2:
        return []
    by_step = [{point.step: point for point in curve.points} for curve in curves]
    steps = sorted(set.intersection(*common))
    return [Match(step, [points.get(step) for points in by_step]) for step in steps]


def match_cost(curves: Sequence[Curve]) -> list[Match]:
    """At the total cost of every evaluation of the run whose last one had cost least, as far as
    another one has been evaluated by then.
    """
    known = [curve for curve in curves if curve.known]
    if len(known) < 2:
        return []
    ends = [curve.cost(curve.points[-1]) or 0.0 for curve in known]
    cheapest = known[ends.index(min(ends))]
    costs = [cheapest.cost(point) or 0.0 for point in cheapest.points]
    found = [
        Match(cost, [curve.within(cost) if curve.known else None for curve in curves])
        for cost in costs
    ]
    return [match for match in found if sum(point is not None for point in match.points) > 1]


def thinned(matches: Sequence[Match], most: int) -> list[Match]:
    """At most ``most`` of them, evenly, the last among them."""
    count = min(most, len(matches))
    return [matches[(n + 1) * len(matches) // count - 1] for n in range(count)]
