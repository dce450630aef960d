"""Tables in plain text, in which no cell is ever cut."""

import io
import shutil
from collections.abc import Sequence
from typing import Literal

import rich.table
from rich import box
from rich.console import Console
from rich.text import Text

from rekindle.pipeline.console import in_line
from rekindle.pipeline.report.table import Column, Table

WIDEST = 10_000  # characters: more than any table has
_WIDEST_CELL = 28  # of a row that is shown as a column: longer ones are folded


def terminal_width() -> int:
    """Characters of the terminal's line; 160 where there is no terminal."""
    return shutil.get_terminal_size((160, 24)).columns


def text_lines(table: Table, width: int) -> list[str]:
    """The title, the table and its note. Where it does not fit ``width`` characters, a row of the
    table is a column, if that is narrower.
    """
    lines = [f" {in_line(table.title)}"] if table.title else []
    if table.columns:
        drawn = _drawn(_upright(table.columns))
        if _width(drawn) > width:
            drawn = min(drawn, _drawn(_lying(table.columns)), key=_width)
        lines += drawn
    return [*lines, *([f" {in_line(table.note)}"] if table.note else [])]


def folded_lines(table: Table, width: int) -> list[str]:
    """The columns in ``width`` characters: what is too long goes on below, within its cell."""
    return _drawn(_upright(table.columns, fold=True), width)


def _upright(columns: Sequence[Column], fold: bool = False) -> rich.table.Table:
    table = rich.table.Table(box=box.SIMPLE_HEAD)
    for column in columns:
        side: Literal["left", "right"] = "left" if column.words else "right"
        table.add_column(
            Text(in_line(column.title)), justify=side, no_wrap=not fold, overflow="fold"
        )
    for row in range(len(columns[0].cells)):
        table.add_row(*(_cell(column, row) for column in columns))
    return table


def _lying(columns: Sequence[Column]) -> rich.table.Table:
    names, *others = columns
    table = rich.table.Table(box=box.SIMPLE_HEAD)
    table.add_column(Text(in_line(names.title)), no_wrap=True)
    for name in names.cells:
        table.add_column(
            Text(in_line(name)), justify="right", overflow="fold", max_width=_WIDEST_CELL
        )
    for column in others:
        table.add_row(
            Text(in_line(column.title)), *(_cell(column, row) for row in range(len(column.cells)))
        )
    return table


def _cell(column: Column, row: int) -> Text:
    # The others get a blank for the star, so that digits stand below digits.
    star = ("*" if row in column.best else " ") if column.best else ""
    return Text(in_line(column.cells[row]) + star)


def _drawn(table: rich.table.Table, width: int = WIDEST) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(table)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return [line for line in lines if line]


def _width(lines: Sequence[str]) -> int:
    return max(map(len, lines))
