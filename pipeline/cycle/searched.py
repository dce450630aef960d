"""The search over fine-tuning settings in a cycle: what each arm tried on dev, and what it took.

A search is part of the budget: every arm must have tried the same settings with the same seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from rekindle.data.errors import CheckpointError
from rekindle.pipeline.cycle.finetuned import FineTuned, check_together, read_finetuned, refuse

_EQUAL = 1e-9  # of two means: rounding decides between them

Grid = Mapping[str, Sequence[Any]]  # setting -> the values that are tried


@dataclass(frozen=True)
class Tried:
    """One point of a search: the settings, and the main metric on dev by seed."""

    settings: dict[str, Any]
    seeds: list[int]
    dev_scores: list[float]
    mean: float


@dataclass(frozen=True)
class Searched:
    """A search over fine-tuning settings; ``chosen`` is None before the arm is fine-tuned."""

    arm: str
    task: str
    tried: list[Tried]
    chosen: dict[str, Any] | None


def points_of(grid: Grid) -> list[tuple[Any, ...]]:
    """All combinations of the values, in the order of the grid; none without a grid."""
    return list(product(*grid.values())) if grid else []


def read_search(out: Path, arm: str, task: str, grid: Grid) -> list[FineTuned]:
    """What the arm has tried so far, in the order of the grid.

    Raises CheckpointError for what is damaged, or not of this grid.
    """
    points = points_of(grid)
    home = out / "search" / arm / task
    folders = sorted(path for path in home.glob("*") if path.is_dir() and path.name[0] != ".")
    found: dict[int, FineTuned] = {}
    for folder in folders if points else []:
        one = read_finetuned(out, str(folder.relative_to(out)), arm, task)
        if one is None:
            continue
        point = tuple(one.budget.get(key) for key in grid)
        if point not in points or points.index(point) in found:
            raise CheckpointError(
                f"{folder} has tried {_told(grid, point)}, which is not of this search or is there "
                "twice: every arm tries the same settings, each once; remove the folder and resume"
            )
        found[points.index(point)] = one
    return [found[number] for number in sorted(found)]


def check_search(
    out: Path, grid: Grid, tried: Sequence[FineTuned], final: Mapping[str, FineTuned]
) -> None:
    """Raise CheckpointError where the arms of a task were not searched alike.

    ``tried``: of all arms, see ``read_search``; ``final``: by arm, what was fine-tuned with what
    the search chose, on dev, after all its points.
    """
    check_together(out, tried, list(grid))
    for one in tried[:1]:
        for other in list(final.values())[:1]:
            for split in ("train", "dev"):
                if one.files.get(split) != other.files.get(split):
                    refuse(out, one, other, split, one.files.get(split), other.files.get(split))
    points = points_of(grid)
    for arm, one in final.items() if len(points) > 1 else ():
        dev = {tuple(t.budget.get(k) for k in grid): dev_mean(t) for t in tried if t.arm == arm}
        if missing := [point for point in points if point not in dev]:
            raise CheckpointError(
                f"{out / one.folder} is there, but its search in {out / 'search' / arm / one.task} "
                f"lacks {_told(grid, missing[0])}: without it arms are not searched alike; remove "
                "the first and resume"
            )
        taken = tuple(one.budget.get(key) for key in grid)
        if dev.get(taken, float("-inf")) < max(dev.values()) - _EQUAL:
            raise CheckpointError(
                f"{out / one.folder} has {_told(grid, taken)}, which is not what its search in "
                f"{out / 'search' / arm / one.task} found best on dev; remove it and resume"
            )


def searched_of(
    arm: str, task: str, grid: Grid, tried: Sequence[FineTuned], final: FineTuned | None
) -> Searched:
    """An arm's search on a task, as it is told."""
    points = [
        Tried(_settings(grid, one), one.seeds, [s[one.metric] for s in one.dev], dev_mean(one))
        for one in tried
    ]
    return Searched(arm, task, points, _settings(grid, final) if final else None)


def dev_mean(one: FineTuned) -> float:
    """The mean over seeds of the main metric on dev, which the search maximises."""
    return fmean(scores[one.metric] for scores in one.dev)


def _settings(grid: Grid, one: FineTuned) -> dict[str, Any]:
    return {key: one.config.get(key) for key in grid}


def _told(grid: Grid, point: Sequence[Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(grid, point, strict=True))
