"""The pictures of the result pages: differences with intervals, a panel for each task and
the mean.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rekindle.pipeline.cycle.scores import MEAN
from rekindle.pipeline.report import svg
from rekindle.pipeline.report.significance import Difference

MOST_BYTES = 100_000
SURE = 0.05
_STYLE = Path(svg.__file__).with_name("picture.mplstyle")
# The colour and the marker of the differences to each baseline; colours of the page's light mode.
_STYLES = {
    "start": (svg.PALETTE["light"][0], "o"),
    "expert": (svg.PALETTE["light"][0], "o"),
    "mlm": (svg.PALETTE["light"][1], "s"),
    "longer": (svg.PALETTE["light"][2], "D"),
    "pseudo": (svg.PALETTE["light"][3], "^"),
}
_QUIET = "#8a8f98"


def differences(ones: Sequence[Difference], tasks: Sequence[str], against: Sequence[str]) -> str:
    """Return an SVG of the differences to each of ``against``: a row for each arm, a panel for each
    of the ``tasks`` with differences, and the mean over tasks last.
    """
    ones = [one for one in ones if one.against in against]
    arms = list(dict.fromkeys(one.arm for one in ones))
    panels = [task for task in (*tasks, MEAN) if any(one.task == task for one in ones)]
    bases = [name for name in against if any(one.against == name for one in ones)]
    step = 0.8 / len(bases)

    def draw(canvas: Any) -> None:
        axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, task in zip(axes, panels, strict=True):
            panel.axvline(0, color=_QUIET, lw=0.9)
            for one in ones:
                if one.task != task:
                    continue
                beside = [b for b in bases if any((o.arm, o.against) == (one.arm, b) for o in ones)]
                offset = beside.index(one.against) - (len(beside) - 1) / 2
                position = arms.index(one.arm) + step * offset
                ink, shape = _STYLES[one.against]
                if one.low is not None and one.high is not None:
                    panel.hlines(position, 100 * one.low, 100 * one.high, color=ink, lw=1.3)
                sure = one.p_adjusted is not None and one.p_adjusted < SURE
                face = ink if sure else "white"
                panel.plot([100 * one.mean], [position], shape, ms=5, mfc=face, mec=ink, mew=1.2)
            panel.margins(x=0.08)
            panel.set_title("mean over tasks" if task == MEAN else task, fontsize=9, loc="left")
            _axes(panel, arms)
        axes[0].set_yticks(range(len(arms)), arms)
        marks = []
        for base in bases:
            ink, shape = _STYLES[base]
            look = {"color": ink, "mec": ink, "mfc": "white", "ms": 5, "lw": 1.3}
            marks += axes[0].plot([], [], f"{shape}-", label=f"against {base}", **look)
        canvas.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8.5)

    size = 1.0 + 1.75 * len(panels), 1.05 + (0.28 + 0.14 * len(bases)) * len(arms)
    return _draw_svg(draw, size, [_numbers(one) for one in ones])


def means(
    rows: Sequence[tuple[str, float, float | None, float | None]],
    title: str,
    groups: Mapping[str, str],
) -> str:
    """Return an SVG of fractions in per cent, with a row for each: its name, mean and interval, if
    there is one. ``groups``: the beginnings of names; each has its own colour.
    """
    inks = dict(zip(groups, svg.PALETTE["light"], strict=False))

    def draw(canvas: Any) -> None:
        panel = canvas.subplots()
        for position, (name, mean, low, high) in enumerate(rows):
            ink = next(ink for start, ink in inks.items() if name.startswith(start))
            if low is not None and high is not None:
                panel.hlines(position, 100 * low, 100 * high, color=ink, lw=1.3)
            panel.plot([100 * mean], [position], "o", ms=5, color=ink, mew=0)
            panel.annotate(
                f"{100 * mean:.1f}",
                (100 * (high or mean), position),
                (7, 0),
                fontsize=8,
                textcoords="offset points",
                va="center",
            )
        names = [name for name, *_ in rows]
        _axes(panel, names)
        panel.set_yticks(range(len(names)), names)
        panel.set_xlim(0, 100)
        panel.set_title(title, fontsize=9, loc="left")

    return _draw_svg(draw, (8.2, 0.7 + 0.24 * len(rows)), [list(row) for row in rows])


def bars(rows: Sequence[tuple[str, float]], title: str) -> str:
    """Return an SVG of numbers: a bar for each, with its value beside it."""

    def draw(canvas: Any) -> None:
        panel = canvas.subplots()
        for position, (_, value) in enumerate(rows):
            panel.barh(position, value, height=0.6, color=svg.PALETTE["light"][0])
            panel.annotate(
                f"{value:.2f}",
                (value, position),
                (5, 0),
                fontsize=10.5,
                textcoords="offset points",
                va="center",
            )
        _axes(panel, [name for name, _ in rows])
        panel.tick_params(labelsize=10.5)
        panel.set_yticks(range(len(rows)), [name for name, _ in rows])
        panel.set_xlim(0, 1.15 * max(value for _, value in rows))
        panel.set_title(title, fontsize=10.5, loc="left", x=-0.4)

    # Narrow, so that it is read on a phone.
    return _draw_svg(draw, (5.2, 0.8 + 0.32 * len(rows)), [list(row) for row in rows])


def _axes(panel: Any, names: Sequence[str]) -> None:
    svg.few_ticks(panel.xaxis, 4)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", length=0)
    panel.tick_params(labelsize=8.5)


def _numbers(one: Difference) -> list[object]:
    sure = one.p_adjusted is not None and one.p_adjusted < SURE
    return [one.arm, one.against, one.task, one.mean, one.low, one.high, sure]


def mark_of(numbers: Sequence[Sequence[object]]) -> str:
    """Return the mark of a picture: a hash of its numbers, rounded to five digits."""
    plain = [[round(n, 5) if isinstance(n, float) else n for n in one] for one in numbers]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def mark_in(picture: str) -> str:
    """Return the mark in a picture; empty if it has none."""
    match = re.search(r"of the numbers ([0-9a-f]{16})", picture)
    return match[1] if match else ""


def _draw_svg(
    draw: Callable[[Any], None], size: tuple[float, float], numbers: list[list[object]]
) -> str:
    from matplotlib import rc_context  # takes a second to import
    from matplotlib.figure import Figure

    with rc_context(fname=_STYLE), rc_context({"svg.fonttype": "path", "legend.frameon": False}):
        canvas = Figure(figsize=size, layout="constrained", facecolor="white")
        draw(canvas)
        stream = io.StringIO()
        metadata = {"Date": None, "Description": f"of the numbers {mark_of(numbers)}"}
        canvas.savefig(stream, format="svg", metadata=metadata)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
