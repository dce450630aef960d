"""Check a whole cache, changing nothing: every byte against its checksum, every row against the
corpus.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rekindle.data.cache import Cache
from rekindle.data.counted import counted
from rekindle.data.errors import CacheError, CacheFormatError
from rekindle.data.inventory import (
    damaged_descriptions,
    imported_teachers,
    lost_descriptions,
    orphans,
    shard_sets,
)
from rekindle.data.journal import read_with_overlay
from rekindle.data.storage.base import Store
from rekindle.data.storage.cuts import cut_lengths
from rekindle.data.storage.manifest import MANIFEST, read_manifest
from rekindle.data.storage.seal import REPAIR, describe_damage
from rekindle.data.storage.shards import Commit, ShardSet
from rekindle.data.storage.store import open_store
from rekindle.data.storage.units import place_of, unit_of
from rekindle.data.targets.kinds.base import VocabularyKind
from rekindle.data.targets.reading.reader import TeacherReader, target_positions
from rekindle.data.views.reader import ViewReader
from rekindle.data.views.registry import view_kind
from rekindle.pipeline.progress import SILENT, Progress, ProgressTask

Reader = ViewReader | TeacherReader


@dataclass
class VerifyReport:
    """What was checked and what was wrong."""

    shards: int = 0
    bytes: int = 0
    orphans: int = 0
    imported: list[str] = field(default_factory=list)  # teachers without a model that could be run
    coverage: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Return the report for --json."""
        return vars(self) | {"sound": not self.problems}

    def as_text(self, name: str) -> str:
        """Return the report as text."""
        lines = [f"{name}: {counted(self.shards, 'shard')}, {counted(self.bytes, 'byte')} checked"]
        lines += [
            f"  {teacher}: run on {share:.1%} of the text"
            for teacher, share in self.coverage.items()
        ]
        if self.orphans:
            lines.append(
                f"  {counted(self.orphans, 'data file')} of attempts that were never committed "
                "(`pipeline gc` removes what they left)"
            )
        lines += [f"  PROBLEM: {problem}" for problem in self.problems]
        return "\n".join(lines if self.problems else [*lines, "sound"])


def verify_cache(path: str, progress: Progress = SILENT) -> VerifyReport:
    """Check the cache at ``path``: every file's bytes, then what the rows say.

    Raise CacheError only if there is no cache, or one of another format version.
    """
    report, store = VerifyReport(), open_store(path)
    if not store.exists(MANIFEST):
        read_manifest(store)  # raises: there is none
    with store.reading():
        _check(path, store, report, progress)
    return report


def _check(path: str, store: Store, report: VerifyReport, progress: Progress) -> None:
    with suppress(CacheFormatError):  # reported below
        read_with_overlay(store)
    report.imported = imported_teachers(store)
    damaged = damaged_descriptions(store)
    if MANIFEST not in damaged:
        damaged |= lost_descriptions(store)
    report.problems += [describe_damage(error) for error in damaged.values()]
    with progress.task("checksums", unit="shards") as task:
        for shards in shard_sets(store):
            _check_files(shards, report, task)
    if not report.problems:  # rows are only worth reading if the bytes are right
        with progress.task("rows", unit="units") as task:
            _check_rows(path, report, task)


def _check_files(shards: ShardSet, report: VerifyReport, task: ProgressTask) -> None:
    sound, damaged = shards.survey(partial(_check_bytes, shards, task))
    report.problems += [describe_damage(error) for error in damaged.values()]
    report.shards += len(sound)
    report.bytes += sound.bytes
    if not damaged and (roll_up_error := shards.records.roll_up_error(sound)):
        report.problems.append(describe_damage(roll_up_error))
    with suppress(CacheFormatError):  # a damaged record, reported above
        report.orphans += len(orphans(shards))


def _check_bytes(shards: ShardSet, task: ProgressTask, commit: Commit) -> None:
    shard = shards.open(commit, direct=True)
    shard.check()
    if shard.sha256() != commit.sha256:
        raise CacheFormatError(
            f"{shard.name} is damaged: its sha256 is not the committed one. {REPAIR}"
        )
    for _ in shard.batches():  # each batch is checked against the number of its rows
        pass
    task.advance(1, bytes=commit.bytes)


