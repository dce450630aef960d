"""The report page: write sections of tables, pictures and words as one HTML page.

Knows no run and no cache: other modules here, in ``compare`` and in ``cycle`` make the sections.
The page needs no network and no script: styles and pictures are embedded.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rekindle.pipeline.report.svg import palette, picture, sample
from rekindle.pipeline.report.table import Table

TEMPLATE = Path(__file__).with_name("page.html.j2")
WIDE, SMALL = (4.2, 2.8), (3.5, 2.3)  # inches; small, so that letters are legible on a phone
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Figure:
    """A picture drawn by ``draw``, with its caption (including units); ``size`` in inches."""

    caption: str
    draw: Callable[..., None]  # takes matplotlib's axes
    size: tuple[float, float] = WIDE


@dataclass(frozen=True)
class Figures:
    """Pictures side by side, as many as fit; more per line if ``small``."""

    kind: ClassVar[str] = "figures"
    figures: list[Figure]
    small: bool = False


@dataclass(frozen=True)
class Legend:
    """The name of each run; ``samples`` are the numbers of their lines in the pictures."""

    kind: ClassVar[str] = "legend"
    names: list[str]
    samples: Sequence[int]


@dataclass(frozen=True)
class Facts:
    """Pairs of a label and a value."""

    kind: ClassVar[str] = "facts"
    facts: list[tuple[str, str]]
    quiet: bool = False


@dataclass(frozen=True)
class Note:
    """One or more sentences; shown quietly unless it warns."""

    kind: ClassVar[str] = "note"
    text: str
    warns: bool = False


@dataclass(frozen=True)
class Commands:
    """Pairs of a purpose and a command line, in order."""

    kind: ClassVar[str] = "commands"
    commands: list[tuple[str, str]]


Block = Table | Figures | Legend | Facts | Note | Commands


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """Everything on the page: the ``verdict`` if there is one, the lead, and the sections. Sections
    without blocks are left out.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    verdict: str = ""


def as_html(page: Page) -> str:
    """Render the whole page. All text is escaped; characters that HTML forbids become U+FFFD."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = breakable
    environment.globals |= {"sample": sample, "palette": palette, "picture": picture}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return _CONTROLS.sub("\ufffd", template.render(page=page))


def breakable(text: str) -> Markup:
    """Escape a text and allow line breaks at the joints of run and setting names, but not within a
    number.
    """
    joints = re.compile(r"(?<=,)(?!\d)|(?<==)|(?<=[a-z][./])(?=[a-z])")
    return Markup("<wbr>").join(joints.split(text))
