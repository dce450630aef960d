"""The results of a cycle as tables, and as plain text.

Every cell comes from ``CycleResults`` alone, so results.json gives the same tables again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rekindle.data.counted import counted
from rekindle.pipeline.cycle.arms import ARMS
from rekindle.pipeline.cycle.costs import KINDS, SHARED_KINDS
from rekindle.pipeline.cycle.finetuned import EXPERT, START, own_head
from rekindle.pipeline.cycle.scores import MEAN, ArmCost, CycleResults
from rekindle.pipeline.cycle.search import DRAWS_FOLDER, SearchResult, TriedPoint
from rekindle.pipeline.report.cache import NOTE, teacher_table
from rekindle.pipeline.report.cost import cost_lines
from rekindle.pipeline.report.scores import (
    TaskScores,
    difference_cells,
    difference_head,
    difference_tables,
    score_table,
)
from rekindle.pipeline.report.table import NOTHING, Column, Table, formatted, table_of
from rekindle.pipeline.report.text import terminal_width, text_lines, wrapped

_OWN_HEADS = (
    "A student with its own head is the student of its arm, counted again: it needs no search and "
    "no fine-tuning."
)
_LISTED_BY_ARM = ("fine-tuned", "students", "distilled")  # folders whose subfolders are listed


def tables_of(results: CycleResults) -> list[Table]:
    """Return the primary comparison, scores, differences, search, tasks and seconds, without empty
    tables.
    """
    own = own_tables(results)
    differences = difference_tables(results.differences, results.unit, secondary(results))
    return [*primary_tables(results), *own[:1], *differences, *own[1:]]


def own_tables(results: CycleResults) -> list[Table]:
    """Return those of ``tables_of`` that only a cycle has: all but the comparisons."""
    tables = [_scores(results), *own_head_tables(results), *_searches(results), _tasks(results)]
    tables += [*_arm_costs(results), _costs(results)]
    return [table for table in tables if table.columns[0].cells]


def secondary(results: CycleResults) -> str:
    """Return the heading for comparisons other than the primary one, if there is one."""
    return "secondary: " if results.primary is not None else ""


def primary_tables(results: CycleResults) -> Iterator[Table]:
    """Yield the table of the comparison named before anything ran, if there is one."""
    if (primary := results.primary) is None:
        return
    by_arm = {one.against: one for one in primary.differences}
    rows = [[arm, *difference_cells(by_arm.get(arm))] for arm in primary.against]
    head = [f"{primary.arm} against", *difference_head(results.unit)]
    task = "the mean over tasks" if results.judged_on == MEAN else results.judged_on
    title = f"primary comparison, named before anything ran: on {task}, in points of 100"
    yield table_of(title, head, rows, words=1, note=primary.about)


def own_head_tables(results: CycleResults) -> Iterator[Table]:
    """Yield the table of what students score with their own heads beyond the base arm, ``longer``
    and themselves fine-tuned again, on what the arms are judged on.
    """
    rows = [
        [one.arm, one.against, *difference_cells(one)]
        for one in results.own_head_differences
        if one.task == results.judged_on
    ]
    task = "the mean over tasks" if results.judged_on == MEAN else results.judged_on
    title = f"{secondary(results)}differences of students with their own heads on {task}"
    head = ["student", "against", *difference_head(results.unit)]
    note = (
        "A student against its own arm: with its own head against fine-tuned again. p is adjusted "
        "over all students and tasks, for the base arm, for longer, and for the own arms."
    )
    yield table_of(f"{title}, in points of 100", head, rows, words=2, note=note)


def saved_tables(results: CycleResults) -> Iterator[Table]:
    """Yield the tables of what the cache holds and what it has saved, if known."""
    if (cache := results.cache) is not None:
        title = (
            f"the cache: {counted(cache.sequences, 'sequence')}, {counted(cache.tokens, 'token')}"
        )
        yield teacher_table(cache.teachers, title, NOTE)
    if results.cost is not None:
        yield table_of("what it costs", ["", ""], cost_lines(results.cost), words=1)


def _scores(results: CycleResults) -> Table:
    """Return the table of scores, with the tasks' second metrics and the expert that teaches."""
    by_column: dict[tuple[str, str], dict[str, list[float]]] = {}
    for one in results.scores:
        metric = "" if one.task == MEAN else one.metric
        by_column.setdefault((one.task, metric), {})[one.arm] = one.scores
    order = [*results.metrics, MEAN]
    columns = [
        TaskScores(task, metric, "", by_column[task, metric])
        for task, metric in sorted(by_column, key=lambda column: order.index(column[0]))
    ]
    arms = list(dict.fromkeys(one.arm for one in results.scores))
    over = {"draw": "draws of the labels", "student": "students"}.get(results.unit, "seeds")
    title = f"{secondary(results)}test scores in %: mean ± standard deviation over {over}"
    table = score_table("arm", arms, columns, title)
    counts = [str(max(len(column.of(arm)) for column in columns)) for arm in arms]
    names, *scores = table.columns
    return replace(table, columns=[names, Column(f"{results.unit}s", counts), *scores])


