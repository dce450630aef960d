"""Intervals of means, paired t-tests and Holm's adjustment (scipy), and their wording. Reads no
files.

Values that agree up to float64 rounding count as equal: scores such as 0.9 − 0.8 and 0.7 − 0.6
differ only by rounding, and a t-test would take that for spread.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from rekindle.pipeline.report.table import NOTHING

LEVEL = 0.95  # of all intervals shown
_SMALLEST_P = 0.001
_ROUNDING = 1e-12  # relative to the largest value: smaller spreads count as none


@dataclass(frozen=True)
class Difference:
    """The paired differences ``arm`` − ``against`` on a task, as fractions: the mean of ``n`` pairs
    (for instance by seed), its interval, and the two-sided p.

    ``low`` and ``high`` are None for a single pair. ``p`` is None if no test can be made: for a
    single pair, and if all differences are equal but not 0 (t would be infinite, which says that
    nothing varied, not how certain the difference is). ``p_adjusted``: Holm's, over all tests with
    the same ``against`` (every arm on every task, and on the mean over tasks); None until it is
    computed. ``higher``: the number of pairs in which ``arm`` scores more; None if nothing is
    paired.
    """

    arm: str
    against: str
    task: str
    mean: float
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    n: int
    higher: int | None = None

    @property
    def interval(self) -> str:
        """The interval in points of 100, formatted."""
        if self.low is None or self.high is None:
            return NOTHING
        return f"{100 * self.low:+.2f} … {100 * self.high:+.2f}"


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Return Student's t interval of the mean; None for fewer than two values.

    Raise ValueError for values that are not finite, or a ``level`` outside (0, 1).
    """
    _check(values, level)
    if len(values) < 2:
        return None
    mean = fmean(values)
    half = _half_width(values, level)
    return mean - half, mean + half


def paired(
    first: Sequence[float],
    second: Sequence[float],
    level: float = LEVEL,
    names: tuple[str, str, str] = ("", "", ""),
) -> Difference:
    """Return the difference ``second`` − ``first`` of paired runs, for instance by seed.

    ``names``: the second, the first, and the task. ``p`` is from the paired t-test (two-sided; H0:
    the mean difference is 0); the interval inverts this test. If all differences are equal, the
    interval is that point, and ``p`` is 1.0 if they are 0, else None.

    Raise ValueError for sequences that are empty or of unequal length, or values that are not
    finite.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} values cannot be paired")
    _check([*first, *second], level)
    n = len(first)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    rounding = _ROUNDING * max(map(abs, [*first, *second]))
    mean, higher = fmean(differences), sum(one > rounding for one in differences)
    if n == 1:
        return Difference(*names, mean, None, None, None, None, n, higher)
    if max(differences) - min(differences) <= rounding:
        is_zero = abs(mean) <= rounding
        mean = 0.0 if is_zero else mean
        return Difference(*names, mean, mean, mean, 1.0 if is_zero else None, None, n, higher)
    half = _half_width(differences, level)
    t = mean / (stdev(differences) / math.sqrt(n))
    p = float(2 * stats.t.sf(abs(t), n - 1))
    return Difference(*names, mean, mean - half, mean + half, p, None, n, higher)


def unpaired(
    first: Sequence[float],
    second: Sequence[float],
    level: float = LEVEL,
    names: tuple[str, str, str] = ("", "", ""),
) -> Difference:
    """Return the difference of the means, ``second`` − ``first``, of unpaired runs.

    Interval and ``p`` are Welch's; None if either side has one value or neither varies. ``n`` is
    the smaller number of values. Raise ValueError as ``paired`` does, except for unequal lengths.
    """
    if not first or not second:
        raise ValueError("no values to compare")
    _check([*first, *second], level)
    mean, n = fmean(second) - fmean(first), min(len(first), len(second))
    rounding = _ROUNDING * max(map(abs, [*first, *second]))
    if n == 1 or max(max(one) - min(one) for one in (first, second)) <= rounding:
        return Difference(*names, mean, None, None, None, None, n)
    test = stats.ttest_ind(second, first, equal_var=False)
    low, high = map(float, test.confidence_interval(level))
    return Difference(*names, mean, low, high, float(test.pvalue), None, n)


def holm(p_values: Sequence[float | None], missing: int = 0) -> list[float | None]:
    """Apply Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979), keeping the
    order.

    The i-th smallest of m is multiplied by m − i + 1, is at least as large as the one before it,
    and at most 1. None, for a test that could not be made, stays None but counts among the m; so do
    ``missing`` tests that are planned but not run yet, because unknown results must not make the
    others look more certain.

    Raise ValueError for values outside [0, 1].
    """
    tests = [(p, place) for place, p in enumerate(p_values) if p is not None]
    if not all(0 <= p <= 1 for p, _ in tests):
        raise ValueError(f"p values are in [0, 1]: {[p for p, _ in tests]}")
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(sorted(tests)):
        largest = max(largest, min(1.0, p * (len(p_values) + missing - rank)))
        adjusted[place] = largest
    return adjusted


def p_words(p: float | None) -> str:
    """Format a p-value; a dash if no test could be made."""
    if p is None:
        return NOTHING
    return f"< {_SMALLEST_P}" if p < _SMALLEST_P else f"{p:.3f}"


def _half_width(values: Sequence[float], level: float) -> float:
    quantile = float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    return quantile * stdev(values) / math.sqrt(len(values))


def _check(values: Sequence[float], level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it is between 0 and 1, as in 0.95")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"not all values are finite: {list(values)}")
