"""What a few seeds can say: means with intervals. Pure arithmetic."""

import math
from collections.abc import Sequence


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """The interval of the mean of independent ``values`` by Student's t, at ``level``.

    None for fewer than two values: one says nothing of the spread.
    """
    if len(values) < 2:
        return None
    from scipy import stats  # half a second's work to import

    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    half = reach * deviation / math.sqrt(len(values))
    return mean - half, mean + half
