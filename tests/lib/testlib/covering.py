"""Choose the quick cases of a grid so that every value of every argument occurs in one of them."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest

Case = tuple[tuple[str, str], ...]  # an argument's name and value, as text


def cover(cases: Sequence[Case], together: int = 1) -> list[int]:
    """Return the numbers of cases, in order, that cover every value of every argument, or every
    combination of ``together`` arguments' values.

    Greedy: each step takes the first case that adds the most.
    """
    found = [{*combinations(case, min(together, len(case)))} for case in cases]
    left, chosen = set[Any]().union(*found), list[int]()
    while left:
        number = max(range(len(cases)), key=lambda n: (len(left & found[n]), -n))
        chosen.append(number)
        left -= found[number]
    return sorted(chosen)


def leave_the_rest_slow(items: Iterable[pytest.Item]) -> None:
    """Mark as slow those cases of ``covering`` tests that are not needed for coverage.

    A case that is slow anyway covers nothing.
    """
    grids: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("covering") and not item.get_closest_marker("slow"):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for grid in grids.values():
        quick = cover([_case(item) for item in grid], *grid[0].get_closest_marker("covering").args)
        for number, item in enumerate(grid):
            if number not in quick:
                item.add_marker(pytest.mark.slow)


def _case(item: Any) -> Case:
    params = item.callspec.params
    return tuple((name, repr(getattr(value, "__name__", value))) for name, value in params.items())
