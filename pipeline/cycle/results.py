"""The results of a cycle (`pipeline rekindle`): the test scores of its arms, and their differences.

Reads what the stages leave in the cycle's directory, finished or not, and trains nothing. Results
that do not fit together (other seeds, budgets or files) are refused, never compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from rekindle.data.errors import CheckpointError, InputError
from rekindle.pipeline.compare.runs import CYCLE_FILE, CYCLE_WRITER
from rekindle.pipeline.cycle.cells import Cells, check_draws, read_cells
from rekindle.pipeline.cycle.costs import arm_costs, mean_costs, stage_costs
from rekindle.pipeline.cycle.finetuned import EXPERT, FineTuned, Grid, read_json
from rekindle.pipeline.cycle.notes import UNFINISHED, notes_of
from rekindle.pipeline.cycle.record import check_read_same_text
from rekindle.pipeline.cycle.scores import (
    HELD_TEXTS_FILE,
    MEAN,
    ArmScores,
    CycleResults,
    KeptExpert,
    Primary,
    TaskFacts,
    TextFacts,
    differences_of,
    join_draws,
    scores_of,
)
from rekindle.pipeline.cycle.search import DRAWS_FOLDER, FIRST_DRAW, search_result, search_sources
from rekindle.pipeline.cycle.verdict import verdict_of

RESULTS_FILE = "results.json"  # exists once a cycle, or a draw of it, has finished


def read_results(out: Path) -> CycleResults:
    """Return the results so far in the cycle's directory ``out``; for several draws of the labels,
    those of the finished draws.

    Raise InputError if ``out`` is no cycle, CheckpointError if its parts are damaged or do not
    belong together.
    """
    plan, grid = _read_plan(out)
    planned = int(plan.file.get("label_draws") or 1)
    if planned == 1:
        cells = read_cells(out, plan, grid)
        seeds = plan.settings.get("seeds")
        by_student = isinstance(seeds, int) and 1 < plan.students < seeds
        plan = replace(plan, texts=read_texts(out), by_student=by_student)
        return _results(plan, grid, {0: cells}, _scores(plan, cells), [])
    folders = {draw: out / DRAWS_FOLDER / str(draw) for draw in range(planned)}
    finished = {
        draw: folder for draw, folder in folders.items() if (folder / RESULTS_FILE).is_file()
    }
    check_read_same_text(out, finished)
    draws = {
        draw: _below_draw(read_cells(folder, plan, grid), draw) for draw, folder in finished.items()
    }
    check_draws(out, [cells.fine_tuned for cells in draws.values()])
    scores, missing_draws = join_draws({draw: _scores(plan, one) for draw, one in draws.items()})
    texts = read_texts(next(iter(finished.values()), out))  # all have the same
    plan = replace(plan, draws=[*draws], texts=texts)
    unfinished = [draw for draw in folders if draw not in finished]
    notes = list(_incomplete_notes(unfinished, planned, missing_draws))
    notes += _takeover_notes(folders[FIRST_DRAW])
    return _results(plan, grid, draws, scores, notes)


def _scores(plan: CycleResults, cells: Cells) -> list[ArmScores]:
    selected = plan.file.get("experts", {}).get("teacher") != "all"
    students = plan.students if plan.by_student else 1
    return scores_of(
        *(plan.arms, list(plan.metrics), cells.fine_tuned, cells.own_heads), selected, students
    )


def _results(
    plan: CycleResults,
    grid: Grid,
    draws: Mapping[int, Cells],
    scores: list[ArmScores],
    notes: list[str],
) -> CycleResults:
    """Return everything derived from the scores. ``draws``: by number; a single one if the labels
    are not drawn again. ``notes``: what is said first.
    """
    first = next(iter(draws.values()), Cells({}, {}, {}, {}))
    searched = [
        search_result(*cell, grid, points, first.fine_tuned.get(cell))
        for cell, points in first.searches.items()
        if points
    ]
    experts = [one for cells in draws.values() for one in _kept_experts(plan, cells)]
    costs = {stage: s for cells in draws.values() for stage, s in stage_costs(cells).items()}
    by_draw = [arm_costs(plan.arms, list(plan.metrics), cells) for cells in draws.values()]
    results = replace(
        plan,
        scores=scores,
        differences=differences_of(plan.arms, plan.metrics, scores),
        searched=searched,
        costs=dict(sorted(costs.items())),
        experts=experts,
        arm_costs=mean_costs(by_draw),
    )
    primary = Primary.of(plan.file.get("primary"), results.main, results.judged_on)
    results = replace(results, primary=primary)
    notes = notes_of(results, {draw: cells.fine_tuned for draw, cells in draws.items()}, notes)
    return replace(results, notes=notes, verdict=verdict_of(results))


def _kept_experts(plan: CycleResults, cells: Cells) -> Iterator[KeptExpert]:
    """Yield the best expert on dev for every task."""
    for task in plan.metrics:
        if (one := cells.fine_tuned.get((EXPERT, task))) is not None:
            dev = one.dev[one.seeds.index(one.best_seed)]
            yield KeptExpert(task, one.folder, one.best_seed, len(one.seeds), one.metric, dev)


# --- several draws of the labels ------------------------------------------------------------------


def _below_draw(cells: Cells, draw: int) -> Cells:
    """Return the cells of a draw with folders relative to the whole cycle's."""
    parent = f"{DRAWS_FOLDER}/{draw}"

    def below(one: FineTuned, parent: str = parent) -> FineTuned:
        return replace(one, folder=f"{parent}/{one.folder}")

    first = f"{DRAWS_FOLDER}/{FIRST_DRAW}"  # its search serves all draws
    return Cells(
        {cell: below(one) for cell, one in cells.fine_tuned.items()},
        {cell: below(one) for cell, one in cells.own_heads.items()},
        {cell: [below(one, first) for one in points] for cell, points in cells.searches.items()},
        {name: one.below(parent) for name, one in cells.students.items()},
    )


