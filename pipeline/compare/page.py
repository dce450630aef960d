"""The report page of a comparison of runs: curves, scores, cost, caches and configuration.

Besides the comparison it reads what its pictures need from the runs' directories, and the caches
they name, as far as these still exist.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.compare.runs import Comparison, RunFolder
from rekindle.pipeline.compare.tables import (
    ABOUT_RUNS,
    INTERVAL,
    INTERVALS,
    cost_tables,
    domain_tables,
    result_columns,
    score_tables,
    setting_words,
    step_tables,
    verdicts,
    way_to_scores,
)
from rekindle.pipeline.plan.break_even import taught_sequences
from rekindle.pipeline.report.cache import CacheFacts, KnownCache, cache_section, find_cache
from rekindle.pipeline.report.cost import ESTIMATED, Cost, StudentCost, cost_section, typical_cost
from rekindle.pipeline.report.losses import curves_of, losses_section
from rekindle.pipeline.report.page import Note, Page, Section, as_html
from rekindle.pipeline.report.scores import scores_section
from rekindle.pipeline.report.table import Column, Table, stack_column
from rekindle.train.config import TrainConfig

UNLIKE_NOTE = (
    "≠ marks a value that differs from the most common one of its line (of several equally "
    "common ones, the first). Settings not listed here are the same in all runs."
)
HELD_OUT = (
    f"{ABOUT_RUNS[:1].upper()}{ABOUT_RUNS[1:]}. The values are those of the last "
    "evaluation of a single run each: they do not show whether a difference is more than chance."
)


def comparison_html(comparison: Comparison, scores: Section | None = None) -> str:
    """Return the whole page of ``comparison``; ``scores`` replaces the scores below the runs."""
    return as_html(comparison_page(comparison, scores))


def comparison_page(
    comparison: Comparison, scores: Section | None = None, lines: Sequence[str] = ()
) -> Page:
    """Return the parts of the page: the runs, their losses, scores, cost, caches and differences.

    ``lines``: the names of all lines of the pictures in order, if there are more than the runs.
    """
    names = [run.name for run in comparison.runs]
    lines = lines or names
    samples = [lines.index(name) for name in names]
    records = {name: one.records for name, one in zip(names, comparison.folders, strict=True)}
    curves = [curves_of(name, records.get(name, [])) for name in lines]
    caches = _caches(comparison.folders)
    teacher_seconds, students = _costs(comparison, caches)
    cost, note = typical_cost(teacher_seconds, students)
    notes = [note, ESTIMATED] if cost is not None else [note]
    differing = {
        key: [setting_words(key, run.settings[key]) for run in comparison.runs]
        for key in comparison.runs[0].settings
    }
    columns = [Column("run", names), *result_columns(comparison)]
    scores = scores or _standings_section(comparison)
    warnings = [note[:1].upper() + note[1:] for note in comparison.notes]
    more = [*step_tables(comparison), *domain_tables(comparison.domains)]
    finished = sum(run.finished for run in comparison.runs)
    state = "finished" if finished == len(names) else f"of which {finished} finished"
    lead = f"{counted(len(names), 'run')}, {state}. The corpus has the fingerprint "
    lead += f"{comparison.corpus[:12]}."
    if advice := way_to_scores(comparison):
        lead += f" {advice[:1].upper()}{advice[1:]}."
    return Page(
        title="Students of one corpus",
        lead=lead,
        verdict=" ".join(verdicts(comparison)),
        sections=[
            scores,
            Section("Runs", [Table("", columns, HELD_OUT, samples)]),
            settings_section(names, differing),
            losses_section(curves, more, warnings, comparison.compared),
            cost_section(teacher_seconds, students, cost, notes, cost_tables(comparison), samples),
            cache_section(list(caches.values())),
        ],
    )


def _standings_section(comparison: Comparison) -> Section:
    """Return the runs' standings at their tasks; empty if no run has a score."""
    standings, names = comparison.standings, [run.name for run in comparison.runs]
    best = {one.scores.title: one.best for one in standings if one.is_best}
    over_seeds = [one.scores for one in standings if one.rows is None]
    section = scores_section(names, over_seeds, best=best)
    if not standings:
        return section
    return Section(
        section.title,
        [
            *(stack_column(table, INTERVAL) for table in score_tables(comparison)),
            Note(f"{INTERVALS[:1].upper()}{INTERVALS[1:]}."),
            *section.blocks,
        ],
    )


