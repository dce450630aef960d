"""What a plan says of built-in models that are not made yet: which, and what is not known without.

A plan makes none of them. Without its tokenizer or its text nothing can be said of the corpus, and
so of little else; without a teacher's model, all but what the model itself decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rekindle.pipeline.builtin.missing import missing
from rekindle.pipeline.builtin.names import ABOUT
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.teacher import TeacherWork

OF_THE_CORPUS = ("sequences", "tokens", "units", "positions", "bytes", "seconds", "break-even")


@dataclass(frozen=True)
class NotMade:
    """A built-in model or file that the command which needs it will make."""

    name: str
    what: str
    path: str
    unknown: tuple[str, ...]  # the figures that are missing for want of it


def not_made(config: RunConfig, teachers: Sequence[TeacherWork]) -> tuple[NotMade, ...]:
    """Return what would be made for ``config``; ``teachers`` are the plan's, in its order."""
    of_corpus = missing(config.corpus)
    found = []
    for name, path in missing(config).items():
        unknown = list(OF_THE_CORPUS if name in of_corpus else ())
        for teacher, work in zip(config.teachers, teachers, strict=True):
            if teacher.model == str(path):
                unknown += [f"{figure} of {work.name}" for figure in _unknown_figures(work)]
        found.append(NotMade(name, ABOUT[name], str(path), tuple(unknown)))
    return tuple(found)


def _unknown_figures(work: TeacherWork) -> list[str]:
    return [name for name in ("positions", "bytes", "seconds") if getattr(work, name) is None]


def awaited(needed: dict[str, Path]) -> str:
    """Say why what needs these built-ins is not known."""
    return f"{' and '.join(needed)} {'are' if len(needed) > 1 else 'is'} not made yet"
