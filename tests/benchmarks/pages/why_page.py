"""The tables of ``few_labels/why.py``'s rows, in Markdown: what experts know and students learn."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cycle_page import folded, table
from record import BENCHMARKS

from rekindle.data.counted import counted
from rekindle.pipeline.report.table import NOTHING, table_of

ROWS = BENCHMARKS / "few_labels" / "why.jsonl"
_TABLES = {"few": "few_labels", "small": "small_expert"}
_STUDENTS = {
    "temperature": "Students of the committee at other temperatures",
    "texts": "Students of the committee on a share of the texts, in the same number of steps",
    "steps": "Students of the committee after a share of the steps, or twice as many",
}

Row = Mapping[str, Any]


def read_rows(path: Path = ROWS) -> list[dict[str, Any]]:
    """Return the recorded points; none before the first."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def why(table_name: str, rows: Sequence[Row]) -> str:
    """Return the tables of the cells of a result table, all in %."""
    own = [row for row in rows if _TABLES[row["cells"]] == table_name]
    if not own:
        return "No cell was looked into yet."
    parts = [*_teachers(own), *_agreement(own), *_heads(own), *_students(own), _origins(own)]
    return "\n\n".join(parts)


def _cell(row: Row) -> str:
    return f"{row['task']} {row['draw']}"


def _of_curve(rows: Sequence[Row], curve: str) -> dict[str, dict[str, Row]]:
    """Return the rows of a curve by cell and point."""
    by_cell: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["curve"] == curve:
            by_cell.setdefault(_cell(row), {})[row["point"]] = row
    return by_cell


def _percent(fraction: float | None) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.1f}"


def _teachers(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "**What the experts know**: right answers on the task's own text (rows that are in no "
        "split; only this table uses their labels) and on test, of the three seeds and of the mean "
        "of their probabilities."
    )
    lines = []
    for cell, points in _of_curve(rows, "teachers").items():
        seeds = [row for point, row in points.items() if point != "committee"]
        for split in ("text", "test"):
            each = ", ".join(_percent(row[split]) for row in seeds)
            lines.append([cell, split, each, _percent(points["committee"][split])])
    yield table(table_of("", ["cell", "rows", "each seed", "all three"], lines, words=3))


def _agreement(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of what students learn of their teachers: the means of tasks with several
    cells, and each cell.
    """
    by_cell = _of_curve(rows, "agreement")
    by_task: dict[str, dict[str, list[Row]]] = {}
    for points in by_cell.values():
        for name, row in points.items():
            by_task.setdefault(row["task"], {}).setdefault(name, []).append(row)
    cells = [
        [cell, name, *_compared([row])]
        for cell, points in by_cell.items()
        for name, row in points.items()
    ]
    means = [
        [f"{task} ({counted(len(of), 'draw')})", name, *_compared(of)]
        for task, points in by_task.items()
        for name, of in points.items()
    ]
    if not cells:
        return
    yield (
        "**What students learn of it**, on test: right answers of the student and of its teacher, "
        "the same answers of both, and right answers of the student where the teacher is right and "
        "where it is wrong."
    )
    if len(by_task) == len(by_cell):
        yield table(table_of("", ["cell", "student", *_HEAD], cells, words=2))
    else:
        yield table(table_of("", ["task", "student", *_HEAD], means, words=2))
        yield folded("each draw", table(table_of("", ["cell", "student", *_HEAD], cells, words=2)))


def _heads(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of the committee's students with their own heads, as they are and fine-tuned
    again, beside a fresh one.
    """
    agreement = _of_curve(rows, "agreement")
    lines = []
    for cell, points in _of_curve(rows, "head").items():
        if (known := agreement.get(cell)) is None:
            continue
        scores = [known["committee (own head)"]["test"], known["committee"]["test"]]
        scores += [points[rate]["fine-tuned"]["test"] for rate in ("1.0", "0.1")]
        lines.append((cell, scores))
    if not lines:
        return
    if len(lines) > 1:
        means = [fmean(scores) for scores in zip(*(of for _, of in lines), strict=True)]
        lines.append(("mean", means))
    yield (
        "**The committee's students, fine-tuned again from the head that they were taught with**: "
        "right answers on test, beside that head as it is, and a fresh one (the arm `committee`)."
    )
    head = ["cell", "own head as it is", "fresh head", "own head, the arm's rate", "a tenth of it"]
    cells = [[cell, *map(_percent, scores)] for cell, scores in lines]
    yield table(table_of("", head, cells, words=1))


_HEAD = ["right", "teacher right", "the same", "where it is right", "where it is wrong"]


def _compared(rows: Sequence[Row]) -> list[str]:
    """Return the means of rows as cells."""
    keys = ("test", "teacher", "agreement", "where_right", "where_wrong")
    known = [[row[key] for row in rows if row[key] is not None] for key in keys]
    return [_percent(fmean(of) if of else None) for of in known]


def _students(rows: Sequence[Row]) -> Iterator[str]:
    for curve, title in _STUDENTS.items():
        lines = []
        by_cell = _of_curve(rows, curve)
        if curve != "temperature":  # all of them: the student of the cell's own temperature
            whole = _of_curve(rows, "temperature")
            by_cell = {
                cell: points | {"1.0": whole[cell]["1.0"]}
                for cell, points in by_cell.items()
                if "1.0" in whole.get(cell, {})
            }
        for cell, points in by_cell.items():
            for point, row in sorted(points.items(), key=lambda one: float(one[0])):
                for head in ("own head", "fine-tuned"):
                    lines.append([cell, point, head, *_compared([row[head]])])
        if lines:
            yield f"**{title}**, on test:"
            yield table(table_of("", ["cell", curve, "student", *_HEAD], lines, words=3))


def _origins(rows: Sequence[Row]) -> str:
    """Return devices, precisions and days, with the commits of each."""
    commits: dict[str, set[str]] = {}
    for row in rows:
        origin = f"{row['date']}: {row['device']}; {row['precision']}"
        commits.setdefault(origin, set()).add(row["commit"])
    lines = [f"- {one}; commit {', '.join(sorted(of))}" for one, of in sorted(commits.items())]
    return "\n".join(["Measured:", *lines])