def _searches(results: CycleResults) -> Iterator[Table]:
    searches = results.searched
    if not searches:
        return
    names = list(dict.fromkeys(_point_name(point) for one in searches for point in one.tried))
    rows = []
    for one in searches:
        points = {_point_name(point): point for point in one.tried}
        rows.append([one.arm, one.task, *(_point_cell(one, points.get(name)) for name in names)])
    seeds = len(searches[0].tried[0].seeds)
    keys = ", ".join(searches[0].tried[0].settings)
    over = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    title = f"search over {keys}: main metric on dev in %, {over}; * chosen"
    yield table_of(title, ["arm", "task", *names], rows, words=2)


def _point_name(point: TriedPoint) -> str:
    values = point.settings.values()
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _point_cell(one: SearchResult, point: TriedPoint | None) -> str:
    if point is None:
        return NOTHING
    return f"{100 * point.mean:.2f}" + ("*" if point.settings == one.chosen else " ")


def _tasks(results: CycleResults) -> Table:
    head = ["task", "metric", "train", "dev", "test", "chance in %"]
    rows = [
        [
            task.name,
            task.metric,
            *(f"{n:,}" for n in (task.train, task.dev, task.test)),
            formatted(task.chance and 100 * task.chance, "{:.2f}"),
        ]
        for task in results.tasks
    ]
    return table_of("tasks and their examples", head, rows, words=2)


def _arm_costs(results: CycleResults) -> Iterator[Table]:
    """Yield the table of the seconds that each arm needs; some stages serve several arms."""
    costs = results.arm_costs
    kinds = [kind for kind in KINDS if any(kind in one.by_kind for one in costs)]
    if not kinds:
        return
    rows = [
        [one.arm, *(formatted(one.by_kind.get(k), "{:,.1f}") for k in kinds), f"{one.seconds:,.1f}"]
        for one in costs
    ]
    draws = results.draws
    mean = f", mean of {counted(len(draws), 'draw')} of the labels" if draws else ""
    title = f"seconds of all that an arm needs, from labels and text to its scores{mean}"
    has_own_heads = any(one.arm == own_head(arm.arm) for one in costs for arm in costs)
    own_heads = [_OWN_HEADS] if has_own_heads else []
    note = " ".join([*_shared_kinds(costs), *own_heads, *_unrecorded(costs)])
    yield table_of(title, ["arm", *kinds, "seconds"], rows, words=1, note=note)


def _shared_kinds(costs: Sequence[ArmCost]) -> Iterator[str]:
    """Yield a sentence with the kinds of stages that serve several arms and count for each."""
    shared = []
    for kind in SHARED_KINDS:
        if len(arms := [one.arm for one in costs if kind in one.by_kind]) > 1:
            shared.append(f"{kind} ({', '.join(arms)})")
    if shared:
        yield (
            f"Shared, and counted for every arm that needs them: {'; '.join(shared)}. So the arms' "
            "sum is more than the cycle took."
        )


def _unrecorded(costs: Sequence[ArmCost]) -> Iterator[str]:
    if unknown := [f"{one.arm}: {', '.join(one.unknown)}" for one in costs if one.unknown]:
        yield f"Not recorded, and in no sum: {'; '.join(unknown)}."


def _costs(results: CycleResults) -> Table:
    """Return the costs by kind of stage or by arm; results.json has those of each folder."""
    sums: dict[str, list[float]] = {}
    for folder, seconds in results.costs.items():
        kind, *rest = folder.split("/")
        if kind == DRAWS_FOLDER:
            _, kind, *rest = rest
        name = f"{kind}/{rest[0]}" if kind in _LISTED_BY_ARM else kind
        sums.setdefault(name, []).append(seconds)
    rows = [[name, str(len(s)), f"{sum(s):,.1f}"] for name, s in sums.items()]
    return table_of("seconds, as recorded", ["stage", "parts", "seconds"], rows, words=1)


def arm_descriptions(results: CycleResults) -> list[tuple[str, str]]:
    """Return each arm with its description, and the experts' model if it is another one."""
    by_arm: dict[str, str] = {arm: words for arm, words in ARMS.items() if arm in results.arms}
    if results.base == START:
        model = results.file.get("experts", {}).get("model") or "another model"
        by_arm |= {EXPERT: f"{model}, fine-tuned: the teacher"}
        by_arm |= {START: "the model that students start from, fine-tuned: the arm to beat"}
    return list(by_arm.items())


def as_text(results: CycleResults, width: int | None = None) -> str:
    """Return the tables as plain text, ``width`` characters wide (default: the terminal's), and the
    notes.

    A table that does not fit is transposed if that is narrower. Nothing is ever cut. If there is a
    primary comparison, the others are shown only on the mean over tasks.
    """
    shown, extra_notes = results, []
    if results.primary is not None and any(o.task == MEAN for o in results.differences):
        means = [one for one in results.differences if one.task == MEAN]
        shown = replace(results, differences=means)
        extra_notes = ["differences on each task are in the report and in results.json"]
    tables = [*tables_of(shown), *saved_tables(results)]
    width = width or terminal_width()
    lines = [(*text_lines(table, width), "") for table in tables]
    lines += [
        tuple(wrapped(f"arm {arm}: {words}", width)) for arm, words in arm_descriptions(results)
    ]
    lines += [tuple(wrapped(f"note: {one}", width)) for one in (*extra_notes, *results.notes)]
    return "\n".join(line for block in lines for line in block)
