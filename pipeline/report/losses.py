"""The report page's loss curves of any number of runs, in training and held out. Other held-out
values are shown as small pictures.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from rekindle.pipeline.report.page import SMALL, WIDE, Block, Figure, Figures, Legend, Note, Section
from rekindle.pipeline.report.svg import colour, few_ticks, line_style, plottable
from rekindle.train.measures import GRADIENT, GRADIENT_RATIO, UNSEEN

MOST_POINTS = 300  # points of a training curve: a picture has no more columns to show them in
MOST_SMALL = 12  # pictures of other held-out values; the tables have the rest
MOST_PALE = 4  # runs whose single points can be shown behind their means
LOSS, CROSS_ENTROPY = "loss", "ce"
SMOOTH = " Lines are running means over a twentieth of the steps."
# Descriptions of held-out values; other values are shown under their names alone.
PREFIX_CAPTIONS = {
    "kl/": "KL divergence from teacher {} to the student, in nats",
    "agreement/": "share of targets where the student's first choice is that of {}",
    "ce/": "cross-entropy on domain {}, in nats",
    "loss/": "the objective on domain {}",
}
CAPTIONS = {
    LOSS: f"The objective {UNSEEN}, at the weights of the last step: lower is better.",
    CROSS_ENTROPY: f"Cross-entropy {UNSEEN}, in nats for each token: lower is better.",
}
# Captions of the terms' gradients, by the key in a step's record; the first key present is drawn
# alone.
GRADIENT_CAPTIONS = {
    GRADIENT_RATIO: (
        "Gradient of {}, over the cross-entropy's: far below 1 it has hardly any effect."
    ),
    GRADIENT: "Norm of the weighted gradient of {}, at the input of the heads.",
}
Points = list[tuple[int, float]]  # (steps done, value)


@dataclass(frozen=True)
class RunCurves:
    """One run over its steps: its objective and its cross-entropy in training (nats, means of
    neighbouring steps), and everything that was evaluated on held-out sequences.
    """

    name: str
    objective: Points = field(default_factory=list)
    cross_entropy: Points = field(default_factory=list)
    held_out: dict[str, Points] = field(default_factory=dict)
    # the norm or ratio of each term's gradient, by the key in a step's record, if it was measured
    gradients: dict[str, Points] = field(default_factory=dict)


def curves_of(name: str, records: Sequence[Mapping[str, Any]]) -> RunCurves:
    """Return a run's curves from its records (``train.run_log``). null counts as NaN."""
    steps = [record for record in records if record["kind"] == "train"]
    evaluated = [record for record in records if record["kind"] == "evaluate"]
    names = sorted({key for record in evaluated for key in record} - {"kind", "step"})
    held_out = {name: _points(evaluated, name) for name in names}
    measured = dict.fromkeys(
        key for record in steps for key in record if key.startswith(tuple(GRADIENT_CAPTIONS))
    )
    return RunCurves(
        name,
        thin_out(_points(steps, LOSS)),
        thin_out(_points(steps, CROSS_ENTROPY)),
        held_out,
        {key: thin_out(_points(steps, key)) for key in measured},
    )


