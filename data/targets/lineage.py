"""Where a model's weights come from: the training runs that led to it, oldest first.

A student can become a teacher of another student (a chain); the cached teacher keeps the list. It
is informative and decides nothing: only the weights identify a teacher.
"""

from collections.abc import Iterable

from pydantic import Field

from rekindle.data.settings import Settings


class Ancestor(Settings):
    """One training run: its text, its teachers, and its result."""

    corpus: str = Field(description="the fingerprint of the cache's corpus")
    teachers: dict[str, str] = Field(description="name in the cache -> fingerprint of the weights")
    steps: int = Field(ge=0)
    student: str = Field("", description="the model it started from; informative")
    weights: str | None = Field(
        None,
        description="the fingerprint of the resulting weights; null beside these weights "
        "themselves",
    )


Lineage = tuple[Ancestor, ...]


def joined_lineage(parts: Iterable[Iterable[Ancestor]]) -> Lineage:
    """Join several lineages, each run once."""
    runs: list[Ancestor] = []
    for part in parts:
        runs += [run for run in part if run not in runs]
    return tuple(runs)


def with_weights(lineage: Lineage, weights: str) -> Lineage:
    """Return the lineage of a model whose weights, made by its last run, have that fingerprint."""
    if not lineage:
        return ()
    return (*lineage[:-1], lineage[-1].model_copy(update={"weights": weights}))
