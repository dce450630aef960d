"""The report's pictures: inline SVG in the page's own ink, for dark and light alike."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from rekindle.pipeline.report import Cost, Report, Run, TaskScores

_INK = "#010203"  # stands for the page's own colour of text
_COLOURS = ("#8a8f98", "#2f7fd1", "#d9622b", "#2a9d6f", "#9a5fd0", "#c2a000")
_SIZE = (
    4.4,
    2.9,
)  # inches; small, so that the lettering can be read on a telephone
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rekindle",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Picture:
    """An inline SVG and what it shows."""

    caption: str
    svg: Markup


def pictures(report: "Report") -> list[Picture]:
    """The scores seed by seed, the loss curves, the distance to each expert, the cost."""
    drawn: list[tuple[str, Callable[[Any], None]]] = [
        (
            "Test accuracy in %: every fine-tuning is a dot, their mean a line.",
            partial(_scores, tasks=report.tasks),
        ),
        (
            "Masked-LM loss on held-out documents, in nats: lower is better.",
            partial(_losses, runs=report.runs),
        ),
        (
            "KL from each expert to the student's head for it, on held-out documents, in nats.",
            partial(_distances, runs=report.runs),
        ),
        (
            "Seconds for so many students: the experts once, into a cache, or live beside each.",
            partial(_cost, cost=report.cost),
        ),
    ]
    return [Picture(caption, _svg(draw)) for caption, draw in drawn]


def _scores(axes: Any, tasks: "list[TaskScores]") -> None:
    models = list(tasks[0].scores)
    for number, model in enumerate(models):
        for place, task in enumerate(tasks):
            x = place + 0.25 * (number - (len(models) - 1) / 2)
            values = [100 * value for value in task.scores[model]]
            label = model if place == 0 else None
            axes.plot([x] * len(values), values, "o", ms=5, color=_COLOURS[number], label=label)
            axes.hlines(sum(values) / len(values), x - 0.1, x + 0.1, color=_COLOURS[number])
    axes.set_xticks(range(len(tasks)), [task.task for task in tasks])
    axes.grid(visible=False, axis="x")
    axes.legend()


def _losses(axes: Any, runs: "list[Run]") -> None:
    for run, colour in zip(runs, _COLOURS[1:], strict=False):  # the first is the experts'
        steps, values = zip(*run.curve("loss"), strict=True)
        axes.plot(steps, values, "o-", ms=3, color=colour, label=run.name)
    axes.set_xlabel("steps")
    axes.legend()


def _distances(axes: Any, runs: "list[Run]") -> None:
    lines = [(run, name) for run in runs for name in run.metrics if name.startswith("kl/")]
    for (run, name), colour in zip(lines, _COLOURS[::-1], strict=False):
        steps, values = zip(*run.curve(name), strict=True)
        axes.plot(steps, values, "o-", ms=3, color=colour, label=name.removeprefix("kl/"))
    axes.set_xlabel("steps")
    axes.set_ylim(bottom=0)
    axes.legend()


def _cost(axes: Any, cost: "Cost") -> None:
    runs = range(max(6, 2 * (cost.pays_after or 0)) + 1)
    live, cached = [cost.with_live_teachers(n) for n in runs], [cost.cached(n) for n in runs]
    axes.plot(runs, live, color=_COLOURS[1], label="experts live")
    axes.plot(runs, cached, color=_COLOURS[2], label="experts cached once")
    axes.set_xlabel("student runs")
    axes.set_ylabel("seconds")
    axes.set_xlim(0, runs[-1])
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def _svg(draw: Callable[[Any], None]) -> Markup:
    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return Markup(inline(stream.getvalue()))


def inline(svg: str) -> str:
    """An SVG document as an element of a page: without prologue, metadata and addresses."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg)
    return svg.replace(_INK, "currentColor")
