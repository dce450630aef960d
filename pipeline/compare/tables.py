"""A comparison as tables of finished cells, and these in plain text."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.compare.domains import PREFIX, DomainMatrix
from rekindle.pipeline.compare.matching import Match, thinned
from rekindle.pipeline.compare.runs import (
    SCORES,
    SPEED,
    Comparison,
    RunFacts,
    by_corpus,
    compare_runs,
    values_of,
)
from rekindle.pipeline.report.table import NOTHING, Column, Table, best_rows, formatted, table_of
from rekindle.pipeline.report.text import WIDEST, terminal_width, text_lines
from rekindle.pipeline.sweep.grid import shortest_tails
from rekindle.train.config import DistillTerm

COST = (
    "cost: seconds of the run so far and of stage 1 for the teachers that it uses; (steps) of the "
    "last evaluation that had cost no more, nothing is interpolated"
)
_MOST_MATCHES = 8  # lines of a table of matched losses; all are in the JSON


def columns_of(comparison: Comparison) -> list[Column]:
    """What is shown: the runs, the settings that differ, time and speed, values, coverage."""
    names = Column("run", [run.name for run in comparison.runs], words=True)
    return [names, *_settings(comparison.runs), *result_columns(comparison)]


def result_columns(comparison: Comparison, scores: bool = True) -> Iterator[Column]:
    """What came out of each run: steps, time and speed, values (with task ``scores``, or without),
    coverage.
    """
    runs = comparison.runs
    yield Column("steps", [_steps(run) for run in runs])
    yield Column("seconds", [formatted(run.seconds, "{:,.1f}") for run in runs])
    names = dict.fromkeys(name for run in runs for name in values_of(run))
    for name in sorted(names, key=lambda name: name != SPEED):  # speed stands beside time
        if name.startswith(PREFIX) or (name.startswith(SCORES) and not scores):
            continue  # domains have their own table
        form = "{:,.0f}" if name == SPEED else "{:.4f}"
        best = comparison.best.get(name, [])
        yield Column(
            "tokens/s" if name == SPEED else name.removeprefix(SCORES),
            [formatted(values_of(run).get(name), form) for run in runs],
            frozenset(number for number, run in enumerate(runs) if run.name in best),
        )
        if name == SPEED:
            yield Column("data wait", [formatted(run.data_wait, "{:.1%}") for run in runs])
    for what in ("sequences", "positions"):
        cells = [formatted(_share_with_kd(run, what), "{:.1%}") for run in runs]
        yield Column(f"KD {what}", cells)


def step_tables(comparison: Comparison) -> Iterator[Table]:
    """Losses at equal steps, where the last evaluations are not all there is to compare."""
    last = {run.curve.points[-1].step for run in comparison.runs if run.curve.points}
    if any(last != {match.at} for match in comparison.matched_steps):  # else it is shown above
        columns = _matched(comparison.runs, comparison.matched_steps, "steps", "{:,.0f}")
        yield Table("held-out loss at equal steps", columns)


def cost_tables(comparison: Comparison) -> Iterator[Table]:
    """Nothing where no cost is known; where one run's alone is, whose are not."""
    title = "held-out loss at equal total cost"
    evaluated = [run for run in comparison.runs if run.curve.points]
    unknown = ", ".join(run.name for run in evaluated if not run.curve.known)
    if comparison.matched_cost:
        columns = _matched(comparison.runs, comparison.matched_cost, "seconds", "{:,.1f}", True)
        yield Table(title, columns, COST + (f"; unknown for {unknown}" if unknown else ""))
    elif comparison.matched_steps and unknown and any(run.curve.known for run in evaluated):
        note = "not compared: what it cost is not recorded (by older versions) for "
        yield Table(title, [], note + unknown)


def _matched(
    runs: Sequence[RunFacts], matches: Sequence[Match], title: str, form: str, steps: bool = False
) -> list[Column]:
    shown = thinned(matches, _MOST_MATCHES)
    lowest = [best_rows([p.loss if p else None for p in match.points], min) for match in shown]
    columns = [Column(title, [form.format(match.at) for match in shown])]
    for number, run in enumerate(runs):
        points = [match.points[number] for match in shown]
        cells = [
            NOTHING if p is None else f"{p.loss:.4f}" + (f" ({p.step:,})" if steps else "")
            for p in points
        ]
        best = frozenset(row for row, least in enumerate(lowest) if number in least)
        columns.append(Column(run.name, cells, best))
    return columns


def domain_tables(matrix: DomainMatrix) -> Iterator[Table]:
    """Perplexity by domain, where runs have evaluated it."""
    if matrix.runs:
        rows = [
            [name, *(formatted(value, "{:,.2f}") for value in values)]
            for name, values in zip(matrix.runs, matrix.perplexity, strict=True)
        ]
        title = "held-out perplexity by domain, at the last evaluation"
        yield table_of(title, ["run", *matrix.domains], rows, words=1)


def domain_matrix(runs: Sequence[Path]) -> str:
    """The domains × stages perplexity matrix of the runs in these directories, in their order, as
    text: one for each corpus, empty when none of them evaluated by domain
    (``train.evaluate_domains``).

    Raises as ``compare_runs`` does, but for different corpora.
    """
    groups = [compare_runs(group) for group in by_corpus(runs)]
    tables = [table for one in groups for table in domain_tables(one.domains)]
    return "\n".join(line for table in tables for line in text_lines(table, WIDEST))


def _settings(runs: list[RunFacts]) -> Iterator[Column]:
    keys = [key for key in runs[0].settings if key != "train.steps"]  # it has a column anyway
    tails = shortest_tails([key.split(".") for key in keys])
    for key, tail in zip(keys, tails, strict=True):
        values = [run.settings[key] for run in runs]
        words = any(isinstance(value, str | dict | list) for value in values)
        yield Column(tail, [setting_words(key, value) for value in values], words=words)


def setting_words(key: str, value: object) -> str:
    """A setting's value in one line, without the defaults of terms."""
    if value is None:
        return NOTHING
    if key == "train.objective.distill" and isinstance(value, list):
        value = [_without_defaults(term) for term in value]
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, default_flow_style=True, width=WIDEST, sort_keys=False)[:-1]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _without_defaults(term: object) -> object:
    try:
        parsed = parse_settings(DistillTerm, term)
    except InputError:  # of another version
        return term
    return parsed.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def _steps(run: RunFacts) -> str:
    if run.finished:
        return f"{run.steps:,}"
    return f"unfinished at {run.steps:,} of {run.planned_steps:,}"


def _share_with_kd(run: RunFacts, what: str) -> float | None:
    """Of the sequences, or of the positions with an LM loss: those that a teacher taught."""
    counts = {name: n for name, n in run.coverage.items() if name.startswith(what)}
    total = sum(counts.values())
    return counts.get(f"{what}_with_kd", 0) / total if total else None


def as_text(comparison: Comparison, width: int | None = None) -> str:
    """The tables in plain text; the best of the runs has a star.

    A run is a line; where that does not fit ``width`` characters (the terminal's; 80 without one),
    a run is a column, if that is narrower. Nothing is ever cut.
    """
    columns = columns_of(comparison)
    width = width or terminal_width()
    lines = text_lines(Table("", columns), width)
    notes = [f" note: {note}" for note in comparison.notes]
    if any(column.best for column in columns):
        notes.append(" * the best of the runs")
    more = [*step_tables(comparison), *cost_tables(comparison), *domain_tables(comparison.domains)]
    below = [line for table in more for line in ("", *text_lines(table, width))]
    return "\n".join([*lines, *notes, *below])
