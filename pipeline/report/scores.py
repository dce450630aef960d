"""The page's scores: each task's, with an interval over seeds and a dot for every seed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, stdev
from typing import Any

from rekindle.pipeline.report.page import Block, Facts, Figure, Figures, Note, Section
from rekindle.pipeline.report.significance import Difference, mean_interval, p_words
from rekindle.pipeline.report.svg import INK, colour, few_ticks, line_style, plottable, shorten_name
from rekindle.pipeline.report.table import NOTHING, Column, Table, stack_column, table_of

INTERVAL = "95 % interval"  # shown below its difference on the page
_REPEATED_OVER = {  # what the scores of one model differ in
    "seed": "seeds of fine-tuning",
    "draw": "draws of the labels",
    "student": "students, each the mean of its fine-tunings,",
}
ABOUT = (
    "Scores × 100, as GLUE prints them: the mean over {over} ± their sample deviation; below it, "
    "the 95 % interval of the mean by Student's t over the {unit}s, and their number. The "
    "highlighted score in a column is the best by more than chance."
)


@dataclass(frozen=True)
class TaskScores:
    """One task: each model's scores as fractions, one for each seed.

    ``split``: the scored split; ``chance``: the score of guessing; ``about``: a sentence.
    ``seeds``: the seeds of each model's scores, if known. ``measured``: the metric as printed;
    ``metric``: as recorded. ``selected``: the split also chose the epoch of a model.
    """

    task: str
    metric: str
    split: str
    scores: Mapping[str, Sequence[float]]
    chance: float | None = None
    about: str = ""
    seeds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    measured: str = ""
    selected: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "measured", self.measured or self.metric)

    def of(self, model: str) -> list[float]:
        """Return the model's finite scores."""
        return [value for value in self.scores.get(model, ()) if math.isfinite(value)]

    def by_seed(self, model: str) -> dict[int, float]:
        """Return the model's finite scores by seed. Empty if the seeds are unknown or do not match
        the scores one to one.
        """
        seeds, scores = self.seeds.get(model, ()), self.scores.get(model, ())
        if len({*seeds}) != len(scores):
            return {}
        each = zip(seeds, scores, strict=True)
        return {seed: value for seed, value in each if math.isfinite(value)}

    @property
    def title(self) -> str:
        """Task, metric and split, as far as they are known."""
        split = f"({self.split})" if self.split else ""
        return " ".join(word for word in (self.task, self.measured, split) if word)

    @property
    def scored_on(self) -> str:
        """The split, with a clause if it also chose the epochs."""
        return f"{self.split}, which also chose the epochs" if self.selected else self.split


def scores_section(
    models: Sequence[str],
    tasks: Sequence[TaskScores],
    differences: Sequence[Difference] = (),
    notes: Sequence[str] = (),
    best: Mapping[str, str] = {},
    unit: str = "seed",
    title_prefix: str = "",
    pictured: Sequence[Difference] | None = None,
) -> Section:
    """Return tables and pictures. ``models`` are in the order of their lines elsewhere.

    ``best``: by task title, the model that is the best by more than chance, if any. ``unit``: what
    a model's scores differ in. ``title_prefix``: the start of the titles of differences.
    ``pictured``: the differences to draw, if not all.
    """
    blocks: list[Block] = [Note(note, warns=True) for note in notes]
    if tasks:
        scored = [name for name in models if any(task.of(name) for task in tasks)]
        means = mean_scores(scored, tasks) if len(tasks) > 1 else None
        mean_of_tasks = [TaskScores("mean of tasks", "", "", means)] if means else []
        table = score_table("model", scored, [*tasks, *mean_of_tasks], best=best, unit=unit)
        samples = [models.index(name) for name in scored]
        about = ABOUT.format(over=_REPEATED_OVER[unit], unit=unit)
        blocks += [replace(table, samples=samples), Note(about)]
        if questions := [(task.task, task.about) for task in tasks if task.about]:
            blocks.append(Facts(questions, quiet=True))
        blocks.append(Figures([_picture(models, task, unit) for task in tasks], small=True))
    if differences:
        tables = difference_tables(differences, unit, title_prefix)
        blocks += [stack_column(table, INTERVAL) for table in tables]
        blocks.append(_difference_pictures(differences if pictured is None else pictured))
    return Section("Scores", blocks)


# --- tables ---------------------------------------------------------------------------------------


def score_table(
    head: str,
    models: Sequence[str],
    tasks: Sequence[TaskScores],
    title: str = "",
    best: Mapping[str, str] = {},
    unit: str = "seed",
) -> Table:
    """Return a row per model and a column per task; the last row is the score of guessing, where
    known. The ``best`` model of a task is highlighted.
    """
    chance_row = ["chance"] if any(task.chance is not None for task in tasks) else []
    columns = [Column(head, [*models, *chance_row], words=True)]
    for task in tasks:
        scores = [task.of(name) for name in models]
        best_rows = frozenset(n for n, name in enumerate(models) if name == best.get(task.title))
        below = [interval_words(values, unit) for values in scores] + ["" for _ in chance_row]
        scores += [[] if task.chance is None else [task.chance] for _ in chance_row]
        columns.append(Column(task.title, [*map(percent, scores)], best_rows, below=below))
    return Table(title, columns)


def mean_scores(
    models: Sequence[str], tasks: Sequence[TaskScores]
) -> dict[str, list[float]] | None:
    """Return each model's mean over the tasks, seed by seed; None unless all models have all tasks
    with equally many seeds.
    """
    counts = {len(task.of(name)) for task in tasks for name in models}
    if len(counts) != 1 or 0 in counts:
        return None
    return {
        name: [mean(seed) for seed in zip(*(task.of(name) for task in tasks), strict=True)]
        for name in models
    }


