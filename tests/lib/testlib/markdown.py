"""A cycle's tables in Markdown, as RESULTS.md has them."""

from collections.abc import Sequence

from rekindle.pipeline.cycle.scores import CycleResults
from rekindle.pipeline.cycle.tables import tables_of
from rekindle.pipeline.report.table import Table


def as_markdown(results: CycleResults) -> str:
    """The same tables and notes in Markdown."""
    notes = "\n".join(f"- {escaped(note)}" for note in results.notes)
    return "\n\n".join([*map(markdown_of, tables_of(results)), notes]) + "\n"


def markdown_of(table: Table) -> str:
    """The title in bold, and the table."""
    dashes = "|".join("---" if column.words else "---:" for column in table.columns)
    lines = [_piped(table.head), f"|{dashes}|", *map(_piped, table.rows)]
    return "\n".join([f"**{escaped(table.title)}**", "", *lines])


def _piped(row: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell.strip()) for cell in row) + " |"


def escaped(text: str) -> str:
    """The text without what Markdown would take for its own."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")
