"""What a cycle (`pipeline rekindle`) found: the scores of its arms on test, and their differences.

It reads what the stages leave in the cycle's directory, finished or not, and trains nothing. What
does not fit together (other seeds, other budgets, other files) is refused, never compared.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rekindle.data.errors import CheckpointError, InputError
from rekindle.pipeline.compare.runs import CYCLE_FILE, CYCLE_WRITER
from rekindle.pipeline.cycle.finetuned import (
    FineTuned,
    Grid,
    Searched,
    check_search,
    check_together,
    folder_of,
    read_finetuned,
    read_json,
    read_search,
    refuse,
    searched_of,
)
from rekindle.pipeline.cycle.notes import Told, notes_of
from rekindle.pipeline.cycle.scores import MEAN, ArmScores, differences_of, scores_of
from rekindle.pipeline.report.cache import CacheFacts
from rekindle.pipeline.report.cost import Cost
from rekindle.pipeline.report.significance import Difference


@dataclass(frozen=True)
class TaskFacts:
    """A task: its main metric, the examples in each split, those of test that train has, what
    guessing scores (None: unknown), and what it asks.
    """

    name: str
    metric: str
    train: int
    dev: int
    test: int
    test_in_train: int = 0
    chance: float | None = None
    about: str = ""


@dataclass(frozen=True)
class CycleResults:
    """Everything that a cycle found.

    ``costs``: seconds by folder of the stage ("experts/cola", "search/mlm/cola", "cache/cola" for
    a teacher's pass, "students/mlm", "fine-tuned/mlm/cola"). ``notes`` say what must be known
    beside the tables. ``settings``: what else cycle.json says. ``cache`` and ``cost``: what is in
    the cache, and what a student costs with it and without; None where that is not known.
    """

    arms: list[str]
    tasks: list[TaskFacts]
    scores: list[ArmScores]
    differences: list[Difference]
    searched: list[Searched]
    costs: dict[str, float]
    notes: list[str]
    settings: dict[str, Any]
    cache: CacheFacts | None = None
    cost: Cost | None = None

    def as_dict(self) -> dict[str, object]:
        """Everything as plain values for JSON; all numbers are finite."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "CycleResults":
        """What ``as_dict`` gave, such as results.json: the tables can be made from it alone.

        Keys that are not of ``as_dict`` are left out. Raises InputError where others are missing.
        """
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise InputError(f"these are not the results of a cycle ({error})") from None


@dataclass(frozen=True)
class _Plan:
    """What cycle.json says."""

    arms: list[str]
    tasks: list[TaskFacts]
    grid: Grid
    seeds: int | None
    settings: dict[str, Any]


def read_results(out: Path) -> CycleResults:
    """The results so far in the cycle's directory ``out``.

    Raises InputError where ``out`` is no cycle, CheckpointError where its parts are damaged or do
    not belong together.
    """
    plan = _read_plan(out)
    names = [task.name for task in plan.tasks]
    cells = [(arm, task) for arm in plan.arms for task in names]
    read = {cell: read_finetuned(out, folder_of(*cell), *cell) for cell in cells}
    found = {cell: one for cell, one in read.items() if one is not None}
    tried = {cell: read_search(out, *cell, plan.grid) for cell in cells}
    _check(out, plan, found, tried)
    metrics = {task.name: task.metric for task in plan.tasks}
    scores = scores_of(plan.arms, names, found)
    differences = differences_of(plan.arms, metrics, scores)
    searched = [
        searched_of(*cell, plan.grid, tried[cell], found.get(cell)) for cell in cells if tried[cell]
    ]
    missing = [cell for cell in cells if cell not in found]
    overlaps = {one.name: one.test_in_train for one in plan.tasks if one.test_in_train}
    told = Told(metrics, found, missing, scores, differences, searched, overlaps)
    return CycleResults(
        arms=plan.arms,
        tasks=plan.tasks,
        scores=scores,
        differences=differences,
        searched=searched,
        costs=_costs(out, found.values(), tried),
        notes=notes_of(told),
        settings=plan.settings,
    )


def _read_plan(out: Path) -> _Plan:
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
    seeds = values.get("seeds")
    return _Plan(arms, tasks, grid, seeds if isinstance(seeds, int) else None, settings)


def _name(name: object) -> str:
    """A name of an arm or a task is one of a folder, and the mean over tasks is no task."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..", MEAN):
        raise ValueError(f"{name!r} is no name")
    return name


def _check(
    out: Path,
    plan: _Plan,
    found: Mapping[tuple[str, str], FineTuned],
    tried: Mapping[tuple[str, str], Sequence[FineTuned]],
) -> None:
    """Nothing is compared that had not the same data, seeds, budget and search."""
    for one in found.values():
        if not one.test:
            raise CheckpointError(f"{out / one.folder} has no test scores; remove it and resume")
        if plan.seeds is not None and len(one.seeds) != plan.seeds:
            raise CheckpointError(
                f"{out / one.folder} has {len(one.seeds)} seeds, and {CYCLE_FILE} says "
                f"{plan.seeds}; remove it and resume"
            )
    for task in plan.tasks:
        final = {arm: one for (arm, name), one in found.items() if name == task.name}
        for one in final.values():
            if one.metric != task.metric:
                raise CheckpointError(
                    f"{out / one.folder} has the metric {one.metric}, and {CYCLE_FILE} says "
                    f"{task.metric}; remove it and resume"
                )
        check_together(out, list(final.values()), list(plan.grid))
        searches = [one for (_, name), ones in tried.items() if name == task.name for one in ones]
        check_search(out, plan.grid, searches, final)
    ones = list(found.values())
    for other in ones[1:]:
        if other.seeds != ones[0].seeds:
            refuse(out, ones[0], other, "seeds", ones[0].seeds, other.seeds)


# --- what it cost ---------------------------------------------------------------------------------


def _costs(
    out: Path,
    found: Iterable[FineTuned],
    tried: Mapping[tuple[str, str], Sequence[FineTuned]],
) -> dict[str, float]:
    """Seconds of the stages that are finished and have recorded them, by their folder."""
    costs = {one.folder: one.seconds for one in found}
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