def percent(values: Sequence[float]) -> str:
    """Format the mean over seeds × 100, with the sample deviation if there are several."""
    if not values:
        return NOTHING
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{spread}"


def interval_words(values: Sequence[float], unit: str = "seed") -> str:
    """Format the interval of the mean × 100, and the number of seeds or draws."""
    interval = mean_interval(values)
    if interval is None:
        return f"1 {unit}" if values else ""
    return f"{100 * interval[0]:.2f} … {100 * interval[1]:.2f}, n={len(values)}"


def difference_head(unit: str) -> list[str]:
    """Return the headings of ``difference_cells``; ``unit``: what the pairs differ in, seed or
    draw.
    """
    return ["difference", INTERVAL, "p", "p (Holm)", f"{unit}s"]


def difference_cells(one: Difference | None) -> list[str]:
    """Format a difference as table cells; dashes if there is none yet."""
    if one is None:
        return [NOTHING] * 5
    tested = (p_words(one.p), p_words(one.p_adjusted))
    return [f"{100 * one.mean:+.2f}", one.interval, *tested, str(one.n)]


def difference_tables(
    differences: Sequence[Difference], unit: str = "seed", title_prefix: str = ""
) -> Iterator[Table]:
    """Yield a table for each arm that others are compared with, without columns that are all
    unknown (one seed has no interval). ``title_prefix``: the start of the titles.
    """
    head = ["arm", "task", *difference_head(unit)]
    for against in dict.fromkeys(one.against for one in differences):
        ones = [one for one in differences if one.against == against]
        rows = [[one.arm, one.task, *difference_cells(one)] for one in ones]
        title = f"{title_prefix}differences to {against} on test, main metrics, in points of 100"
        table = table_of(title, head, rows, words=2)
        yield replace(table, columns=[c for c in table.columns if {*c.cells} != {NOTHING}])


# --- pictures -------------------------------------------------------------------------------------


def _picture(models: Sequence[str], task: TaskScores, unit: str) -> Figure:
    rows = [(n, name, scores) for n, name in enumerate(models) if (scores := task.of(name))]
    caption = (
        f"{task.title}, × 100. A dot for each {unit}, a bar at the mean, a line for its interval."
    )

    def draw(axes: Any) -> None:
        points: list[float] = []
        for place, (number, _, scores) in enumerate(rows):
            dots = plottable(100 * score for score in scores)
            points += dots
            style = line_style(number) | {"linestyle": "", "clip_on": False}
            axes.plot(dots, [place] * len(dots), ms=5, alpha=0.6, **style)
            middle = sum(dots) / len(dots)
            axes.vlines(middle, place - 0.28, place + 0.28, color=colour(number), lw=2)
            if (interval := mean_interval(scores)) is not None:
                bounds = plottable(100 * bound for bound in interval)
                axes.hlines(place, *bounds, color=colour(number), lw=1.3)
        low, high = _score_axis(axes, points, [name for _, name, _ in rows])
        if task.chance is not None and low < 100 * task.chance < high:
            axes.axvline(100 * task.chance, color=INK, lw=0.8, ls=(0, (1, 2)))

    return Figure(caption, draw, _size(len(rows)))


def _difference_pictures(differences: Sequence[Difference]) -> Figures:
    groups: dict[tuple[str, str], list[Difference]] = {}
    for one in differences:
        groups.setdefault((one.task, one.against), []).append(one)
    figures = []
    for (task, against), ones in groups.items():
        title = f"{task}: difference to {against}"
        figures.append(difference_picture(title, ones, [one.arm for one in ones]))
    return Figures(figures, small=True)


def difference_picture(title: str, ones: Sequence[Difference], names: Sequence[str]) -> Figure:
    """Return a picture of the differences, labelled with ``names``."""
    caption = f"{title}, × 100, with its interval; right is better."
    return Figure(caption, partial(_draw_differences, ones, names), _size(len(ones)))


def _draw_differences(ones: Sequence[Difference], names: Sequence[str], axes: Any) -> None:
    """Draw differences below each other, with intervals, around a line at zero."""
    values = [0.0]
    for place, one in enumerate(ones):
        known = [value for value in (one.mean, one.low, one.high) if value is not None]
        middle, *bounds = plottable(100 * value for value in known)
        values += [middle, *bounds]
        axes.plot([middle], [place], "o", ms=5, mew=0, color=colour(0))
        if len(bounds) == 2:
            axes.hlines(place, *bounds, color=colour(0), lw=1.4)
    _score_axis(axes, values, names)
    axes.axvline(0, color=INK, lw=0.8)


def _size(rows: int) -> tuple[float, float]:
    return 3.5, max(1.5, 0.55 + 0.26 * rows)


def _score_axis(axes: Any, values: Sequence[float], names: Sequence[str]) -> tuple[float, float]:
    """Set up axes: names downwards, ``values`` sideways with a margin. Return the limits."""
    numbers = [value for value in values if not math.isnan(value)] or [0.0]
    reach = max(max(numbers) - min(numbers), 1.0)
    low, high = min(numbers) - 0.6 * reach, max(numbers) + 0.6 * reach
    axes.set_xlim(low, high)
    axes.set_yticks(range(len(names)), [shorten_name(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    few_ticks(axes.xaxis, 4)
    return low, high
