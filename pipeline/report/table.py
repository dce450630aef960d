"""A table as columns of formatted cells, drawn by both text and page. Knows no run."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

NOTHING = "–"  # shown for missing values
Words = Sequence[str]


@dataclass(frozen=True)
class Column:
    """A column. ``best``: rows with the best value; ``unlike``: rows whose value is unusual;
    ``below``: a second, quieter line for each cell.
    """

    title: str
    cells: list[str]
    best: frozenset[int] = frozenset()
    words: bool = False
    unlike: frozenset[int] = frozenset()
    below: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """Columns of equal length below a title; without columns, only ``note`` is shown.

    ``samples``: for each row that stands for a run, the number of its line in all pictures.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: list[Column]
    note: str = ""
    samples: Sequence[int] = ()


def table_of(title: str, head: Words, rows: Sequence[Words], words: int, note: str = "") -> Table:
    """Return a table of ``rows``; the first ``words`` columns are words, the others numbers."""
    columns = [
        Column(name, [row[number] for row in rows], words=number < words)
        for number, name in enumerate(head)
    ]
    return Table(title, columns, note)


def stack_column(table: Table, title: str) -> Table:
    """Move the column ``title``, if present, below the one before it, so that there is less to
    scroll.
    """
    titles = [column.title for column in table.columns]
    if title not in titles:
        return table
    number = titles.index(title)
    below = ["" if cell == NOTHING else cell for cell in table.columns[number].cells]
    previous = table.columns[number - 1]
    joined = replace(previous, title=f"{previous.title}, {title}", below=below)
    columns = [*table.columns[: number - 1], joined, *table.columns[number + 1 :]]
    return replace(table, columns=columns)


def best_rows(
    values: Sequence[float | None], best: Callable[[Iterable[float]], float]
) -> frozenset[int]:
    """Return the rows with the ``best`` (max or min) finite value; none if fewer than two values
    differ.
    """
    known = {row: v for row, v in enumerate(values) if v is not None and math.isfinite(v)}
    if len(set(known.values())) < 2:
        return frozenset()
    top = best(known.values())
    return frozenset(row for row, value in known.items() if value == top)


def formatted(value: float | None, form: str, nothing: str = NOTHING) -> str:
    """Format the value, for instance with ``{:.1f}``; return ``nothing`` if it is None."""
    return nothing if value is None else form.format(value)
