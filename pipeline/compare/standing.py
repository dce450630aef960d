"""Which run is best at a task, by how much, and whether that is more than chance. Pure arithmetic.

The run with the highest score is held against every other. Chance is what another draw of the test
rows would change (the rows are drawn again, the same for all runs: a paired bootstrap), or, of
scores over several seeds, what other seeds would (Student's t: over the pairs where both runs have
the same seeds, else Welch's of two samples). The data choose which run is held against the others,
so the intervals are wide enough to hold for all pairs of runs at once, at 95 %: those of rows by
the largest deviation that any pair has in a draw (max-T), those of seeds by Bonferroni. A run is
best only where it beats all others.

The bootstrap is too sure of few rows. Of fewer than ``LEAST_ROWS`` rows nothing is said of chance;
and where every row is right or wrong (accuracy), an interval also holds 0 unless the exact sign
test of the rows on which two runs differ, by Holm's adjustment over all pairs, says otherwise.
Neither is anything said of seeds whose differences are all the same: nothing varied.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rekindle.pipeline.report.scores import TaskScores
from rekindle.pipeline.report.significance import LEVEL, Difference, holm, paired, unpaired

DRAWS = 2000  # of the test rows
LEAST_ROWS = 30  # below, chance is not told

Draws = NDArray[np.float64]
Right = NDArray[np.bool_]  # which rows a run has right
Interval = tuple[float, float]


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
        what = f"{task.measured} {value:.4f} on {task.scored_on}"
        if not self.differences:
            return f"{self.best} alone has a score on {task.task}: {what}"
        near = [one for one in self.differences if one not in self.beaten]
        if self.beaten:
            first, *others = self.beaten
            if not near:
                told = f"{self.best} is best on {task.task} by {_by(first)}"
                return f"{told} over {first.against} ({what})"
            told = f"{self.best} is better on {task.task} than {first.against} by {_by(first)}"
            more = f", and than {_names(others)}" if others else ""
            return f"{told}{more} ({what}); not told apart from {_names(near)}"
        if near[0].low is None:
            told = f"{self.best} has the highest score on {task.task} ({what}), by {_by(near[0])}"
            told += f" over {near[0].against}; whether that is chance is not known"
            return told if self.rows is None else f"{told} of fewer than {LEAST_ROWS} rows"
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


@dataclass(frozen=True)
class OnRows:
    """What runs scored on the same ``rows``: by run its scores on ``draws`` of them, and, where
    every row is right or wrong, which it has ``right``.
    """

    rows: int
    draws: Mapping[str, Draws]
    right: Mapping[str, Right]


def standing_of(scores: TaskScores, on_rows: OnRows | None = None) -> Standing | None:
    """The runs of ``scores`` in their standing; None where no run has a score.

    ``on_rows``: of heads that were scored on test rows; else the scores are those of seeds.
    """
    means = {run: sum(own) / len(own) for run in scores.scores if (own := scores.of(run))}
    if not means:
        return None
    ranked = sorted(means, key=lambda run: -means[run])  # so every difference of a pair is >= 0
    best, *others = ranked
    if on_rows is None:
        pairs = len(ranked) * len(others) // 2
        differences = [_over_seeds(scores, best, other, pairs) for other in others]
        return Standing(scores, best, differences)
    bounds: list[Interval] | list[tuple[None, None]] = [(None, None)] * len(others)
    if others and on_rows.rows >= LEAST_ROWS:
        bounds = _intervals(ranked, means, on_rows)[: len(others)]
    differences = [
        Difference(best, other, scores.task, means[best] - means[other], *between, None, None, 1)
        for other, between in zip(others, bounds, strict=True)
    ]
    return Standing(scores, best, differences, on_rows.rows)


def _over_seeds(scores: TaskScores, best: str, other: str, pairs: int) -> Difference:
    """The difference over seeds: of the pairs where both runs have the same seeds."""
    level, names = 1 - (1 - LEVEL) / pairs, (best, other, scores.task)
    first, second = scores.by_seed(other), scores.by_seed(best)
    if not first or first.keys() != second.keys():
        return unpaired(scores.of(other), scores.of(best), level, names)
    found = paired([*first.values()], [second[seed] for seed in first], level, names)
    return replace(found, low=None, high=None) if found.p is None else found


def _intervals(runs: Sequence[str], means: Mapping[str, float], on: OnRows) -> list[Interval]:
    """The intervals of all pairs of runs at once: first − second, first − third, …"""
    first, second = np.triu_indices(len(runs), 1)
    values = np.array([on.draws[run] for run in runs])
    mean = np.array([means[run] for run in runs])
    apart, mean = values[first] - values[second], mean[first] - mean[second]
    spread = apart.std(axis=1)
    in_spreads = np.abs(apart - mean[:, None]) / np.where(spread > 0, spread, 1.0)[:, None]
    half = spread * np.quantile(in_spreads.max(axis=0), LEVEL)
    low, high = mean - half, mean + half
    if on.right:
        right = np.array([on.right[run] for run in runs])
        ahead = (right[first] & ~right[second]).sum(axis=1)
        behind = (right[second] & ~right[first]).sum(axis=1)
        p = 2 * stats.binom.cdf(np.minimum(ahead, behind), ahead + behind, 0.5)
        unsure = np.array(holm(np.minimum(p, 1.0).tolist()), float) > 1 - LEVEL
        low = np.where(unsure, np.minimum(low, 0.0), low)
    return [*zip(low.tolist(), high.tolist(), strict=True)]


def draw(score: Callable[[NDArray[np.int64]], float], rows: int, draws: int = DRAWS) -> Draws:
    """``score`` of so many draws of ``rows`` rows with replacement: the same draws at every call
    with as many rows, so that what two models score on them belongs together.
    """
    generator = np.random.Generator(np.random.Philox(key=[0, rows]))
    return np.array([score(generator.integers(0, rows, rows)) for _ in range(draws)])


def _by(one: Difference) -> str:
    bounds = "" if one.low is None else f" [{one.low:.3f}, {one.high or 0.0:.3f}]"
    return f"{one.mean:.3f}{bounds}"


def _names(ones: Sequence[Difference]) -> str:
    return ", ".join(one.against for one in ones)
