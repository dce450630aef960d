"""A table as columns of finished cells: what text and page both draw. Knows no run."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

NOTHING = "–"  # for what is not there
Words = Sequence[str]


@dataclass(frozen=True)
class Column:
    """A column. ``best`` are the rows that have the best value, ``unlike`` those whose value is not
    the usual one; ``below`` has a second, quieter line for each cell.
    """

    title: str
    cells: list[str]
    best: frozenset[int] = frozenset()
    words: bool = False
    unlike: frozenset[int] = frozenset()
    below: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """Columns of one length below a title; without columns, only ``note`` is said.

    ``samples`` has, for each row that stands for a run, the number of its line in all pictures.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: list[Column]
    note: str = ""
    samples: Sequence[int] = ()


def table_of(title: str, head: Words, rows: Sequence[Words], words: int, note: str = "") -> Table:
    """The table with these ``rows``; the first ``words`` columns are words, the others numbers."""
    columns = [
        Column(name, [row[number] for row in rows], words=number < words)
        for number, name in enumerate(head)
    ]
    return Table(title, columns, note)


def stacked(table: Table, title: str) -> Table:
    """The table with its column ``title``, if it has it, below the one before: less to scroll."""
    titles = [column.title for column in table.columns]
    if title not in titles:
        return table
    at = titles.index(title)
    below = ["" if cell == NOTHING else cell for cell in table.columns[at].cells]
    before = table.columns[at - 1]
    both = replace(before, title=f"{before.title}, {title}", below=below)
    return replace(table, columns=[*table.columns[: at - 1], both, *table.columns[at + 1 :]])


def best_rows(
    values: Sequence[float | None], best: Callable[[Iterable[float]], float]
) -> frozenset[int]:
    """The rows that have the ``best`` (max or min) of the values that are finite numbers; none
    where there is one such row, or all agree.
    """
    known = {row: v for row, v in enumerate(values) if v is not None and math.isfinite(v)}
    if len(set(known.values())) < 2:
        return frozenset()
    top = best(known.values())
    return frozenset(row for row, value in known.items() if value == top)


def formatted(value: float | None, form: str, nothing: str = NOTHING) -> str:
    """The value in a format such as ``{:.1f}``; ``nothing`` where there is none."""
    return nothing if value is None else form.format(value)
