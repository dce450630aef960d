"""The search over fine-tuning settings: what each arm has tried on dev, and whether all were alike.

The points are planned in ``config.search_points``, run as jobs of ``jobs``, and the best on dev is
taken by ``job_functions.fine_tune``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from rekindle.data.errors import CheckpointError
from rekindle.pipeline.compare.runs import is_cycle
from rekindle.pipeline.cycle.finetuned import FineTuned, Grid, read_finetuned

DRAWS_FOLDER = "draws"  # in a cycle's: a cycle for each draw of the labels, by its number
FIRST_DRAW = 0
_EQUAL = 1e-9  # of two means: rounding decides between them


@dataclass(frozen=True)
class Tried:
    """One point of a search: the settings, and the main metric on dev by seed."""

    settings: dict[str, object]
    seeds: list[int]
    dev_scores: list[float]
    mean: float


@dataclass(frozen=True)
class Searched:
    """A search over fine-tuning settings; ``chosen`` is None before the arm is fine-tuned."""

    arm: str
    task: str
    tried: list[Tried]
    chosen: dict[str, object] | None


def points_of(grid: Grid) -> list[tuple[object, ...]]:
    """All combinations of the values, in the order of the grid; none without a grid."""
    return list(product(*grid.values())) if grid else []


def search_home(out: Path) -> Path:
    """The cycle's folder whose search the one in ``out`` goes by: of several draws of the labels
    the first one's, which is searched for all.
    """
    draws = out.absolute().parent
    drawn = draws.name == DRAWS_FOLDER and is_cycle(draws.parent)
    return draws / str(FIRST_DRAW) if drawn else out


def read_search(out: Path, arm: str, task: str, grid: Grid) -> list[FineTuned]:
    """What the arm has tried so far, in the order of the grid.

    Raises CheckpointError for what is damaged, or not of this grid.
    """
    points = points_of(grid)
    home = out / "search" / arm / task
    folders = sorted(path for path in home.glob("*") if path.is_dir() and path.name[0] != ".")
    found: dict[tuple[object, ...], FineTuned] = {}
    for folder in folders if points else []:
        one = read_finetuned(out, str(folder.relative_to(out)), arm, task)
        if one is None:
            continue
        point = one.point(grid)
        if point not in points or point in found:
            raise CheckpointError(
                f"{folder} has tried {_told(grid, point)}, which is not of this search or is there "
                "twice: every arm tries the same settings, each once; remove the folder and resume"
            )
        found[point] = one
    return [found[point] for point in points if point in found]


def check_search(
    out: Path, grid: Grid, tried: Sequence[FineTuned], final: Mapping[str, FineTuned]
) -> None:
    """Raise CheckpointError where an arm of a task lacks a part of its search, or its best.

    ``tried``: of all arms, see ``read_search``; ``final``: by arm, what was fine-tuned with what
    the search chose, on dev, after all its points.
    """
    points, searched = points_of(grid), search_home(out) / "search"
    for arm, one in final.items() if len(points) > 1 else ():
        dev = {other.point(grid): fmean(other.dev) for other in tried if other.arm == arm}
        if missing := [point for point in points if point not in dev]:
            raise CheckpointError(
                f"{out / one.folder} is there, but its search in {searched / arm / one.task} lacks "
                f"{_told(grid, missing[0])}: without it arms are not searched alike; remove "
                "the first and resume"
            )
        taken = one.point(grid)
        if dev.get(taken, float("-inf")) < max(dev.values()) - _EQUAL:
            raise CheckpointError(
                f"{out / one.folder} has {_told(grid, taken)}, which is not what its search in "
                f"{searched / arm / one.task} found best on dev; remove it and resume"
            )


def searched_of(
    arm: str, task: str, grid: Grid, tried: Sequence[FineTuned], final: FineTuned | None
) -> Searched:
    """An arm's search on a task, as it is told."""
    points = [Tried(_settings(grid, one), one.seeds, one.dev, fmean(one.dev)) for one in tried]
    return Searched(arm, task, points, _settings(grid, final) if final else None)


def _settings(grid: Grid, one: FineTuned) -> dict[str, object]:
    return dict(zip(grid, one.point(grid), strict=True))


def _told(grid: Grid, point: Sequence[object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(grid, point, strict=True))
