"""How much of a cache a run reads: it decides the run's targets, whatever the cache grows to later.

A cache may get more candidates (a larger k) and more masked replicas. Of a cache that has more, a
run that was begun on less goes on reading what it read: the same part of each teacher's targets, so
many of its candidates, and the first replicas.
"""

from collections.abc import Iterable

from pydantic import Field

from rekindle.data.errors import InputError
from rekindle.data.settings import Settings
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.reader import ViewReader


class Kept(Settings):
    """What is read of one teacher: ``k`` candidates of that ``part`` of its targets."""

    k: int | None = None  # None: not asked for
    part: str | None = None  # None: not decided yet


class Extent(Settings):
    """What is asked for of a cache, or (with parts) what is read of it."""

    replicas: int | None = None  # of the masked view; None: not asked for
    targets: dict[str, Kept] = Field({})  # by teacher
    refused: dict[str, str] = Field({}, exclude=True)  # teachers that have less than is asked for

    def over(self, other: "Extent") -> "Extent":
        """Return what is asked for here, and what ``other`` says where nothing is."""
        theirs = {name: Kept(k=kept.k) for name, kept in other.targets.items()}
        replicas = self.replicas or other.replicas
        return Extent(replicas=replicas, targets={**theirs, **self.targets})


def settle_extent(
    asked: Extent, teachers: Iterable[TeacherReader], view: ViewReader | None, before: Extent
) -> Extent:
    """Return what a run reads of the ``teachers`` that keep k candidates, and of its masked view.

    That is what is asked for; else what the run read ``before``; else what the cache has now.
    Raises InputError for more replicas than there are. A teacher that has not the k that is asked
    for is ``refused``, with the reason: the run may not need it.
    """
    replicas = _replicas(asked, view, before)
    targets, refused = {}, {}
    for teacher in teachers:
        name = teacher.info.name
        if teacher.info.k is not None and teacher.info.is_vocabulary:
            was = before.targets.get(name) if replicas in (None, before.replicas) else None
            try:
                targets[name] = _kept(teacher, asked.targets.get(name), was, replicas)
            except InputError as error:
                refused[name] = str(error)
    return Extent(replicas=replicas, targets=targets, refused=refused)


def _replicas(asked: Extent, view: ViewReader | None, before: Extent) -> int | None:
    if view is None:
        return None
    if view.replicas == 0:
        raise InputError(
            "the cache has no replica of these masks that is finished. `pipeline cache-teachers` "
            "makes them"
        )
    replicas = asked.replicas or before.replicas or view.replicas
    if replicas > view.replicas:
        raise InputError(
            f"cache.replicas is {replicas}, and of these masks the cache has {view.replicas}. "
            "`pipeline cache-teachers` adds the others; to train with fewer, set cache.replicas: "
            f"{view.replicas}"
        )
    return replicas


def _kept(
    teacher: TeacherReader, asked: Kept | None, before: Kept | None, replicas: int | None
) -> Kept:
    k = asked.k if asked else None
    if before is not None and k in (None, before.k):
        return before
    info = teacher.info
    if k is None:
        return Kept(part=info.part, k=info.k)
    k = min(k, info.vocabulary_size or k)
    # The smallest of those that have enough: what is added later is larger.
    enough = [found for found in _finished(teacher, replicas) if (found.k or 0) >= k] or [info]
    part = min(enough, key=lambda found: found.k or 0)
    stored = part.k or 0
    if k == stored or (k < stored and not kind_of(part).sampled):
        return Kept(part=part.part, k=k)
    if kind_of(part).sampled:
        raise InputError(
            f"teacher {info.name!r}: targets.k is {k}, and the cache has samples of {stored} "
            f"({info.kind}), which are used whole. Set its targets.k to {stored}, or cache it "
            "under another name"
        )
    raise InputError(
        f"teacher {info.name!r}: targets.k is {k}, and the cache has {stored} candidates for all "
        "its text. `pipeline cache-teachers` adds the others; to train with fewer, set its "
        f"targets.k to {stored}"
    )


def _finished(teacher: TeacherReader, replicas: int | None) -> list[TeacherInfo]:
    """The parts that have all text in so many replicas; the first one, if none has."""
    each = teacher.info.shown.numbers(replicas or 1)
    shards = len(teacher.corpus.commits)
    parts = [p for p in teacher.parts if p is teacher.parts[0] or kind_of(p.info).grows]
    whole = [p.info for p in parts if not p.commits.missing_units(shards, each)]
    return whole or [teacher.parts[0].info]
