"""A comparison as tables of formatted cells, and as plain text."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.compare.domains import PREFIX, DomainMatrix
from rekindle.pipeline.compare.matching import Match, thin_out
from rekindle.pipeline.compare.runs import (
    Comparison,
    RunFacts,
    by_corpus,
    compare_runs,
    is_cycle,
)
from rekindle.pipeline.compare.standing import LEAST_ROWS
from rekindle.pipeline.report.significance import Difference
from rekindle.pipeline.report.table import NOTHING, Column, Table, formatted, table_of
from rekindle.pipeline.report.text import WIDEST, terminal_width, text_lines, wrapped
from rekindle.pipeline.sweep.grid import shortest_tails
from rekindle.train.config import DistillTerm
from rekindle.train.measures import UNSEEN

COST = (
    "cost: seconds of the run so far plus those of caching the teachers it uses; (steps) of the "
    "last evaluation that cost no more, without interpolation"
)
INTERVAL = "interval"
INTERVALS = (
    "intervals: 95 %, for all comparisons of a task at once; over draws of the test rows (none "
    f"below {LEAST_ROWS} rows; for accuracy they also include 0 if an exact sign test finds no "
    "difference), or over seeds if there are several; each run trained one student"
)
ABOUT_RUNS = (
    "loss (what is trained), ce (cross-entropy of the language model), kl/… (divergence from "
    "that teacher) and agreement/… (share of targets where both have the same first choice) are "
    f"measured {UNSEEN}; KD sequences, KD tokens: the share trained with a teacher's targets "
    "(knowledge distillation); data wait: the share of the time that steps waited for data"
)
_MOST_MATCHES = 8  # rows of a table of matched losses; all are in the JSON


def columns_of(comparison: Comparison) -> list[Column]:
    """Return the columns: the runs, the settings that differ, time and speed, values, coverage."""
    names = Column("run", [run.name for run in comparison.runs], words=True)
    return [names, *_settings(comparison.runs), *result_columns(comparison)]


def result_columns(comparison: Comparison) -> Iterator[Column]:
    """Yield each run's results: steps, time and speed, held-out values, coverage. None of them gets
    a star: each comes from one run, and whether a difference is chance is unknown.
    """
    runs = comparison.runs
    yield Column("steps", [_steps(run) for run in runs])
    yield Column("seconds", [formatted(run.seconds, "{:,.1f}") for run in runs])
    if any(run.tokens_per_second is not None for run in runs):
        yield Column("tokens/s", [formatted(run.tokens_per_second, "{:,.0f}") for run in runs])
        yield Column("data wait", [formatted(run.data_wait, "{:.1%}") for run in runs])
    for name in dict.fromkeys(name for run in runs for name in run.evaluation):
        if not name.startswith(PREFIX):  # domains have their own table
            yield Column(name, [formatted(run.evaluation.get(name), "{:.4f}") for run in runs])
    shares = {
        title: [_share_with_kd(run, unit) for run in runs]
        for unit, title in (("sequences", "KD sequences"), ("positions", "KD tokens"))
    }
    # Without tokens' teachers, 0 % of the tokens would look like a fault.
    shown = [title for title, values in shares.items() if any(values)] or [*shares]
    for title in shown:
        yield Column(title, [formatted(share, "{:.1%}") for share in shares[title]])


def step_tables(comparison: Comparison) -> Iterator[Table]:
    """Yield the compared value at equal steps, unless only the last evaluations match."""
    last = {run.curve.points[-1].step for run in comparison.runs if run.curve.points}
    if any(last != {match.at} for match in comparison.matched_steps):  # else it is shown above
        numbers = range(len(comparison.runs))
        columns = _matched(comparison, numbers, comparison.matched_steps, "steps", "{:,.0f}")
        yield Table(f"{comparison.compared} {UNSEEN}, at equal steps", columns)


def cost_tables(comparison: Comparison) -> Iterator[Table]:
    """Yield the compared value at equal total cost; nothing if no cost is known, and a sentence if
    only one run has one.
    """
    title = f"{comparison.compared} {UNSEEN}, at equal total cost"
    matches, runs = comparison.matched_cost, comparison.runs
    evaluated = [run for run in runs if run.curve.points]
    unknown = ", ".join(run.name for run in evaluated if not run.curve.has_known_cost)
    known = [run for run in evaluated if run.curve.has_known_cost]
    matched = [n for n in range(len(runs)) if any(match.points[n] for match in matches)]
    later = ", ".join(run.name for run in known if matches and runs.index(run) not in matched)
    if matches:
        notes = [COST]
        if unknown:
            notes.append(f"unknown for {unknown}")
        if later:
            notes.append(f"already cost more than all of this at their first evaluation: {later}")
        columns = _matched(comparison, matched, matches, "seconds", "{:,.1f}", True)
        yield Table(title, columns, "; ".join(notes))
    elif unknown and known and comparison.matched_steps:
        note = "not compared: the cost was not recorded (by older versions) for "
        yield Table(title, [], note + unknown)
    elif len(known) > 1 and comparison.matched_steps:
        note = "nothing to compare: no run was evaluated before another had already cost more"
        yield Table(title, [], note)


def _matched(
    comparison: Comparison,
    numbers: Sequence[int],
    matches: Sequence[Match],
    title: str,
    form: str,
    steps: bool = False,
) -> list[Column]:
    rows = thin_out(matches, _MOST_MATCHES)
    columns = [Column(title, [form.format(match.at) for match in rows])]
    for number in numbers:
        points = [match.points[number] for match in rows]
        cells = [
            NOTHING if p is None else f"{p.loss:.4f}" + (f" ({p.step:,})" if steps else "")
            for p in points
        ]
        columns.append(Column(comparison.runs[number].name, cells))
    return columns


def score_tables(comparison: Comparison) -> Iterator[Table]:
    """Yield the task scores of the runs; a star marks one that is best by more than chance."""
    for one in comparison.standings:
        against = {each.against: each for each in one.differences}
        names = [name for name in one.scores.scores if one.scores.of(name)]  # includes experts
        names.sort(key=lambda name: -one.mean(name))
        starred = frozenset(range(one.is_best))
        columns = [
            Column("run", names, words=True),
            Column(one.scores.measured, [f"{one.mean(name):.4f}" for name in names], starred),
            Column(f"{one.best} better by", [_difference(against.get(name)) for name in names]),
            Column(INTERVAL, [_interval(against.get(name)) for name in names]),
            Column("seeds", [str(len(one.scores.of(name))) for name in names]),
        ]
        columns = [c for c in columns if c.title != "seeds" or {*c.cells} != {"1"}]
        columns = [c for c in columns if {*c.cells} != {NOTHING}]  # one run, or no interval
        rows = "" if one.rows is None else f", {counted(one.rows, one.unit)}"
        yield Table(f"{one.scores.task} ({one.scores.scored_on}{rows})", columns)


def _difference(one: Difference | None) -> str:
    return NOTHING if one is None else f"{one.mean:.4f}"


def _interval(one: Difference | None) -> str:
    if one is None or one.low is None or one.high is None:
        return NOTHING
    return f"{one.low:.4f} … {one.high:.4f}"


def verdicts(comparison: Comparison) -> list[str]:
    """Return a sentence per task naming the best run; empty if no run has a score."""
    return [f"{one.verdict}." for one in comparison.standings]


def way_to_scores(comparison: Comparison) -> str:
    """Return how to find out which run is best at a task; empty if it is known."""
    with_heads = [run for run in comparison.runs if run.heads]
    is_of_cycle = any(is_cycle(one.directory.parent.parent) for one in comparison.folders)
    if comparison.standings or is_of_cycle or len(comparison.runs) < 2:
        return ""
    if len(with_heads) < 2:
        way = "`pipeline finetune RUN … --out RUN/TASK` for each run leaves its score here"
    else:
        names = list(dict.fromkeys(name for run in with_heads for name in run.heads))
        shared = [n for n in with_heads[0].heads if all(n in run.heads for run in with_heads)]
        prefix = f"{shared[0]}=" if shared else ""
        way = (
            f"`--test {prefix}FILE` scores the runs' heads ({', '.join(names)}) on a labelled file"
        )
    return f"which run is best at a task is unknown: {way}"


def domain_tables(matrix: DomainMatrix) -> Iterator[Table]:
    """Yield perplexity by domain, if runs have evaluated it."""
    if matrix.runs:
        rows = [
            [name, *(formatted(value, "{:,.2f}") for value in values)]
            for name, values in zip(matrix.runs, matrix.perplexity, strict=True)
        ]
        title = f"perplexity by domain, {UNSEEN}, at the last evaluation"
        yield table_of(title, ["run", *matrix.domains], rows, words=1)


def domain_matrix(runs: Sequence[Path]) -> str:
    """Return the domains × stages perplexity matrix of the runs in these directories, in order.

    The result is text, one matrix per corpus; empty if no run was evaluated by domain
    (``train.evaluate_domains``). Raise as ``compare_runs`` does, except for different corpora.
    """
    groups = [compare_runs(group) for group in by_corpus(runs)]
    tables = [table for one in groups for table in domain_tables(one.domains)]
    return "\n".join(line for table in tables for line in text_lines(table, WIDEST))


def _settings(runs: list[RunFacts]) -> Iterator[Column]:
    keys = [key for key in runs[0].settings if key != "train.steps"]  # it has its own column
    # "weight" alone would not say of which term, so at least two parts are kept.
    tails = shortest_tails([key.removeprefix("train.").split(".") for key in keys], least=2)
    for key, tail in zip(keys, tails, strict=True):
        values = [run.settings[key] for run in runs]
        words = any(isinstance(value, str | dict | list) for value in values)
        yield Column(tail, [setting_words(key, value) for value in values], words=words)


def setting_words(key: str, value: object) -> str:
    """Format a setting's value in one line, without the defaults of terms."""
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
    planned = "" if run.planned_steps is None else f" of {run.planned_steps:,}"
    return f"unfinished at {run.steps:,}{planned}"


