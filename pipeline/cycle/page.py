"""A cycle's report: its students as runs, and its scores with the differences between the arms."""

from collections.abc import Sequence
from pathlib import Path

from rekindle.pipeline.compare.page import comparison_html, comparison_page
from rekindle.pipeline.compare.runs import Comparison, is_cycle
from rekindle.pipeline.cycle.config import ARMS
from rekindle.pipeline.cycle.notes import UNFINISHED
from rekindle.pipeline.cycle.results import CycleResults, read_results
from rekindle.pipeline.cycle.scores import MEAN
from rekindle.pipeline.cycle.tables import tables_of
from rekindle.pipeline.report.page import Block, Facts, Note, Page, Section, as_html
from rekindle.pipeline.report.scores import ScoreDifference, TaskScores, scores_section
from rekindle.pipeline.report.table import Column, Table

TITLE = "Knowledge rekindle: experts, and students that they guided"


def report_html(directories: Sequence[Path], comparison: Comparison) -> str:
    """The page of ``pipeline compare``: of a cycle, where that alone is given."""
    cycle = directories[0] if len(directories) == 1 and is_cycle(directories[0]) else None
    if cycle is None:
        return comparison_html(comparison)
    return cycle_html(comparison, read_results(cycle))


def cycle_html(comparison: Comparison | None, results: CycleResults) -> str:
    """The page of a cycle whose students are ``comparison``, whole; None: it has no students."""
    scores = cycle_section(results)
    lead = (
        "Experts are fine-tuned from one model and run once over unlabelled text; students begin "
        "as that model, are guided on that text, and are fine-tuned again with the same budget. "
        f"{len(results.tasks)} tasks, {len(results.arms)} arms"
    )
    if comparison is None:
        return as_html(Page(TITLE, f"{lead}.", [scores]))
    page = comparison_page(comparison, scores)
    # What the cycle is about comes first; how the students were trained comes after it.
    others = [section for section in page.sections if section is not scores]
    return as_html(Page(TITLE, f"{lead}; {page.lead}", [scores, *others]))


def cycle_section(results: CycleResults) -> Section:
    """Scores on test by arm and task, differences, and what must be said beside them."""
    section = scores_section(
        results.arms,
        [_task_scores(results, task.name, task.metric) for task in results.tasks],
        [
            ScoreDifference(
                one.arm, one.against, one.task, one.mean, one.low, one.high, one.p, one.p_adjusted
            )
            for one in results.differences
        ],
        [_sentence(note) for note in results.notes if note.startswith(UNFINISHED)],
    )
    arms = Facts([(arm, ARMS[arm]) for arm in ARMS if arm in results.arms], quiet=True)
    tables: list[Block] = [
        _as_table(cells.title, cells.head, cells.rows, cells.words)
        for cells in tables_of(results)
        if not cells.title.startswith("differences")  # they are above
    ]
    told = [Note(_sentence(note)) for note in results.notes if not note.startswith(UNFINISHED)]
    return Section(section.title, [arms, *section.blocks, *told, *tables])


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}."


def _task_scores(results: CycleResults, task: str, metric: str) -> TaskScores:
    scores = {
        one.arm: one.scores
        for one in results.scores
        if (one.task, one.metric) == (task, metric) and one.task != MEAN
    }
    return TaskScores(task, metric, "test", scores)


def _as_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> Table:
    columns = [
        Column(name, [row[number] for row in rows], words=number < words)
        for number, name in enumerate(head)
    ]
    return Table(title, columns)
