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
from rekindle.pipeline.cycle.search import check_search, read_search, search_home

FineTunings = Mapping[tuple[str, str], FineTuned]  # by arm and task
Searches = Mapping[tuple[str, str], Sequence[FineTuned]]  # their points, by arm and task


@dataclass(frozen=True)
class StudentSeconds:
    """Seconds of the student in a ``folder``, and of caching each of its teachers, by stage; None
    if not recorded. ``teachers``: their names in the cache.
    """

    folder: str
    seconds: float | None
    caching: dict[str, float | None]
    teachers: list[str]

    def below(self, parent: str) -> "StudentSeconds":
        """Return the same with ``parent`` before its folders."""
        caching = {f"{parent}/{stage}": seconds for stage, seconds in self.caching.items()}
        return replace(self, folder=f"{parent}/{self.folder}", caching=caching)


@dataclass(frozen=True)
class Cells:
    """Everything finished, by arm and task: the fine-tunings, the scores of the students' own
    heads, and the searches; and the cost of each student, by name.
    """

    fine_tuned: FineTunings
    own_heads: FineTunings
    searches: Searches
    students: Mapping[str, StudentSeconds]


def read_cells(out: Path, plan: CycleResults, grid: Grid) -> Cells:
    """Read what exists in the cycle's folder ``out``. Raise CheckpointError if parts of it are
    damaged or do not belong together.
    """
    cells = [(arm, task) for arm in plan.arms for task in plan.metrics]
    fine_tuned, own_heads = dict[tuple[str, str], FineTuned](), dict[tuple[str, str], FineTuned]()
    for finished, folder in ((fine_tuned, folder_of), (own_heads, own_head_folder)):
        for cell in cells:
            result = read_arm(out, folder(*cell), *cell, plan.students)
            if result is not None:
                finished[cell] = result
    home = search_home(out)
    searches = {cell: read_search(home, *cell, grid) for cell in cells}
    _check(out, plan, grid, fine_tuned, searches)
    for result in own_heads.values():
        _check_scores(out, plan, result)
    return Cells(fine_tuned, own_heads, searches, read_student_costs(out))


def read_student_costs(out: Path) -> dict[str, StudentSeconds]:
    """Return the costs of the students in a cycle's folder that have begun."""
    costs = {}
    for folder in sorted((out / "students").glob("*/")):
        summary = read_json(folder / "summary.json") or {}
        cache = (read_json(folder / "run.json") or {}).get("cache", {})
        passes = cache.get("teacher_seconds") or {}
        text = Path(cache.get("path", "")).name  # a task, if the tasks have their own texts
        has_own_text = text and (out / "costs" / "texts" / text).is_dir()
        stage = f"cache/{text}" if has_own_text else "cache"
        costs[folder.name] = StudentSeconds(
            folder=str(folder.relative_to(out)),
            seconds=summary.get("seconds"),
            caching={f"{stage}/{name}": seconds for name, seconds in passes.items()},
            teachers=list(passes),
        )
    return costs


# --- checks ---------------------------------------------------------------------------------------


def _check(
    out: Path, plan: CycleResults, grid: Grid, fine_tuned: FineTunings, searches: Searches
) -> None:
    """Check that everything compared has the same data, seeds, budget and search."""
    common, experts = plan.settings.get("seeds"), plan.file.get("experts", {})
    for one in fine_tuned.values():
        _check_scores(out, plan, one)
        seeds = (one.arm == EXPERT and experts.get("seeds")) or common
        if isinstance(seeds, int) and len(one.seeds) != seeds:
            fault = f"{counted(len(one.seeds), 'seed')}, but {CYCLE_FILE} says {seeds}"
            raise CheckpointError(f"{out / one.folder} has {fault}; remove it and resume")
    # Experts of another model may have their own budget, and all experts their own seeds.
    own_budget = {EXPERT} if experts.get("finetune") else set()
    own_seeds = {*own_budget, EXPERT} if experts.get("seeds") else own_budget

    def budget(one: FineTuned) -> dict[str, object]:
        facts = budget_of(one, searched=grid)
        return facts | {"seeds": None} if EXPERT in own_seeds else facts

    for task in plan.tasks:
        final = {arm: one for (arm, name), one in fine_tuned.items() if name == task.name}
        points = [one for (_, name), ones in searches.items() if name == task.name for one in ones]
        for results, terms in (
            (list(final.values()), budget),  # their seeds are compared across tasks below
            (points, partial(budget_of, searched=grid)),
        ):
            check_alike(out, [one for one in results if one.arm not in own_budget], terms)
            check_alike(out, results, lambda one: {"metric": one.metric, "files": one.splits})
        # A search reads the same files as the fine-tunings that it chooses for.
        first_of_each = [*points[:1], *[*final.values()][:1]]
        check_alike(
            out, first_of_each, lambda one: {n: one.splits.get(n) for n in ("train", "dev")}
        )
        check_search(out, grid, points, final)
    with_common_seeds = [one for one in fine_tuned.values() if one.arm not in own_seeds]
    check_alike(out, with_common_seeds, lambda one: {"seeds": one.seeds})


def _check_scores(out: Path, plan: CycleResults, one: FineTuned) -> None:
    metric = plan.metrics[one.task]
    fault = f"the metric {one.metric}, but {CYCLE_FILE} says {metric}"
    if not one.test:
        fault = "no test scores"
    elif one.metric == metric:
        return
    raise CheckpointError(f"{out / one.folder} has {fault}; remove it and resume")


def check_draws(out: Path, draws: Sequence[FineTunings]) -> None:
    """Raise CheckpointError if an arm was not fine-tuned in the same way in all ``draws`` of the
    labels; their folders are relative to ``out``.
    """
    for cell in dict.fromkeys(cell for draw in draws for cell in draw):
        check_alike(out, [draw[cell] for draw in draws if cell in draw], budget_of)
