"""What a plan says of built-in models that are not made yet: which, and what is not known without.

A plan makes none of them. Without its tokenizer or its text nothing can be said of the corpus, and
so of little else; without a teacher's model, all but what the model itself decides.
"""

from collections.abc import Sequence

from rekindle.pipeline.builtin.missing import missing
from rekindle.pipeline.builtin.names import ABOUT
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.figures import NotMade, TeacherWork

OF_THE_CORPUS = ("sequences", "tokens", "units", "positions", "bytes", "seconds", "break-even")
OF_A_TEACHER = ("positions", "bytes", "seconds")


def not_made(config: RunConfig, teachers: Sequence[TeacherWork]) -> tuple[NotMade, ...]:
    """Return what would be made for ``config``; ``teachers`` are the plan's, in its order."""
    of_corpus = missing(config.corpus)
    found = []
    for name, path in missing(config).items():
        unknown = list(OF_THE_CORPUS if name in of_corpus else ())
        for teacher, work in zip(config.teachers, teachers, strict=True):
            if teacher.model == str(path):
                lacking = [figure for figure in OF_A_TEACHER if getattr(work, figure) is None]
                unknown += [f"{figure} of {work.name}" for figure in lacking]
        found.append(NotMade(name, ABOUT[name], str(path), tuple(unknown)))
    return tuple(found)
