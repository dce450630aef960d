"""The tables of ``few_labels/why.py``'s rows, in Markdown: what experts know and students learn."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cycle_page import table
from record import BENCHMARKS

from rekindle.pipeline.report.table import NOTHING, table_of

ROWS = BENCHMARKS / "few_labels" / "why.jsonl"
_TABLES = {"few": "few_labels", "small": "small_expert"}
_STUDENTS = {
    "temperature": "Students of the committee at other temperatures",
    "texts": "Students of the committee on a share of the texts, in the same number of steps",
    "steps": "Students of the committee after a share of the steps",
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
    return "\n\n".join([*_teachers(own), *_agreement(own), *_students(own), _origins(own)])


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
    lines = [
        [cell, name, *_compared(row)]
        for cell, points in _of_curve(rows, "agreement").items()
        for name, row in points.items()
    ]
    if lines:
        yield (
            "**What students learn of it**, on test: right answers of the student and of its "
            "teacher, the same answers of both, and right answers of the student where the teacher "
            "is right and where it is wrong."
        )
        yield table(table_of("", ["cell", "student", *_HEAD], lines, words=2))


_HEAD = ["right", "teacher right", "the same", "where it is right", "where it is wrong"]


def _compared(row: Row) -> list[str]:
    return [
        _percent(row[key]) for key in ("test", "teacher", "agreement", "where_right", "where_wrong")
    ]


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
                    lines.append([cell, point, head, *_compared(row[head])])
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