def _share_with_kd(run: RunFacts, unit: str) -> float | None:
    """Return the share of sequences, or of positions with an LM loss, that had a teacher."""
    counts = {name: n for name, n in run.coverage.items() if name.startswith(unit)}
    total = sum(counts.values())
    return counts.get(f"{unit}_with_kd", 0) / total if total else None


def as_text(comparison: Comparison, width: int | None = None) -> str:
    """Return the verdicts and the tables as plain text, ``width`` characters wide (default: the
    terminal's, or 80), task scores first. A star marks what is best by more than chance.

    Each run is a row; a table that does not fit is folded or split (``report.text``).
    """
    width = width or terminal_width()
    lines = [line for verdict in verdicts(comparison) for line in wrapped(verdict, width)]
    scores = list(score_tables(comparison))
    lines += [line for table in scores for line in ("", *text_lines(table, width))]
    if any(column.best for table in scores for column in table.columns):
        lines += wrapped("* the best by more than chance", width)
    if scores:
        lines += wrapped(INTERVALS, width)
    runs = Table("", columns_of(comparison), ABOUT_RUNS)
    lines += [""] * bool(lines) + text_lines(runs, width)
    notes = [*comparison.notes, *filter(None, [way_to_scores(comparison)])]
    lines += [line for note in notes for line in wrapped(f"note: {note}", width)]
    more = [*step_tables(comparison), *cost_tables(comparison), *domain_tables(comparison.domains)]
    return "\n".join([*lines, *(line for one in more for line in ("", *text_lines(one, width)))])
