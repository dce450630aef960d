"""The report page: sections of tables, pictures and words become one page of HTML.

It knows no run and no cache; others here, in ``compare`` and in ``cycle`` make its sections. The
page needs no network and no script: styles and pictures are within it.
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
WIDE, SMALL = (4.2, 2.8), (3.5, 2.3)  # inches; small, so that a telephone shows legible letters
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Figure:
    """A picture that ``draw`` draws, and what it shows in which unit; ``size`` in inches."""

    caption: str
    draw: Callable[..., None]  # on matplotlib's axes
    size: tuple[float, float] = WIDE


@dataclass(frozen=True)
class Figures:
    """Pictures beside each other, as many as fit; ``small`` ones are more to a line."""

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
    """Pairs of what and value."""

    kind: ClassVar[str] = "facts"
    facts: list[tuple[str, str]]
    quiet: bool = False


@dataclass(frozen=True)
class Note:
    """A sentence or more; quiet if it explains, not if it warns."""

    kind: ClassVar[str] = "note"
    text: str
    warns: bool = False


@dataclass(frozen=True)
class Commands:
    """Pairs of what for and command line, in their order."""

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
    """Everything on the page: first the ``verdict``, if there is one, what it is of, and the
    sections; those without blocks are left out.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    verdict: str = ""


def as_html(page: Page) -> str:
    """Write the page, whole. Every text is escaped; what cannot be written is shown as U+FFFD."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = breakable
    environment.globals |= {"sample": sample, "palette": palette, "picture": picture}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return _CONTROLS.sub("\ufffd", template.render(page=page))


def breakable(text: str) -> Markup:
    """Escape a text that may be broken where names of runs and settings have their joints, but not
    within a number.
    """
    joints = re.compile(r"(?<=,)(?!\d)|(?<==)|(?<=[a-z][./])(?=[a-z])")
    return Markup("<wbr>").join(joints.split(text))