def _check_rows(path: str, report: VerifyReport, task: ProgressTask) -> None:
    try:
        cache = Cache.open(path)
    except CacheError as error:
        report.problems.append(str(error))
        return
    for view in cache.views.values():
        report.problems += _problems_of_units(cache, view, view.name, task)
    for teacher in cache.teachers.values():
        report.coverage[teacher.info.name] = teacher.coverage
        for reader in [teacher, *_unused_parts(cache, teacher)]:
            report.problems += _problems_of_units(cache, reader, reader.info.view, task)


def _unused_parts(cache: Cache, teacher: TeacherReader) -> Iterator[TeacherReader]:
    """Yield readers of parts that ``teacher`` does not show: a smaller k, unfinished extensions."""
    used_parts = {teacher.main.info.part, *(part.info.part for part in teacher.tails)}
    by_name = {part.info.part: part.info for part in teacher.parts}
    for name, info in by_name.items():
        if name not in used_parts:
            infos = [by_name[info.extends], info] if info.extends is not None else [info]
            yield TeacherReader(cache.corpus, infos, teacher.view)


def _problems_of_units(
    cache: Cache, reader: Reader, view: str, task: ProgressTask
) -> Iterator[str]:
    """Yield every problem of the committed units, in complete replicas or not. ``view`` is the view
    that is read, or that the teacher was shown.
    """
    for unit in reader.commits:
        task.advance()
        place, shards = place_of(unit), len(cache.corpus.commits)
        masked = view_kind(view).masked
        if place is None or place[0] >= shards or (place[1] is None) == masked:
            yield f"{reader.folder}: unit {unit} is of no corpus shard"
            continue
        try:
            if isinstance(reader, TeacherReader):
                for problem in _problems_of_targets(cache, reader, *place):
                    yield f"{reader.folder}: unit {unit}: {problem}"
            else:  # the reader raises where a record batch is not aligned with the corpus
                reader.batches(*place)
        except CacheError as error:
            yield str(error)


def _problems_of_targets(
    cache: Cache, teacher: TeacherReader, shard: int, replica: int | None
) -> Iterator[str]:
    """Check alignment and ranges, completeness, and that corpus and mask are the recorded ones."""
    commit, corpus = teacher.commits[unit_of(shard, replica)], cache.corpus
    if commit.facts.get("corpus_sha256") != corpus.commits[shard].sha256:
        yield "it was made from another corpus shard"
    domains = corpus.shard(shard).table()["domain"].to_pylist()
    taught = teacher.info.domains
    included = [taught is None or domain in taught for domain in domains]
    cuts = [teacher.cut((shard, row), replica) for row in range(len(domains))]
    if teacher.kind.per_sequence:
        if cut_lengths(cuts)[~np.array(included, bool)].any():
            yield "it has targets of domains that the teacher is not for"
    elif isinstance(teacher.kind, VocabularyKind):
        for lists in {id(lists): lists for lists, _, _ in cuts}.values():
            yield from _doubled_ids(teacher.kind.candidate_ids(lists.columns))
        predicted = target_positions(corpus, teacher.info, teacher.view, shard, replica)
        for row, ((lists, a, b), expected) in enumerate(zip(cuts, predicted, strict=True)):
            stored = lists.columns["positions"][a:b]
            allowed = expected if included[row] else expected[:0]
            # Gaps are allowed here, and counted.
            allows_gaps = teacher.info.imported is not None or teacher.info.mapped is not None
            if not (
                np.isin(stored, allowed).all() if allows_gaps else np.array_equal(stored, allowed)
            ):
                yield f"row {row} has targets at other positions than it should"


def _doubled_ids(ids: NDArray[np.int64] | None) -> Iterator[str]:
    """Report ids that appear twice among one position's candidates: their mass would count
    twice.
    """
    if ids is None:
        return
    ordered = np.sort(ids, axis=1)
    doubled = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if doubled.any():
        yield f"{counted(int(doubled.any(axis=1).sum()), 'position')} with a candidate twice"
