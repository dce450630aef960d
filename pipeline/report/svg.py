"""Turn pictures into parts of the page: matplotlib's SVG in the page's own colours.

Colours are CSS variables, one set for light mode and one for dark. A run has one colour, one marker
and one dash in all pictures; the first 30 runs also differ in marker or dash, for readers and
printers that do not distinguish colours.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Dash: TypeAlias = str | tuple[int, tuple[float, ...]]  # as in matplotlib
# placeholders for the page's own colours; INK also in picture.mplstyle
INK, PANEL = "#010203", "#010204"
# Contrast of at least 4.5:1 against panel and ground in each mode; blue, orange, green, purple,
# ochre, rose.
PALETTE = {
    "light": ("#0b62c4", "#b8481a", "#0a7350", "#7f3fbf", "#7d6000", "#bb2a74"),
    "dark": ("#6cb0fa", "#f0905c", "#4cc79d", "#c6a0f5", "#d9bc3f", "#f58abb"),
}
MARKERS = "osD^vP"
DASHES: tuple[Dash, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (9, 3)))
_COLOURS = len(PALETTE["light"])
_LONGEST = 24  # characters of a name within a picture
_STYLE = Path(__file__).with_name("picture.mplstyle")  # matplotlib settings
_FARTHEST = 1e12  # larger values are no loss and no score, and no axis can show them


def palette(mode: str) -> Markup:
    """Return the colours of the runs as CSS variables, for ``light`` or ``dark``."""
    names = (f"--run-{n}: {colour};" for n, colour in enumerate(PALETTE[mode]))
    return Markup(" ".join(names))


def colour(run: int) -> str:
    """Return the placeholder for the colour of run number ``run``."""
    return f"#0a0b{run % _COLOURS:02x}"


class LineStyle(TypedDict):
    """The keyword arguments for drawing a line with matplotlib."""

    color: str
    marker: str
    linestyle: Dash
    markeredgewidth: float


def line_style(run: int) -> LineStyle:
    """Return the style of the line of run number ``run``."""
    dash, number = divmod(run, _COLOURS)
    # beyond 30 runs, colours are combined with other markers
    shift = run // (_COLOURS * len(DASHES))
    marker = MARKERS[(number + shift) % len(MARKERS)]
    return {
        "color": colour(run),
        "marker": marker,
        "linestyle": DASHES[dash % len(DASHES)],
        "markeredgewidth": 0,
    }


def sample(run: int) -> Markup:
    """Draw a short piece of the run's line, for legends."""

    def draw(axes: "Axes") -> None:
        axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], **line_style(run), ms=5)
        axes.set_axis_off()
        axes.set(xlim=(-0.05, 2.05), ylim=(-1, 1))

    svg = _draw_svg(draw, (0.42, 0.16), layout=None)
    return Markup(svg.replace("<svg", '<svg class="sample" aria-hidden="true"', 1))


def picture(draw: Callable[..., None], size: tuple[float, float]) -> Markup:
    """Return the SVG of what ``draw`` draws; ``size`` in inches. Equal drawings give equal
    bytes.
    """
    svg = _draw_svg(draw, size, layout="constrained")
    return Markup(svg.replace("<svg", '<svg role="img"', 1))


def _draw_svg(
    draw: Callable[..., None],
    size: tuple[float, float],
    layout: Literal["constrained"] | None,
) -> str:
    from matplotlib import rc_context  # takes a second to import, so only when something is drawn
    from matplotlib.figure import Figure as Canvas

    with rc_context(fname=_STYLE), warnings.catch_warnings():
        # matplotlib measures letters missing from its font wrongly, but the browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        canvas = Canvas(figsize=size, layout=layout)
        draw(canvas.add_subplot() if layout else canvas.add_axes((0, 0, 1, 1)))
        stream = io.StringIO()
        canvas.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return inline(stream.getvalue())


def few_ticks(axis: "Axis", most: int, *, whole: bool = False) -> None:
    """Mark at most ``most`` steps on the axis, only ``whole`` numbers if it counts."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=whole))


def plottable(values: Iterable[float]) -> list[float]:
    """Return the values, with NaN (a gap in the line) for those no axis can show."""
    return [v if math.isfinite(v) and abs(v) < _FARTHEST else math.nan for v in values]


def shorten_name(name: str) -> str:
    """Shorten a name to fit a picture: printable, with the middle of a long name left out."""
    name = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    if len(name) <= _LONGEST:
        return name
    half = (_LONGEST - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def inline(svg: str) -> str:
    """Turn an SVG document into an element of a page, in the page's colours.

    Removes the prologue, metadata, addresses and unused ids. Text between tags stays unchanged.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    tags = re.findall(r"<[^>]*>", svg)
    used = {name for tag in tags for name in re.findall(r'(?:"|\()#([^")]+)["|)]', tag)}
    return re.sub(
        r"<[^>]*>", lambda tag: _page_colours(_without_attributes(tag.group(), used)), svg
    ).strip()


def _without_attributes(tag: str, used: set[str]) -> str:
    tag = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", tag)
    tag = re.sub(r' (width|height)="[^"]*pt"', "", tag)
    return re.sub(r' id="([^"]*)"', lambda found: found.group() if found[1] in used else "", tag)


def _page_colours(tag: str) -> str:
    tag = tag.replace(INK, "currentColor").replace(PANEL, "var(--panel)")
    return re.sub(r"#0a0b([0-9a-f]{2})", lambda found: f"var(--run-{int(found[1], 16)})", tag)
