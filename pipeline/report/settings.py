"""The page's configuration differences: every setting that is not the same in all runs."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rekindle.pipeline.report.page import Block, Note, Section
from rekindle.pipeline.report.table import Column, Table

MARKED = (
    "≠ marks what is unlike the most common value of its line (of several, the one that comes "
    "first). Settings that are not here are the same in all runs."
)


def settings_section(names: Sequence[str], differing: Mapping[str, Sequence[str]]) -> Section:
    """A line for each key of ``differing``, which has its value, in words, for every run."""
    if len(names) < 2:
        return Section("Configuration", [])
    blocks: list[Block] = [Note("All settings of the runs are the same.")]
    if differing:
        blocks = [_table(names, differing), Note(MARKED)]
    return Section("Configuration", blocks)


def _table(names: Sequence[str], differing: Mapping[str, Sequence[str]]) -> Table:
    usual = [Counter(values).most_common(1)[0][0] for values in differing.values()]
    columns = [Column("setting", list(differing))]
    for number, name in enumerate(names):
        cells = [values[number] for values in differing.values()]
        unlike = {row for row, cell in enumerate(cells) if cell != usual[row]}
        columns.append(Column(name, cells, words=True, unlike=frozenset(unlike)))
    return Table("", columns)
