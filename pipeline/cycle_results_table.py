"""The results of a cycle as tables, in plain text and in Markdown: the same cells in both."""

from rekindle.pipeline.cycle_results import CycleResults


def as_text(results: CycleResults, width: int | None = None) -> str:
    """The tables in plain text, ``width`` characters wide (default: the terminal)."""
    raise NotImplementedError


def as_markdown(results: CycleResults) -> str:
    """The same tables in Markdown."""
    raise NotImplementedError
