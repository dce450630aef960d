"""How much of a cache a run reads: it decides the run's targets, whatever the cache grows to later.

A cache may get more candidates (a larger k) and more masked replicas. A run that was begun before
that goes on reading what it read: the same part of each teacher's targets, the same number of
candidates, and the first replicas.
"""

from collections.abc import Iterable

from pydantic import Field

from rekindle.data.errors import InputError
from rekindle.data.settings import Settings
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.reader import ViewReader


class TeacherExtent(Settings):
    """What is read of one teacher: ``k`` candidates of that ``part`` of its targets."""

    k: int | None = None  # None: not asked for
    part: str | None = None  # None: not decided yet


class Extent(Settings):
    """What is asked for of a cache, or (with parts) what is read of it."""

    replicas: int | None = None  # of the masked view; None: not asked for
    targets: dict[str, TeacherExtent] = Field({})  # by teacher
    refused: dict[str, str] = Field({}, exclude=True)  # teachers that have less than is asked for

    def with_defaults(self, other: "Extent") -> "Extent":
        """Return what is asked for here and, where nothing is, what ``other`` asks for."""
        defaults = {name: TeacherExtent(k=one.k) for name, one in other.targets.items()}
        replicas = self.replicas or other.replicas
        return Extent(replicas=replicas, targets={**defaults, **self.targets})


def settle_extent(
    requested: Extent, teachers: Iterable[TeacherReader], view: ViewReader | None, previous: Extent
) -> Extent:
    """Return what a run reads of the ``teachers`` with k candidates, and of its masked view.

    That is what is asked for; else what the run read before (``previous``); else what the cache has
    now.
    Raises InputError for more replicas than there are. A teacher that lacks the k that is asked
    for is ``refused``, with the reason: the run may not need it.
    """
    replicas = _replicas(requested, view, previous)
    targets, refused = {}, {}
    for teacher in teachers:
        name = teacher.info.name
        if teacher.info.k is not None and teacher.info.is_vocabulary:
            recorded = previous.targets.get(name) if replicas in (None, previous.replicas) else None
            try:
                targets[name] = _teacher_extent(
                    teacher, requested.targets.get(name), recorded, replicas
                )
            except InputError as error:
                refused[name] = str(error)
    return Extent(replicas=replicas, targets=targets, refused=refused)


def _replicas(requested: Extent, view: ViewReader | None, previous: Extent) -> int | None:
    if view is None:
        return None
    if view.replicas == 0:
        raise InputError(
            "the cache has no finished replica of these masks. `pipeline cache-teachers` makes them"
        )
    replicas = requested.replicas or previous.replicas or view.replicas
    if replicas > view.replicas:
        raise InputError(
            f"cache.replicas is {replicas}, and of these masks the cache has {view.replicas}. "
            "`pipeline cache-teachers` adds the others; to train with fewer, set cache.replicas: "
            f"{view.replicas}"
        )
    return replicas


def _teacher_extent(
    teacher: TeacherReader,
    requested: TeacherExtent | None,
    previous: TeacherExtent | None,
    replicas: int | None,
) -> TeacherExtent:
    k = requested.k if requested else None
    if previous is not None and k in (None, previous.k):
        return previous
    info = teacher.info
    if k is None:
        return TeacherExtent(part=info.part, k=info.k)
    k = min(k, info.vocabulary_size or k)
    # The smallest of those that have enough: what is added later is larger.
    large_enough = [p for p in _finished(teacher, replicas) if (p.k or 0) >= k] or [info]
    part = min(large_enough, key=lambda p: p.k or 0)
    stored = part.k or 0
    if k == stored or (k < stored and not kind_of(part).is_sample):
        return TeacherExtent(part=part.part, k=k)
    if kind_of(part).is_sample:
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
    """Return the parts that cover all text in that many replicas; if none does, the first part."""
    numbers = teacher.info.view_class.numbers(replicas or 1)
    shards = len(teacher.corpus.commits)
    parts = [p for p in teacher.parts if p is teacher.parts[0] or kind_of(p.info).can_grow]
    finished = [p.info for p in parts if not p.commits.missing_units(shards, numbers)]
    return finished or [teacher.parts[0].info]
