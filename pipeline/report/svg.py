"""How a picture becomes part of the page: matplotlib's SVG in the page's own inks.

Colours are variables of the page, one set for light and one for dark. A run has one colour, one
marker and one dash in all pictures; the first 30 runs differ in marker or dash as well, for eyes
and printers that see no colours.
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

Dash: TypeAlias = str | tuple[int, tuple[float, ...]]  # as matplotlib has it
INK, PANEL = "#010203", "#010204"  # stand for the page's own inks; INK also in picture.mplstyle
# In each mode at least 4.5:1 against panel and ground; blue, orange, green, purple, ochre, rose.
PALETTE = {
    "light": ("#0b62c4", "#b8481a", "#0a7350", "#7f3fbf", "#7d6000", "#bb2a74"),
    "dark": ("#6cb0fa", "#f0905c", "#4cc79d", "#c6a0f5", "#d9bc3f", "#f58abb"),
}
MARKERS = "osD^vP"
DASHES: tuple[Dash, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (9, 3)))
_COLOURS = len(PALETTE["light"])
_LONGEST = 24  # characters of a name within a picture
_STYLE = Path(__file__).with_name("picture.mplstyle")  # as matplotlib names its settings
_FARTHEST = 1e12  # what is beyond is no loss and no score, and no axis can show it


def palette(mode: str) -> Markup:
    """Return the colours of the runs as variables of CSS, for ``light`` or ``dark``."""
    names = (f"--run-{n}: {colour};" for n, colour in enumerate(PALETTE[mode]))
    return Markup(" ".join(names))


def colour(run: int) -> str:
    """Return what stands for the colour of the run of that number."""
    return f"#0a0b{run % _COLOURS:02x}"


class LineStyle(TypedDict):
    """What matplotlib draws a line with."""

    color: str
    marker: str
    linestyle: Dash
    markeredgewidth: float


def line_style(run: int) -> LineStyle:
    """Return how the line of the run of that number is drawn."""
    round_, place = divmod(run, _COLOURS)
    turn = run // (_COLOURS * len(DASHES))  # past 30 runs, colours meet other markers
    marker = MARKERS[(place + turn) % len(MARKERS)]
    return {
        "color": colour(run),
        "marker": marker,
        "linestyle": DASHES[round_ % len(DASHES)],
        "markeredgewidth": 0,
    }


def sample(run: int) -> Markup:
    """Draw a piece of the run's line, for legends."""

    def draw(axes: "Axes") -> None:
        axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], **line_style(run), ms=5)
        axes.set_axis_off()
        axes.set(xlim=(-0.05, 2.05), ylim=(-1, 1))

    svg = _drawn(draw, (0.42, 0.16), layout=None)
    return Markup(svg.replace("<svg", '<svg class="sample" aria-hidden="true"', 1))


def picture(draw: Callable[..., None], size: tuple[float, float]) -> Markup:
    """Return the picture that ``draw`` draws; ``size`` in inches. Equal drawings, equal bytes."""
    svg = _drawn(draw, size, layout="constrained")
    return Markup(svg.replace("<svg", '<svg role="img"', 1))


def _drawn(
    draw: Callable[..., None],
    size: tuple[float, float],
    layout: Literal["constrained"] | None,
) -> str:
    from matplotlib import rc_context  # a second's work to import: only for what is drawn
    from matplotlib.figure import Figure as Canvas

    with rc_context(fname=_STYLE), warnings.catch_warnings():
        # Letters that matplotlib's font lacks are measured wrongly, but the browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        canvas = Canvas(figsize=size, layout=layout)
        draw(canvas.add_subplot() if layout else canvas.add_axes((0, 0, 1, 1)))
        stream = io.StringIO()
        canvas.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return inline(stream.getvalue())


def few_ticks(axis: "Axis", most: int, *, whole: bool = False) -> None:
    """Mark at most so many steps on the axis, at ``whole`` numbers alone if it counts."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=whole))


def plottable(values: Iterable[float]) -> list[float]:
    """Return the values, NaN (a gap in a line) for those that no axis can show."""
    return [v if math.isfinite(v) and abs(v) < _FARTHEST else math.nan for v in values]


def shown(name: str) -> str:
    """Return a name as it fits into a picture: printable, its middle left out if it is long."""
    name = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    if len(name) <= _LONGEST:
        return name
    half = (_LONGEST - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def inline(svg: str) -> str:
    """Turn an SVG document into an element of a page: without prologue, metadata, addresses and
    ids that nothing refers to, in the page's inks. Texts between tags stay as they are.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    tags = re.findall(r"<[^>]*>", svg)
    used = {name for tag in tags for name in re.findall(r'(?:"|\()#([^")]+)["|)]', tag)}
    return re.sub(r"<[^>]*>", lambda tag: _own_inks(_bare(tag.group(), used)), svg).strip()


def _bare(tag: str, used: set[str]) -> str:
    tag = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", tag)
    tag = re.sub(r' (width|height)="[^"]*pt"', "", tag)
    return re.sub(r' id="([^"]*)"', lambda found: found.group() if found[1] in used else "", tag)


def _own_inks(tag: str) -> str:
    tag = tag.replace(INK, "currentColor").replace(PANEL, "var(--panel)")
    return re.sub(r"#0a0b([0-9a-f]{2})", lambda found: f"var(--run-{int(found[1], 16)})", tag)
