"""Which run is best at a task, by how much, and whether that is more than chance. Pure arithmetic.

The run with the highest score is compared with every other. Chance means what another draw of the
test rows would change (a paired bootstrap: rows are redrawn, the same for all runs), or, for scores
over several seeds, what other seeds would change (Student's t over pairs of equal seeds if both
runs have the same seeds, else Welch's for two samples). The data decide which run is compared with
the others, so the intervals hold for all pairs of runs at once, at 95 %: over rows by the largest
deviation of any pair in a draw (max-T), over seeds by Bonferroni. A run is best only if it beats
all others.

The bootstrap is too confident with few rows. Below ``LEAST_ROWS`` rows, chance is left open. If
every row is right or wrong (accuracy), an interval also includes 0 unless the exact sign test of
the rows on which two runs differ, with Holm's adjustment over all pairs, says otherwise. Chance is
also left open for seeds whose differences are all the same: nothing varied.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rekindle.pipeline.report.scores import TaskScores
from rekindle.pipeline.report.significance import LEVEL, Difference, holm, paired, unpaired

DRAWS = 2000  # of the test rows
LEAST_ROWS = 30  # with fewer, chance is left open

Draws = NDArray[np.float64]
RightRows = NDArray[np.bool_]  # which rows a run gets right
Interval = tuple[float, float]


@dataclass(frozen=True)
class Standing:
    """A task: every run's score, the ``best`` run, and its differences to the others, nearest first
    (empty if only one run has a score). ``rows``: the number of test rows for heads scored on rows,
    None for scores over seeds.
    """

    scores: TaskScores
    best: str
    differences: list[Difference]
    rows: int | None = None
    unit: str = "row"  # what is counted: documents are scored group by group

    @property
    def significant(self) -> list[Difference]:
        """The differences that are more than chance."""
        return [one for one in self.differences if one.low is not None and one.low > 0]

    @property
    def is_best(self) -> bool:
        """Whether the best run beats all others by more than chance."""
        return bool(self.differences) and len(self.significant) == len(self.differences)

    @property
    def verdict(self) -> str:
        """The standing as a sentence, without its full stop."""
        task, value = self.scores, self.mean(self.best)
        score = f"{task.measured} {value:.4f} on {task.scored_on}"
        if not self.differences:
            return f"only {self.best} has a score on {task.task}: {score}"
        undecided = [one for one in self.differences if one not in self.significant]
        if self.significant:
            first, *others = self.significant
            margin = f"{_margin(first)}"
            if not undecided:
                return (
                    f"{self.best} is best on {task.task} by {margin} over {first.against} ({score})"
                )
            more = f", and than {_names(others)}" if others else ""
            return (
                f"{self.best} is better on {task.task} than {first.against} by {margin}{more} "
                f"({score}); not told apart from {_names(undecided)}"
            )
        first, *others = undecided
        if first.low is None:
            few = "" if self.rows is None else f" with fewer than {LEAST_ROWS} {self.unit}s"
            return (
                f"{self.best} has the highest score on {task.task} ({score}), by {_margin(first)} "
                f"over {first.against}; whether that is chance is unknown{few}"
            )
        more = f", {_names(others)}" if others else ""
        return (
            f"No run is shown to be best on {task.task}: {self.best} has the highest score "
            f"({score}), not told apart from {first.against} (more by {_margin(first)}){more}"
        )

    def as_dict(self) -> dict[str, object]:
        """Return JSON values."""
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
        """Return the run's mean score."""
        values = self.scores.of(run)
        return sum(values) / len(values)


@dataclass(frozen=True)
class RowScores:
    """Scores of runs on the same ``rows``: for each run its scores on ``draws`` of them and, if
    every row is right or wrong, the rows it gets ``right``.
    """

    rows: int
    draws: Mapping[str, Draws]
    right: Mapping[str, RightRows]
    unit: str = "row"


def standing_of(scores: TaskScores, on_rows: RowScores | None = None) -> Standing | None:
    """Rank the runs of ``scores``; None if no run has a score.

    ``on_rows``: for heads scored on test rows; without it, the scores are over seeds.
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
        Difference(best, other, scores.task, means[best] - means[other], *interval, None, None, 1)
        for other, interval in zip(others, bounds, strict=True)
    ]
    return Standing(scores, best, differences, on_rows.rows, on_rows.unit)


def _over_seeds(scores: TaskScores, best: str, other: str, pairs: int) -> Difference:
    """Return the difference over seeds, paired if both runs have the same seeds."""
    level, names = 1 - (1 - LEVEL) / pairs, (best, other, scores.task)
    first, second = scores.by_seed(other), scores.by_seed(best)
    if not first or first.keys() != second.keys():
        return unpaired(scores.of(other), scores.of(best), level, names)
    difference = paired([*first.values()], [second[seed] for seed in first], level, names)
    return replace(difference, low=None, high=None) if difference.p is None else difference


def _intervals(
    runs: Sequence[str], means: Mapping[str, float], on_rows: RowScores
) -> list[Interval]:
    """Return the intervals of all pairs of runs together: first − second, first − third, …"""
    first, second = np.triu_indices(len(runs), 1)
    scores = np.array([on_rows.draws[run] for run in runs])
    run_means = np.array([means[run] for run in runs])
    differences, mean = scores[first] - scores[second], run_means[first] - run_means[second]
    spread = differences.std(axis=1)
    deviations = np.abs(differences - mean[:, None]) / np.where(spread > 0, spread, 1.0)[:, None]
    half = spread * np.quantile(deviations.max(axis=0), LEVEL)
    low, high = mean - half, mean + half
    if on_rows.right:
        right = np.array([on_rows.right[run] for run in runs])
        first_only = (right[first] & ~right[second]).sum(axis=1)
        second_only = (right[second] & ~right[first]).sum(axis=1)
        fewer = np.minimum(first_only, second_only)
        p = 2 * stats.binom.cdf(fewer, first_only + second_only, 0.5)
        unsure = np.array(holm(np.minimum(p, 1.0).tolist()), float) > 1 - LEVEL
        low = np.where(unsure, np.minimum(low, 0.0), low)
    return [*zip(low.tolist(), high.tolist(), strict=True)]


def draw(score: Callable[[NDArray[np.int64]], float], rows: int, draws: int = DRAWS) -> Draws:
    """Return ``score`` for ``draws`` draws of ``rows`` rows with replacement. Every call with the
    same number of rows uses the same draws, so that the scores of two models are paired.
    """
    generator = np.random.Generator(np.random.Philox(key=[0, rows]))
    return np.array([score(generator.integers(0, rows, rows)) for _ in range(draws)])


def _margin(one: Difference) -> str:
    bounds = "" if one.low is None else f" [{one.low:.3f}, {one.high or 0.0:.3f}]"
    return f"{one.mean:.3f}{bounds}"


def _names(ones: Sequence[Difference]) -> str:
    return ", ".join(one.against for one in ones)
