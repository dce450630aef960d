"""The results of a cycle as tables, in plain text and in Markdown: the same cells in both.

Every cell comes from ``CycleResults`` alone, so that results.json gives the same tables again.
"""

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rekindle.pipeline.cycle.results import CycleResults
from rekindle.pipeline.cycle.scores import MEAN, SELECTED, ArmScores, Difference
from rekindle.pipeline.cycle.searched import Searched, Tried
from rekindle.pipeline.report.table import NOTHING

_WIDEST = 10_000  # characters: no cell is ever cut
_SMALLEST_P = 0.001


@dataclass(frozen=True)
class Cells:
    """A table with its title; the first ``words`` columns are words, the others numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]
    words: int = 1

    def transposed(self) -> "Cells":
        """Rows as columns; only where one column alone is words."""
        head, *rows = [list(column) for column in zip(self.head, *self.rows, strict=True)]
        return replace(self, head=head, rows=rows)


def tables_of(results: CycleResults) -> list[Cells]:
    """Scores, differences, search, tasks and seconds, without those that are empty."""
    tables = [
        _scores(results),
        *_differences(results.differences),
        *_searches(results.searched),
        _tasks(results),
        _costs(results.costs),
    ]
    return [table for table in tables if table.rows]


def _scores(results: CycleResults) -> Cells:
    columns = list(dict.fromkeys((s.task, s.metric) for s in results.scores if s.task != MEAN))
    order = [task.name for task in results.tasks]
    columns.sort(key=lambda column: order.index(column[0]))
    if any(one.task == MEAN for one in results.scores):
        columns.append((MEAN, MEAN))
    by_cell = {(s.arm, s.task, s.metric): s for s in results.scores}
    rows = []
    for arm in dict.fromkeys(one.arm for one in results.scores):
        cells = [by_cell.get((arm, *column)) for column in columns]
        seeds = 1 if arm == SELECTED else max(len(one.scores) for one in cells if one)
        rows.append([arm, str(seeds), *map(_score, cells)])
    heads = [MEAN if task == MEAN else f"{task} {metric}" for task, metric in columns]
    title = "test scores in %: mean ± standard deviation over seeds"
    return Cells(title, ["arm", "seeds", *heads], rows)


def _score(one: ArmScores | None) -> str:
    if one is None:
        return NOTHING
    return f"{100 * one.mean:.2f}" + ("" if one.std is None else f" ± {100 * one.std:.2f}")


def _differences(differences: Sequence[Difference]) -> list[Cells]:
    tables = []
    head = ["arm", "task", "difference", "95 % interval", "p", "p (Holm)", "seeds"]
    for against in dict.fromkeys(one.against for one in differences):
        rows = [
            [
                one.arm,
                one.task,
                f"{100 * one.mean:+.2f}",
                _interval(one),
                _p(one.p),
                _p(one.p_adjusted),
                str(one.n),
            ]
            for one in differences
            if one.against == against
        ]
        title = f"differences to {against} on test, main metrics, in points of 100"
        tables.append(Cells(title, head, rows, words=2))
    return tables


def _interval(one: Difference) -> str:
    if one.low is None or one.high is None:
        return NOTHING
    return f"{100 * one.low:+.2f} … {100 * one.high:+.2f}"


def _p(p: float | None) -> str:
    if p is None:
        return NOTHING
    return f"< {_SMALLEST_P}" if p < _SMALLEST_P else f"{p:.3f}"


def _searches(searched: Sequence[Searched]) -> list[Cells]:
    if not searched:
        return []
    names = list(dict.fromkeys(_point(point) for one in searched for point in one.tried))
    rows = []
    for one in searched:
        tried = {_point(point): point for point in one.tried}
        rows.append([one.arm, one.task, *(_tried(one, tried.get(name)) for name in names)])
    seeds = len(searched[0].tried[0].seeds)
    keys = ", ".join(searched[0].tried[0].settings)
    over = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    title = f"search over {keys}: main metric on dev in %, {over}; * chosen"
    return [Cells(title, ["arm", "task", *names], rows, words=2)]


def _point(point: Tried) -> str:
    values = point.settings.values()
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _tried(one: Searched, point: Tried | None) -> str:
    if point is None:
        return NOTHING
    return f"{100 * point.mean:.2f}" + ("*" if point.settings == one.chosen else " ")


def _tasks(results: CycleResults) -> Cells:
    rows = [
        [task.name, task.metric, *(f"{n:,}" for n in (task.train, task.dev, task.test))]
        for task in results.tasks
    ]
    return Cells("tasks and their examples", ["task", "metric", "train", "dev", "test"], rows, 2)


def _costs(costs: dict[str, float]) -> Cells:
    """By kind of stage, or arm: the single folders are in the JSON."""
    sums: dict[str, list[float]] = {}
    for folder, seconds in costs.items():
        kind, *rest = folder.split("/")
        name = f"{kind}/{rest[0]}" if kind in ("fine-tuned", "students") else kind
        sums.setdefault(name, []).append(seconds)
    rows = [[name, str(len(s)), f"{sum(s):,.1f}"] for name, s in sums.items()]
    return Cells("seconds, as recorded", ["stage", "parts", "seconds"], rows)


# --- text -----------------------------------------------------------------------------------------


def as_text(results: CycleResults, width: int | None = None) -> str:
    """The tables in plain text, ``width`` characters wide (default: the terminal).

    Where the scores do not fit, an arm is a column, if that is narrower. Nothing is ever cut.
    """
    width = width or shutil.get_terminal_size((160, 24)).columns
    lines = []
    for table in tables_of(results):
        lines += [f" {table.title}", *_fitting(table, width), ""]
    return "\n".join([*lines, *(f" note: {note}" for note in results.notes)])


def _fitting(table: Cells, width: int) -> list[str]:
    lines = _drawn(table)
    if table.words == 1 and _width(lines) > width:
        lines = min(lines, _drawn(table.transposed()), key=_width)
    return lines


def _width(lines: Sequence[str]) -> int:
    return max(map(len, lines))


def _drawn(cells: Cells) -> list[str]:
    table = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(cells.head):
        table.add_column(name, justify="left" if number < cells.words else "right", no_wrap=True)
    for row in cells.rows:
        table.add_row(*map(Text, row))
    stream = io.StringIO()
    Console(file=stream, width=_WIDEST, color_system=None).print(table)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return [line for line in lines if line]


# --- Markdown -------------------------------------------------------------------------------------


def as_markdown(results: CycleResults) -> str:
    """The same tables and notes in Markdown."""
    blocks = []
    for table in tables_of(results):
        dashes = ["---" if n < table.words else "---:" for n in range(len(table.head))]
        rows = [_piped(table.head), "|" + "|".join(dashes) + "|", *map(_piped, table.rows)]
        blocks.append("\n".join([f"**{_escaped(table.title)}**", "", *rows]))
    notes = "\n".join(f"- {_escaped(note)}" for note in results.notes)
    return "\n\n".join([*blocks, notes]) + "\n"


def _piped(row: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell.strip()) for cell in row) + " |"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")
