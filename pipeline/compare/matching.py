"""Held-out losses of several runs at equal steps, and at equal total cost. Pure arithmetic.

Distillation looks better than it is if running the teachers costs nothing: at equal steps, a
student with teachers had their passes for free. The total cost of a run at a step is therefore

  seconds of the run so far + seconds of stage 1 for every teacher that it uses, in full,

even if other runs of the cache share those teachers. Nothing is interpolated: at a given cost, a
run has the loss of its last evaluation that cost no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Point:
    """One evaluation. ``seconds``: of the run so far; None in logs that lack them."""

    step: int
    seconds: float | None
    loss: float


@dataclass(frozen=True)
class Curve:
    """A run's evaluations in order, and the seconds of its teachers; None if unknown."""

    teacher_seconds: float | None = None
    points: list[Point] = field(default_factory=list)

    def cost(self, point: Point) -> float | None:
        """Return the total cost of the run up to an evaluation, in seconds."""
        if self.teacher_seconds is None or point.seconds is None:
            return None
        return self.teacher_seconds + point.seconds

    @property
    def has_known_cost(self) -> bool:
        """Whether there are evaluations, each with a known cost."""
        return bool(self.points) and None not in [self.cost(point) for point in self.points]

    def within(self, cost: float) -> Point | None:
        """Return the last evaluation that cost no more; None if the first cost more."""
        costs = [(self.cost(point), point) for point in self.points]
        return next((p for c, p in reversed(costs) if c is not None and c <= cost), None)


@dataclass(frozen=True)
class Match:
    """The runs' evaluations at ``at`` steps, or ``at`` seconds of total cost; None: no
    evaluation.
    """

    at: float
    points: list[Point | None]


def match_steps(curves: Sequence[Curve]) -> list[Match]:
    """Match at every step at which all runs with evaluations were evaluated."""
    common = [{point.step for point in curve.points} for curve in curves if curve.points]
    if len(common) < 2:
        return []
    by_step = [{point.step: point for point in curve.points} for curve in curves]
    steps = sorted(set.intersection(*common))
    return [Match(step, [points.get(step) for points in by_step]) for step in steps]


def match_cost(curves: Sequence[Curve]) -> list[Match]:
    """Match at the total cost of every evaluation of the run whose last evaluation cost least,
    where another run has been evaluated by then.
    """
    known = [curve for curve in curves if curve.has_known_cost]
    if len(known) < 2:
        return []
    total_costs = [curve.cost(curve.points[-1]) or 0.0 for curve in known]
    cheapest = known[total_costs.index(min(total_costs))]
    costs = [cheapest.cost(point) or 0.0 for point in cheapest.points]
    matches = [
        Match(cost, [curve.within(cost) if curve.has_known_cost else None for curve in curves])
        for cost in costs
    ]
    return [match for match in matches if sum(point is not None for point in match.points) > 1]


def thin_out(matches: Sequence[Match], most: int) -> list[Match]:
    """Return at most ``most`` of the matches, evenly spaced, including the last."""
    count = min(most, len(matches))
    return [matches[(n + 1) * len(matches) // count - 1] for n in range(count)]