def _points(records: Sequence[Mapping[str, Any]], key: str) -> Points:
    return [(record["step"], _number(record[key])) for record in records if key in record]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def thin_out(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most ``most`` points: means of equally many neighbours, at the last step
    of each.
    """
    count = min(most, len(points))
    edges = [n * len(points) // count for n in range(count + 1)] if count else []
    groups = [points[first:end] for first, end in pairwise(edges)]
    return [(group[-1][0], _mean(group)) for group in groups]


def _mean(group: Points) -> float:
    """Return the mean of the finite values; NaN (a gap in the line) if there is none."""
    known = [value for _, value in group if math.isfinite(value)]
    return sum(value / len(known) for value in known) if known else math.nan


# --- the section ----------------------------------------------------------------------------------


def losses_section(
    runs: Sequence[RunCurves],
    more: Sequence[Block] = (),
    warnings: Sequence[str] = (),
    compared: str | None = LOSS,
) -> Section:
    """Return all curves of the runs under one legend. ``warnings`` say why they do not compare; the
    value ``compared`` is drawn large.
    """
    drawn = [run for run in runs if run.objective or run.held_out]
    if not drawn:
        return Section("Losses", [Note("No run has recorded a step yet."), *more])
    samples = [number for number, run in enumerate(runs) if run in drawn]
    blocks: list[Block] = [Note(f"{text}.", warns=True) for text in warnings]
    blocks.append(Legend([run.name for run in drawn], samples))
    blocks.append(Figures(list(_large(runs, compared))))
    curves = (name for run in runs for name, points in run.held_out.items() if len(points) > 1)
    names = sorted({name for name in curves if name != compared})
    if small := [_picture(_caption_of(name), runs, name, SMALL) for name in names[:MOST_SMALL]]:
        blocks.append(Figures(small, small=True))
    if gradients := list(_gradient_figures(runs)):
        blocks.append(Figures(gradients[:MOST_SMALL], small=True))
    if left := names[MOST_SMALL:]:
        blocks.append(Note(f"{len(left)} more values are in the table of runs alone."))
    blocks += [Note(note) for note in _notes(drawn)]
    return Section("Losses", [*blocks, *more])


def _large(runs: Sequence[RunCurves], compared: str | None) -> Iterator[Figure]:
    if compared is not None and any(compared in run.held_out for run in runs):
        yield _picture(CAPTIONS.get(compared, _caption_of(compared)), runs, compared)
    training = {"the whole objective, in nats. Other terms have other sums.": "objective"}
    # If every run's objective is the cross-entropy alone, it has been drawn already.
    if any(run.cross_entropy and not _is_cross_entropy_alone(run) for run in runs):
        training["the cross-entropy on the text alone, in nats."] = "cross_entropy"
    for caption, curve in training.items():
        lines = [(number, getattr(run, curve)) for number, run in enumerate(runs)]
        if any(points for _, points in lines):
            yield Figure(f"Training: {caption}{SMOOTH}", partial(_training_lines, lines))


def _gradient_figures(runs: Sequence[RunCurves]) -> Iterator[Figure]:
    curves = [(key, points) for run in runs for key, points in run.gradients.items()]
    known = sorted({key for key, points in curves if len(points) > 1})
    kind = next(
        (kind for kind in GRADIENT_CAPTIONS if any(key.startswith(kind) for key in known)), ""
    )
    for key in (key for key in known if key.startswith(kind)):
        lines = [(number, run.gradients.get(key, [])) for number, run in enumerate(runs)]
        yield Figure(
            GRADIENT_CAPTIONS[kind].format(key.removeprefix(kind)),
            partial(_lines, lines=lines),
            SMALL,
        )


def _is_cross_entropy_alone(run: RunCurves) -> bool:
    pairs = zip(run.objective, run.cross_entropy, strict=False)
    return len(run.objective) == len(run.cross_entropy) and all(
        math.isclose(a[1], b[1], rel_tol=1e-5) for a, b in pairs
    )


def _caption_of(name: str) -> str:
    if name in CAPTIONS:
        return f"{name}: {CAPTIONS[name][:1].lower()}{CAPTIONS[name][1:].removesuffix('.')}"
    for prefix, words in PREFIX_CAPTIONS.items():
        if name.startswith(prefix):
            return f"{name}: {words.format(name.removeprefix(prefix))}"
    return f"{name}, {UNSEEN}"


def _picture(
    caption: str, runs: Sequence[RunCurves], name: str, size: tuple[float, float] = WIDE
) -> Figure:
    lines = [(number, run.held_out.get(name, [])) for number, run in enumerate(runs)]
    return Figure(caption, lambda axes: _lines(axes, lines), size)


def _training_lines(lines: Sequence[tuple[int, Points]], axes: Any) -> None:
    """Draw running means over the pale points: batches differ more than steps do."""
    lines = [(number, points) for number, points in lines if points]
    for number, points in lines if len(lines) <= MOST_PALE else []:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, plottable(values), color=colour(number), alpha=0.28, lw=0.7)
    _lines(axes, [(number, running_means(points)) for number, points in lines])


def running_means(points: Points) -> Points:
    """Return each value's mean with those before it, over a twentieth of all points."""
    width = max(1, len(points) // 20)
    windows = [points[max(0, n - width + 1) : n + 1] for n in range(len(points))]
    return [(window[-1][0], _mean(window)) for window in windows]


def _lines(axes: Any, lines: Sequence[tuple[int, Points]]) -> None:
    """Draw a line for each run, with a marker on some of its points to tell it from others."""
    for number, points in lines:
        if not points:
            continue
        steps = [step for step, _ in points]
        values = plottable(value for _, value in points)
        spacing = max(1, math.ceil(len(points) / 8))
        # The markers of runs start at different steps, because their lines may cover each other.
        markers = number % spacing, spacing
        width = 1.1 if len(lines) > 12 else 1.6
        axes.plot(steps, values, markevery=markers, lw=width, **line_style(number))
    axes.set_xlabel("steps")
    few_ticks(axes.xaxis, 5, whole=True)
    few_ticks(axes.yaxis, 6)


def _notes(runs: Sequence[RunCurves]) -> Iterator[str]:
    if any(len(run.objective) == MOST_POINTS for run in runs):
        yield f"Training curves have {MOST_POINTS} points: means of neighbouring steps."
    if without := ", ".join(run.name for run in runs if not run.held_out):
        yield f"Nothing is measured yet {UNSEEN}: {without}."
    values = [v for run in runs for points in run.held_out.values() for _, v in points]
    if not all(map(math.isfinite, values)):
        yield "Gaps in lines are values that were not finite."
