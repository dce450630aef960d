"""Where a model's weights come from: the training runs that led to it, oldest first.

A student becomes a teacher, which teaches a student (a chain): the cached teacher keeps the list.
It says what happened and decides nothing: two teachers are the same by their weights alone.
"""

from collections.abc import Iterable

from pydantic import Field

from rekindle.data.settings import Settings


class Ancestor(Settings):
    """One training run: from which text and which teachers, and what came out of it."""

    corpus: str = Field(description="the fingerprint of the cache's corpus")
    teachers: dict[str, str] = Field(description="name in the cache -> fingerprint of the weights")
    steps: int = Field(ge=0)
    student: str = Field("", description="the model it began as; informative")
    weights: str | None = Field(
        None, description="the fingerprint of what it made; null beside these weights themselves"
    )


Lineage = tuple[Ancestor, ...]


def joined_lineage(parts: Iterable[Iterable[Ancestor]]) -> Lineage:
    """Several lineages as one, each run once."""
    found: list[Ancestor] = []
    for part in parts:
        found += [run for run in part if run not in found]
    return tuple(found)


def with_weights(lineage: Lineage, weights: str) -> Lineage:
    """The lineage of a model whose weights have that fingerprint: its last run made them."""
    if not lineage:
        return ()
    return (*lineage[:-1], lineage[-1].model_copy(update={"weights": weights}))
