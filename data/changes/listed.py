"""List a cache's teachers: what is stored of each, in how many bytes, and its origin."""

from dataclasses import dataclass

from rekindle.data.cache import Cache
from rekindle.data.journal import journal_in
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.part import Part
from rekindle.data.targets.reading.reader import TeacherReader


@dataclass(frozen=True)
class TeacherSummary:
    """A teacher of a cache, or a part of it with further candidates or temperatures."""

    name: str
    part: str
    task: str
    kind: str
    kept: str
    codec: str
    temperatures: tuple[float, ...]
    view: str
    domains: tuple[str, ...] | None
    precision: str
    units: int
    units_planned: int
    bytes: int
    made: str  # run, imported, served
    model: str
    fingerprint: str
    mapped: int | None
    format_version: int
    lineage: list[dict[str, object]]


def teachers_of(cache: Cache) -> list[TeacherSummary]:
    """Return every teacher, each followed by its further parts."""
    return [
        _listed(cache, teacher, part)
        for teacher in cache.teachers.values()
        for part in teacher.parts
    ]


def describe_change(cache: Cache) -> str:
    """Return the change that is under way; "" if there is none."""
    change = journal_in(cache.manifest, cache.store).change
    if change is None:
        return ""
    return (
        f"{change.describe()} ({change.phase}): {change.command(cache.store.location)} continues it"
    )


def _listed(cache: Cache, teacher: TeacherReader, part: Part) -> TeacherSummary:
    info = part.info
    planned = len(info.view_class.numbers(teacher.replicas)) * len(cache.corpus.commits)
    head = 0 if info.part else teacher.bytes_on_disk - teacher.bytes
    return TeacherSummary(
        name=info.name,
        part=info.part,
        task=info.task,
        kind=info.kind,
        kept=kind_of(info).description,
        codec=info.codec,
        temperatures=info.temperatures,
        view=info.view,
        domains=info.domains,
        precision=info.precision,
        units=len(part.commits),
        units_planned=planned,
        bytes=part.commits.bytes + head,
        made="imported" if info.imported else "served" if info.served else "run",
        model=info.model,
        fingerprint=teacher.fingerprint,
        mapped=info.mapped,
        format_version=info.format_version,
        lineage=[run.model_dump() for run in info.lineage],
    )
