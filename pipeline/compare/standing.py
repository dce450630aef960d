"""Which run is best at a task, by how much, and whether that is more than chance. Pure arithmetic.

The run with the highest score is held against every other. Chance is what another draw of the test
rows would change (the rows are drawn again, the same for all runs: a paired bootstrap), or, of
scores over several seeds, what other seeds would (Student's t over the pairs). Its interval is wide
enough to hold for all of these comparisons at once (Bonferroni, 95 %), so that the best of many
runs is not taken for better than it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rekindle.pipeline.report.scores import TaskScores
from rekindle.pipeline.report.significance import LEVEL, Difference, paired

DRAWS = 2000  # of the test rows

Draws = NDArray[np.float64]


@dataclass(frozen=True)
class Standing:
    """A task: what every run scored, ``best`` the highest of them, and its differences to the
    others, the nearest first; empty where one run alone has a score. ``rows`` is the number of
    test rows where heads were scored on them, None of scores of seeds.
    """

    scores: TaskScores
    best: str
    differences: list[Difference]
    rows: int | None = None

    @property
    def beaten(self) -> list[Difference]:
        """The differences that are more than chance."""
        return [one for one in self.differences if one.low is not None and one.low > 0]

    @property
    def is_best(self) -> bool:
        """Whether the best run is better than all others by more than chance."""
        return bool(self.differences) and len(self.beaten) == len(self.differences)

    @property
    def verdict(self) -> str:
        """All of it in a sentence, without its full stop."""
        task, value = self.scores, self.mean(self.best)
        what = f"{task.metric} {value:.4f} on {task.split}"
        if not self.differences:
            return f"{self.best} alone has a score on {task.task}: {what}"
        near = [one for one in self.differences if one not in self.beaten]
        if self.beaten:
            first = self.beaten[0]
            told = f"{self.best} is best on {task.task} by {_by(first)} over {first.against}"
            told += f" ({what})"
            return f"{told}; not told apart from {_names(near)}" if near else told
        if near[0].low is None:
            told = f"{self.best} has the highest score on {task.task} ({what}), by {_by(near[0])}"
            return f"{told} over {near[0].against}; whether that is chance is not known"
        first, *others = near
        more = f", {_names(others)}" if others else ""
        return (
            f"No run is shown to be best on {task.task}: {self.best} has the highest score ({what})"
            f", not told apart from {first.against} (more by {_by(first)}){more}"
        )

    def as_dict(self) -> dict[str, object]:
        """As plain values for JSON."""
        scores = self.scores
        about: dict[str, object] = {"task": scores.task, "metric": scores.metric}
        about |= {"split": scores.split, "rows": self.rows}
        values = {"scores": dict(scores.scores), "best": self.best, "is_best": self.is_best}
        differences = [
            {"against": one.against, "difference": one.mean, "low": one.low, "high": one.high}
            for one in self.differences
        ]
        return about | values | {"differences": differences, "verdict": self.verdict}

    def mean(self, run: str) -> float:
        """The run's score."""
        values = self.scores.of(run)
        return sum(values) / len(values)


def standing_of(
    scores: TaskScores, draws: Mapping[str, Draws] | None = None, rows: int | None = None
) -> Standing | None:
    """The runs of ``scores`` in their standing; None where no run has a score.

    ``draws``: by run its scores on the same draws of so many test ``rows``, where it was scored on
    them.
    """
    means = {run: sum(own) / len(own) for run in scores.scores if (own := scores.of(run))}
    if not means:
        return None
    best = max(means, key=lambda run: means[run])
    others = sorted((run for run in means if run != best), key=lambda run: -means[run])
    level = 1 - (1 - LEVEL) / max(1, len(others))

    def difference(other: str) -> Difference:
        names = (best, other, scores.task)
        mean = means[best] - means[other]
        if draws is not None:
            low, high = interval(draws[best] - draws[other], level)
            return Difference(*names, mean, low, high, None, None, 1)
        first, second = scores.of(other), scores.of(best)
        if len(first) != len(second):
            return Difference(*names, mean, None, None, None, None, 1)
        return paired(first, second, level, names)

    return Standing(scores, best, [difference(other) for other in others], rows)


def draw(score: Callable[[NDArray[np.int64]], float], rows: int, draws: int = DRAWS) -> Draws:
    """``score`` of so many draws of ``rows`` rows with replacement: the same draws at every call
    with as many rows, so that what two models score on them belongs together.
    """
    generator = np.random.Generator(np.random.Philox(key=[0, rows]))
    return np.array([score(generator.integers(0, rows, rows)) for _ in range(draws)])


def interval(values: Draws, level: float) -> tuple[float, float]:
    """Between these quantiles lies the share ``level`` of the values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _by(one: Difference) -> str:
    bounds = "" if one.low is None else f" [{one.low:.3f}, {one.high or 0.0:.3f}]"
    return f"{one.mean:.3f}{bounds}"


def _names(ones: Sequence[Difference]) -> str:
    return ", ".join(one.against for one in ones)
