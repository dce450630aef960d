"""Read the results in one cycle's folder by arm and task, and check that they fit together.

Results that do not (other seeds, budgets or files) are refused, never compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rekindle.data.counted import counted
from rekindle.data.errors import CheckpointError
from rekindle.pipeline.compare.runs import CYCLE_FILE
from rekindle.pipeline.cycle.finetuned import (
    EXPERT,
    FineTuned,
    Grid,
    budget_of,
    check_alike,
    folder_of,
    own_head_folder,
    read_arm,
    read_json,
)
from rekindle.pipeline.cycle.scores import CycleResults
from rekindle.pipeline.cycle.searched import check_search, read_search, search_home

Found = Mapping[tuple[str, str], FineTuned]  # by arm and task
Tried = Mapping[tuple[str, str], Sequence[FineTuned]]


@dataclass(frozen=True)
class StudentCost:
    """Seconds of the student in a ``folder``, and of caching each of its teachers, by stage; None
    if not recorded. ``taught_by``: its teachers' names in the cache.
    """

    folder: str
    seconds: float | None
    caching: dict[str, float | None]
    taught_by: list[str]

    def moved(self, where: str) -> "StudentCost":
        """Return the same with its folders below another one."""
        caching = {f"{where}/{stage}": seconds for stage, seconds in self.caching.items()}
        return replace(self, folder=f"{where}/{self.folder}", caching=caching)


@dataclass(frozen=True)
class Cells:
    """Everything finished, by arm and task: the fine-tunings, the students' own heads, and the
    search; and the cost of each student, by name.
    """

    found: Found
    heads: Found
    tried: Tried
    students: Mapping[str, StudentCost]


def read_cells(out: Path, plan: CycleResults, grid: Grid) -> Cells:
    """Read what exists in the cycle's folder ``out``. Raise CheckpointError if parts of it are
    damaged or do not belong together.
    """
    cells = [(arm, task) for arm in plan.arms for task in plan.metrics]
    read = {cell: read_arm(out, folder_of(*cell), *cell, plan.students) for cell in cells}
    own = {cell: read_arm(out, own_head_folder(*cell), *cell, plan.students) for cell in cells}
    found, heads = ({cell: o for cell, o in ones.items() if o is not None} for ones in (read, own))
    searched = search_home(out)
    tried = {cell: read_search(searched, *cell, grid) for cell in cells}
    _check(out, plan, grid, found, tried)
    for one in heads.values():
        _check_scores(out, plan, one)
    return Cells(found, heads, tried, read_students(out))


def read_students(out: Path) -> dict[str, StudentCost]:
    """Return the costs of the students in a cycle's folder that have begun."""
    found = {}
    for folder in sorted((out / "students").glob("*/")):
        summary = read_json(folder / "summary.json") or {}
        cache = (read_json(folder / "run.json") or {}).get("cache", {})
        passes = cache.get("teacher_seconds") or {}
        text = Path(cache.get("path", "")).name  # for a cycle whose tasks have texts of their own
        where = f"cache/{text}" if text and (out / "costs" / "texts" / text).is_dir() else "cache"
        caching = {f"{where}/{name}": seconds for name, seconds in passes.items()}
        where = str(folder.relative_to(out))
        found[folder.name] = StudentCost(where, summary.get("seconds"), caching, list(passes))
    return found


# --- what fits together ---------------------------------------------------------------------------


def _check(out: Path, plan: CycleResults, grid: Grid, found: Found, tried: Tried) -> None:
    """Check that everything compared has the same data, seeds, budget and search."""
    common, experts = plan.settings.get("seeds"), plan.file.get("experts", {})
    for one in found.values():
        _check_scores(out, plan, one)
        seeds = (one.arm == EXPERT and experts.get("seeds")) or common
        if isinstance(seeds, int) and len(one.seeds) != seeds:
            wrong = f"{counted(len(one.seeds), 'seed')}, but {CYCLE_FILE} says {seeds}"
            raise CheckpointError(f"{out / one.folder} has {wrong}; remove it and resume")
    # Experts of another model may have their own budget, and all experts their own seeds.
    own = {EXPERT} if experts.get("finetune") else set()
    in_seeds = {*own, EXPERT} if experts.get("seeds") else own

    def budget(one: FineTuned) -> dict[str, object]:
        found = budget_of(one, searched=grid)
        return found | {"seeds": None} if EXPERT in in_seeds else found

    for task in plan.tasks:
        final = {arm: one for (arm, name), one in found.items() if name == task.name}
        searches = [one for (_, name), ones in tried.items() if name == task.name for one in ones]
        for ones, terms in (
            (list(final.values()), budget),  # their seeds are compared across tasks below
            (searches, partial(budget_of, searched=grid)),
        ):
            check_alike(out, [one for one in ones if one.arm not in own], terms)
            check_alike(out, ones, lambda one: {"metric": one.metric, "files": one.splits})
        # The files that a search shares with what it chooses for.
        both = [*searches[:1], *[*final.values()][:1]]
        check_alike(out, both, lambda one: {n: one.splits.get(n) for n in ("train", "dev")})
        check_search(out, grid, searches, final)
    alike = [one for one in found.values() if one.arm not in in_seeds]
    check_alike(out, alike, lambda one: {"seeds": one.seeds})


def _check_scores(out: Path, plan: CycleResults, one: FineTuned) -> None:
    metric = plan.metrics[one.task]
    wrong = f"the metric {one.metric}, but {CYCLE_FILE} says {metric}"
    if not one.test:
        wrong = "no test scores"
    elif one.metric == metric:
        return
    raise CheckpointError(f"{out / one.folder} has {wrong}; remove it and resume")


def check_draws(out: Path, draws: Sequence[Found]) -> None:
    """Raise CheckpointError if an arm was not fine-tuned in the same way in all ``draws`` of the
    labels; their folders are relative to ``out``.
    """
    for cell in dict.fromkeys(cell for found in draws for cell in found):
        check_alike(out, [found[cell] for found in draws if cell in found], budget_of)
