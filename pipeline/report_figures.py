"""The report's pictures: inline SVG in the page's own ink, for dark and light alike."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from rekindle.pipeline.report import Cost, Report, Run

_INK = "#010203"  # stands for the page's own colour of text
_COLOURS = ("#8a8f98", "#d9622b", "#2f7fd1", "#2a9d6f", "#9a5fd0", "#c2a000")
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
    """The loss curves, the distance to each expert, the cost."""
    found = [
        Picture(
            "Masked-LM loss on held-out documents, in nats (lower is better).",
            _svg(lambda axes: _curves(axes, report.runs, ["loss"])),
        )
    ]
    distances = [m for run in report.runs for m in run.metrics if m.startswith(("kl/", "mse/"))]
    if distances:
        found.append(
            Picture(
                "KL from each expert to the student's head on held-out documents, in nats.",
                _svg(lambda axes: _curves(axes, report.runs, list(dict.fromkeys(distances)))),
            )
        )
    found.append(
        Picture(
            "Seconds for so many students: the experts once, into a cache, or live beside each.",
            _svg(lambda axes: _cost(axes, report.cost)),
        )
    )
    return found


def _curves(axes: Any, runs: "list[Run]", metrics: list[str]) -> None:
    lines = [(run, metric) for metric in metrics for run in runs if run.curve(metric)]
    for number, (run, metric) in enumerate(lines):
        label = run.name if len(metrics) == 1 else metric.partition("/")[2]
        # A metric alone: a colour per run, the last of which is the one that matters.
        axes.plot(
            *zip(*run.curve(metric), strict=True),
            label=label,
            color=_COLOURS[number],
            marker="o",
            ms=3,
        )
    axes.set_xlabel("steps")
    if metrics != ["loss"]:
        axes.set_ylim(bottom=0)
    axes.legend()


def _cost(axes: Any, cost: "Cost") -> None:
    most = max(6, 2 * (cost.pays_after or 0))
    runs = list(range(most + 1))
    axes.plot(
        runs, [cost.with_live_teachers(n) for n in runs], color=_COLOURS[0], label="experts live"
    )
    cached = [cost.cached(n) for n in runs]
    axes.plot(runs, cached, color=_COLOURS[1], label="experts cached once")
    axes.set_xlabel("student runs")
    axes.set_ylabel("seconds")
    axes.set_xlim(0, most)
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
    svg = re.sub(r'(<svg[^>]*?)\s+width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\s+height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(_INK, "currentColor")