def settings_section(names: Sequence[str], differing: Mapping[str, Sequence[str]]) -> Section:
    """Return the section with a row for each key of ``differing``: its value for every run."""
    if len(names) < 2 or not differing:
        same = [Note("All settings of the runs are the same.")] if len(names) > 1 else []
        return Section("Configuration", same)
    usual = [Counter(values).most_common(1)[0][0] for values in differing.values()]
    columns = [Column("setting", list(differing))]
    for number, name in enumerate(names):
        cells = [values[number] for values in differing.values()]
        unlike = {row for row, cell in enumerate(cells) if cell != usual[row]}
        columns.append(Column(name, cells, words=True, unlike=frozenset(unlike)))
    return Section("Configuration", [Table("", columns), Note(UNLIKE_NOTE)])


# --- caches and costs -----------------------------------------------------------------------------


def _caches(runs: Sequence[RunFolder]) -> dict[str, KnownCache]:
    """Return every cache that a run has read, by its path."""
    teachers: dict[str, dict[str, str]] = {}
    corpora: dict[str, str] = {}
    for run in runs:
        if path := run.cache.get("path"):
            teachers.setdefault(path, {}).update(run.cache["teachers"])
            corpora[path] = run.cache["corpus"]
    return {path: find_cache(path, corpora[path], teachers[path]) for path in corpora}


def cache_and_cost(comparison: Comparison) -> tuple[CacheFacts | None, Cost | None]:
    """Return the content of the runs' cache, if they have only one, and the cost of a student with
    it and without it; None if unknown.
    """
    caches = _caches(comparison.folders)
    known = [cache.facts for cache in caches.values()]
    cost, _ = typical_cost(*_costs(comparison, caches))
    return known[0] if len(known) == 1 else None, cost


def _costs(
    comparison: Comparison, caches: Mapping[str, KnownCache]
) -> tuple[dict[str, float | None], list[StudentCost]]:
    """Return each teacher's seconds, and each student's."""
    teacher_seconds: dict[str, float | None] = {}
    students = []
    for run, one in zip(comparison.runs, comparison.folders, strict=True):
        seconds = one.cache.get("teacher_seconds") or {}
        # With several caches, a teacher's name includes its cache's name.
        suffix = f" ({Path(one.cache.get('path', '')).name})" if len(caches) > 1 else ""
        labels = {name: f"{name}{suffix}" for name in one.teachers}
        teacher_seconds |= {label: seconds.get(name) for name, label in labels.items()}
        live = _live_seconds(one, caches)
        students.append(StudentCost(run.name, run.seconds, tuple(labels.values()), live))
    return teacher_seconds, students


def _live_seconds(run: RunFolder, caches: Mapping[str, KnownCache]) -> float | None:
    """Estimate the seconds of the run's teachers if they ran beside it; None if unknown."""
    cache = caches.get(run.cache.get("path", ""))
    names = run.teachers
    if not names:
        return 0.0
    if cache is None or cache.facts is None:
        return None
    try:
        train = parse_settings(TrainConfig, run.settings["train"], "train")
        sequences = {name: taught_sequences(train, name) for name in names}
    except InputError:  # of another version
        return None
    rates = {teacher.name: teacher.seconds_per_view for teacher in cache.facts.teachers}
    total = 0.0
    for name in names:
        rate = None if f"teacher {name}" in cache.changed else rates.get(name)
        if rate is None:
            return None
        total += rate * sequences[name]
        if train.curriculum is not None and train.curriculum.teacher == name:
            # a teacher that chooses text has to see all of it
            total += rate * cache.facts.sequences
    return total
