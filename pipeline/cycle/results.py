"""What a cycle (`pipeline rekindle`) found: the scores of its arms on test, and their differences.

It reads what the stages leave in the cycle's directory, finished or not, and trains nothing. What
does not fit together (other seeds, other budgets, other files) is refused, never compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from rekindle.data.counted import counted
from rekindle.data.errors import CheckpointError, InputError
from rekindle.pipeline.compare.runs import CYCLE_FILE, CYCLE_WRITER
from rekindle.pipeline.cycle.finetuned import (
    EXPERT,
    FineTuned,
    Grid,
    budget_of,
    check_alike,
    folder_of,
    read_finetuned,
    read_json,
)
from rekindle.pipeline.cycle.notes import notes_of
from rekindle.pipeline.cycle.scores import (
    MEAN,
    CycleResults,
    KeptExpert,
    TaskFacts,
    differences_of,
    scores_of,
)
from rekindle.pipeline.cycle.searched import check_search, read_search, searched_of
from rekindle.pipeline.cycle.verdict import verdict_of

Found = Mapping[tuple[str, str], FineTuned]  # by arm and task
Tried = Mapping[tuple[str, str], Sequence[FineTuned]]


def read_results(out: Path) -> CycleResults:
    """The results so far in the cycle's directory ``out``.

    Raises InputError where ``out`` is no cycle, CheckpointError where its parts are damaged or do
    not belong together.
    """
    plan, grid = _read_plan(out)
    cells = [(arm, task) for arm in plan.arms for task in plan.metrics]
    read = {cell: read_finetuned(out, folder_of(*cell), *cell) for cell in cells}
    found = {cell: one for cell, one in read.items() if one is not None}
    tried = {cell: read_search(out, *cell, grid) for cell in cells}
    _check(out, plan, grid, found, tried)
    scores = scores_of(plan.arms, list(plan.metrics), found)
    differences = differences_of(plan.arms, plan.metrics, scores)
    searched = [searched_of(*c, grid, tried[c], found.get(c)) for c in cells if tried[c]]
    costs = _costs(out, found, tried)
    experts = [_kept(found[EXPERT, task]) for task in plan.metrics if (EXPERT, task) in found]
    results = replace(plan, scores=scores, differences=differences, searched=searched, costs=costs)
    notes, verdict = notes_of(results, found), verdict_of(results)
    return replace(results, notes=notes, verdict=verdict, experts=experts)


def _kept(one: FineTuned) -> KeptExpert:
    dev = one.dev[one.seeds.index(one.best_seed)]
    return KeptExpert(one.task, one.folder, one.best_seed, len(one.seeds), one.metric, dev)


def _read_plan(out: Path) -> tuple[CycleResults, Grid]:
    """What cycle.json says: results without any yet, and what is searched."""
    values = read_json(out / CYCLE_FILE)
    if values is None or values.get("written_by") != CYCLE_WRITER:
        raise InputError(
            f"{out} is no directory of `pipeline rekindle`: there is no {CYCLE_FILE} of it. Give "
            "the one that its --out named"
        )
    try:
        read = TypeAdapter(TaskFacts).validate_python
        about = {one["name"]: one for one in values.get("settings", {}).get("tasks", [])}
        tasks = [
            read({"about": about.get(name, {}).get("about", "")} | task | {"name": _name(name)})
            for name, task in values["tasks"].items()
        ]
        arms = [_name(arm) for arm in values["arms"]]
        grid = {key: list(tries) for key, tries in (values.get("search") or {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{out / CYCLE_FILE} is damaged ({error!r})") from None
    settings = {k: v for k, v in values.items() if k not in ("written_by", "arms", "tasks")}
    return CycleResults(arms, tasks, [], [], [], {}, [], settings), grid


def _name(name: object) -> str:
    """A name of an arm or a task is one of a folder, and the mean over tasks is no task."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..", MEAN):
        raise ValueError(f"{name!r} is no name")
    return name


def _check(out: Path, plan: CycleResults, grid: Grid, found: Found, tried: Tried) -> None:
    """Nothing is compared that had not the same data, seeds, budget and search."""
    seeds = plan.settings.get("seeds")
    for one in found.values():
        metric = plan.metrics[one.task]
        if not one.test:
            wrong = "no test scores"
        elif isinstance(seeds, int) and len(one.seeds) != seeds:
            wrong = f"{counted(len(one.seeds), 'seed')}, and {CYCLE_FILE} says {seeds}"
        elif one.metric != metric:
            wrong = f"the metric {one.metric}, and {CYCLE_FILE} says {metric}"
        else:
            continue
        raise CheckpointError(f"{out / one.folder} has {wrong}; remove it and resume")
    for task in plan.tasks:
        final = {arm: one for (arm, name), one in found.items() if name == task.name}
        searches = [one for (_, name), ones in tried.items() if name == task.name for one in ones]
        for ones in (list(final.values()), searches):
            check_alike(out, ones, partial(budget_of, searched=grid))
        # The files that a search has in common with what it chooses for.
        both = [*searches[:1], *[*final.values()][:1]]
        check_alike(out, both, lambda one: {n: one.splits.get(n) for n in ("train", "dev")})
        check_search(out, grid, searches, final)
    check_alike(out, list(found.values()), lambda one: {"seeds": one.seeds})


# --- what it cost ---------------------------------------------------------------------------------


def _costs(out: Path, found: Found, tried: Tried) -> dict[str, float]:
    """Seconds of the stages that are finished and have recorded them, by their folder."""
    costs = {one.folder: one.seconds for one in found.values()}
    for (arm, task), ones in tried.items():
        if ones:
            costs[f"search/{arm}/{task}"] = sum(one.seconds for one in ones)
    for folder in sorted((out / "students").glob("*/")):
        summary = read_json(folder / "summary.json") or {}
        about = read_json(folder / "run.json") or {}
        passes = about.get("cache", {}).get("teacher_seconds") or {}
        recorded = {f"cache/{name}": seconds for name, seconds in passes.items()}
        recorded[f"students/{folder.name}"] = summary.get("seconds")
        costs |= {stage: float(s) for stage, s in recorded.items() if s is not None}
    return dict(sorted(costs.items()))