def _incomplete_notes(
    draws: Sequence[int], planned: int, missing_draws: Mapping[tuple[str, str], Sequence[int]]
) -> Iterator[str]:
    """Yield sentences about unfinished draws, and about arms that some draws lack."""
    if draws:
        yield (
            f"{UNFINISHED}, not there yet: draw {_listed(draws)} of the {planned} draws of the "
            "labels (from 0); the results do not cover them"
        )
    incomplete = [
        f"{arm} on {task} (draw {_listed(missing)})"
        for (arm, task), missing in missing_draws.items()
        if task != MEAN
    ]
    if incomplete:
        yield (
            f"{UNFINISHED}, and left out, because some draws lack them: {'; '.join(incomplete)}. "
            "A mean over fewer draws would be over other labels than those of the other arms"
        )
    if means := [arm for arm, task in missing_draws if task == MEAN]:
        arms = ", ".join(means)
        yield f"{UNFINISHED}, without a mean over tasks, which not every draw has: {arms}"


def _takeover_notes(first: Path) -> Iterator[str]:
    """Yield a sentence if the search was made in another folder."""
    if sources := search_sources(first):
        tasks = ", ".join(f"{task} (from {file})" for task, file in sources.items())
        yield (
            f"the search was made in another folder, and taken over for {tasks}: its scores and "
            "its seconds come from there"
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


# --- what was planned -----------------------------------------------------------------------------


def read_texts(out: Path) -> list[TextFacts]:
    """Return the counts of test texts in the unlabelled text, or in that of each task."""
    texts = []
    for file in sorted(out.glob(f"costs/**/corpus/{HELD_TEXTS_FILE}")):
        is_of_task = file.parents[1] != out / "costs"
        values = {**(read_json(file) or {}), "task": file.parents[1].name if is_of_task else ""}
        try:
            texts.append(TypeAdapter(TextFacts).validate_python(values))
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged ({error}); remove it and resume") from None
    return texts


def _read_plan(out: Path) -> tuple[CycleResults, Grid]:
    """Return the content of cycle.json: results without any scores yet, and the search grid."""
    values = read_json(out / CYCLE_FILE)
    if values is None or values.get("written_by") != CYCLE_WRITER:
        raise InputError(
            f"{out} is not a directory of `pipeline rekindle`: it has no {CYCLE_FILE} of one. "
            "Give the directory that its --out named"
        )
    try:
        read = TypeAdapter(TaskFacts).validate_python
        about = {one["name"]: one for one in values.get("settings", {}).get("tasks", [])}
        tasks = [
            read({"about": about.get(name, {}).get("about", "")} | task | {"name": _name(name)})
            for name, task in values["tasks"].items()
        ]
        arms = [_name(arm) for arm in values["arms"]]
        grid = {key: list(points) for key, points in (values.get("search") or {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{out / CYCLE_FILE} is damaged ({error!r})") from None
    settings = {k: v for k, v in values.items() if k not in ("written_by", "arms", "tasks")}
    return CycleResults(arms, tasks, [], [], [], {}, [], settings), grid


def _name(name: object) -> str:
    """Check a name of an arm or a task: it names a folder, and "mean" is reserved."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..", MEAN):
        raise ValueError(f"{name!r} is not a valid name")
    return name
