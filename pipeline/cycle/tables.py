"""The results of a cycle as tables, and these in plain text.

Every cell comes from ``CycleResults`` alone, so that results.json gives the same tables again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rekindle.data.counted import counted
from rekindle.pipeline.cycle.arms import ARMS
from rekindle.pipeline.cycle.scores import MEAN, CycleResults
from rekindle.pipeline.cycle.searched import Searched, Tried
from rekindle.pipeline.report.cache import NOTE, teacher_table
from rekindle.pipeline.report.cost import cost_lines
from rekindle.pipeline.report.scores import TaskScores, difference_tables, score_table
from rekindle.pipeline.report.table import NOTHING, Column, Table, formatted, table_of
from rekindle.pipeline.report.text import terminal_width, text_lines, wrapped


def tables_of(results: CycleResults) -> list[Table]:
    """Scores, differences, search, tasks and seconds, without those that are empty."""
    own = own_tables(results)
    return [*own[:1], *difference_tables(results.differences), *own[1:]]


def own_tables(results: CycleResults) -> list[Table]:
    """Those of ``tables_of`` that no other page has."""
    tables = [_scores(results), *_searches(results.searched), _tasks(results), _costs(results)]
    return [table for table in tables if table.columns[0].cells]


def saved_tables(results: CycleResults) -> Iterator[Table]:
    """What is in the cache, and what it has saved; nothing where that is not known."""
    if (cache := results.cache) is not None:
        title = (
            f"the cache: {counted(cache.sequences, 'sequence')}, {counted(cache.tokens, 'token')}"
        )
        yield teacher_table(cache.teachers, title, NOTE)
    if results.cost is not None:
        yield table_of("what it costs", ["", ""], cost_lines(results.cost), words=1)


def _scores(results: CycleResults) -> Table:
    """Also the tasks' second metrics, and the expert that teaches."""
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
    title = "test scores in %: mean ± standard deviation over seeds"
    table = score_table("arm", arms, columns, title)
    seeds = [str(max(len(column.of(arm)) for column in columns)) for arm in arms]
    names, *scores = table.columns
    return replace(table, columns=[names, Column("seeds", seeds), *scores])


def _searches(searched: Sequence[Searched]) -> Iterator[Table]:
    if not searched:
        return
    names = list(dict.fromkeys(_point(point) for one in searched for point in one.tried))
    rows = []
    for one in searched:
        tried = {_point(point): point for point in one.tried}
        rows.append([one.arm, one.task, *(_tried(one, tried.get(name)) for name in names)])
    seeds = len(searched[0].tried[0].seeds)
    keys = ", ".join(searched[0].tried[0].settings)
    over = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    title = f"search over {keys}: main metric on dev in %, {over}; * chosen"
    yield table_of(title, ["arm", "task", *names], rows, words=2)


def _point(point: Tried) -> str:
    values = point.settings.values()
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _tried(one: Searched, point: Tried | None) -> str:
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


def _costs(results: CycleResults) -> Table:
    """By kind of stage, or arm: the single folders are in the JSON."""
    sums: dict[str, list[float]] = {}
    for folder, seconds in results.costs.items():
        kind, *rest = folder.split("/")
        name = f"{kind}/{rest[0]}" if kind in ("fine-tuned", "students") else kind
        sums.setdefault(name, []).append(seconds)
    rows = [[name, str(len(s)), f"{sum(s):,.1f}"] for name, s in sums.items()]
    return table_of("seconds, as recorded", ["stage", "parts", "seconds"], rows, words=1)


def as_text(results: CycleResults, width: int | None = None) -> str:
    """The tables in plain text, ``width`` characters wide (default: the terminal's), and notes.

    Where one does not fit, a row is a column, if that is narrower. Nothing is ever cut.
    """
    tables = [*tables_of(results), *saved_tables(results)]
    width = width or terminal_width()
    lines = [(*text_lines(table, width), "") for table in tables]
    arms = [f"arm {arm}: {ARMS[arm]}" for arm in ARMS if arm in results.arms]
    lines += [tuple(wrapped(arm, width)) for arm in arms]
    lines += [tuple(wrapped(f"note: {note}", width)) for note in results.notes]
    return "\n".join(line for block in lines for line in block)
