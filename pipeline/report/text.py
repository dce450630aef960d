"""Tables and notes as plain text within a line width. No number is broken, no cell is cut.

A table that fits is drawn unchanged. Otherwise words and headings are folded at their joints,
within their cells. If that is not enough, the table is split into several below each other, each
repeating the first column, or its rows become columns: whichever needs fewer parts, then fewer
lines.
"""

import io
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import rich.table
from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from rekindle.pipeline.console import as_written, in_line
from rekindle.pipeline.report.table import Column, Table

WIDEST = 10_000  # characters; wider than any table
_WIDEST_CELL = 28  # characters, if a table does not fit unchanged; longer than any number
_WIDEST_HEAD = 14  # the same for a heading above narrower cells
_JOINT = re.compile(r"(?<=[ =/_;])|(?<=,)(?!\d)|(?<=[A-Za-z][.:-])(?=[A-Za-z])")


def terminal_width() -> int:
    """Return the width of the terminal in characters; 80 without a terminal."""
    return shutil.get_terminal_size((80, 24)).columns


def text_lines(table: Table, width: int) -> list[str]:
    """Return the title, the table and its note, with lines of at most ``width`` characters."""
    lines = wrapped(table.title, width) if table.title else []
    lines += _fit([*map(_as_printed, table.columns)], width) if table.columns else []
    return lines + (wrapped(table.note, width) if table.note else [])


def wrapped(sentence: str, width: int) -> list[str]:
    """Wrap a sentence to ``width`` characters, breaking between words."""
    return textwrap.wrap(
        in_line(sentence),
        width,
        initial_indent=" ",
        subsequent_indent="   ",
        break_long_words=False,
        break_on_hyphens=False,
    )


# --- fitting --------------------------------------------------------------------------------------


def _as_printed(column: Column) -> Column:
    """Return the column with its words as the console will show them, so that alignment
    survives.
    """
    title, *cells = (as_written(in_line(text)) for text in (column.title, *column.cells))
    return replace(column, title=title, cells=cells)


def _fit(columns: Sequence[Column], width: int) -> list[str]:
    unchanged = _draw(_rich(columns))
    if _width(unchanged) <= width:
        return unchanged
    layouts = [_parts([*map(_fold_column, one)], width) for one in (columns, _transposed(columns))]
    parts = min(layouts, key=lambda parts: (len(parts), sum(map(len, parts))))
    return [line for number, part in enumerate(parts) for line in ([""] * (number > 0) + part)]


def _parts(columns: Sequence[Column], width: int) -> list[list[str]]:
    """Split into tables of the first column and as many others as fit, at least one."""
    first, parts, current = columns[0], [], [columns[0]]
    for column in columns[1:]:
        if len(current) > 1 and _width(_draw(_rich([*current, column]))) > width:
            parts.append(_draw(_rich(current)))
            current = [first]
        current.append(column)
    return [*parts, _draw(_rich(current))]


def _transposed(columns: Sequence[Column]) -> list[Column]:
    """Transpose the table: the first column holds the headings."""
    names, *others = columns
    rows = [Column(names.title, [column.title for column in others], words=True)]
    for row, name in enumerate(names.cells):
        best = frozenset(n for n, column in enumerate(others) if row in column.best)
        rows.append(Column(name, [column.cells[row] for column in others], best))
    return rows


def _fold_column(column: Column) -> Column:
    cells = [_fold(cell, _WIDEST_CELL) for cell in column.cells]
    widest = max((cell_len(line) for cell in cells for line in cell.split("\n")), default=0)
    title = _fold(column.title, max(widest, _WIDEST_HEAD))
    return replace(column, title=title, cells=cells)


def _fold(text: str, most: int) -> str:
    """Wrap a text to ``most`` characters, breaking at its joints if it has some."""
    lines = [""]
    for piece in _JOINT.split(text):
        if cell_len(lines[-1] + piece.rstrip()) <= most:
            lines[-1] += piece
        else:
            lines += chop_cells(piece, most)
    lines = lines if lines[0] else lines[1:]
    return "\n".join(line.rstrip() for line in lines)


# --- drawing --------------------------------------------------------------------------------------


def _rich(columns: Sequence[Column]) -> rich.table.Table:
    table = rich.table.Table(box=box.SIMPLE_HEAD)
    for column in columns:
        side: Literal["left", "right"] = "left" if column.words else "right"
        table.add_column(Text(column.title), justify=side, no_wrap=True, overflow="fold")
    for row in range(len(columns[0].cells)):
        table.add_row(*(_cell(column, row) for column in columns))
    return table


def _cell(column: Column, row: int) -> Text:
    # The other cells get a blank instead of the star, so that digits stay aligned.
    star = ("*" if row in column.best else " ") if column.best else ""
    return Text(column.cells[row] + star)


def _draw(table: rich.table.Table, width: int = WIDEST) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(table)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return [as_written(line) for line in lines if line]


def _width(lines: Sequence[str]) -> int:
    return max(map(cell_len, lines))
