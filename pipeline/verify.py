"""Checks a whole cache: every byte against its checksum, every row against the corpus. Changes nothing."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rekindle.data.cache import Cache
from rekindle.data.columns import list_views
from rekindle.data.corpus import Corpus, unit_of
from rekindle.data.errors import CacheError
from rekindle.data.shards import ROWS_PER_BATCH, Commit, ShardSet
from rekindle.data.teacher_reader import TeacherReader
from rekindle.data.views import ViewReader


@dataclass
class VerifyReport:
    """What was checked and what was wrong."""

    shards: int = 0
    bytes: int = 0
    orphans: int = 0
    coverage: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return dict(vars(self)) | {"sound": not self.problems}

    def as_text(self, name: str) -> str:
        """For people."""
        lines = [f"{name}: {self.shards} shards, {self.bytes:,} bytes checked"]
        lines += [f"  {teacher}: coverage {share:.1%}" for teacher, share in self.coverage.items()]
        if self.orphans:
            lines.append(f"  {self.orphans} data files of attempts that were never committed (harmless)")
        lines += [f"  PROBLEM: {problem}" for problem in self.problems]
        return "\n".join(lines if self.problems else [*lines, "sound"])


def verify_cache(path: str) -> VerifyReport:
    """Check the cache at ``path``. Raises CacheError only when it cannot be opened at all."""
    report = VerifyReport()
    cache = Cache.open(path)
    sets = [cache.corpus.shards]
    sets += [view.shards for view in cache.views.values()]
    sets += [teacher.shards for teacher in cache.teachers.values()]
    for shards in sets:
        _check_files(shards, report)
    if not report.problems:  # rows are only worth reading when the bytes are right
        for view in cache.views.values():
            _collect(report, _check_view(cache.corpus, view))
        for teacher in cache.teachers.values():
            report.coverage[teacher.info.name] = teacher.coverage
            _collect(report, _check_teacher(cache, teacher))
    return report


def _check_files(shards: ShardSet, report: VerifyReport) -> None:
    named = set()
    for unit in _units(shards):
        try:
            commit = shards.commit(unit)
            named.add(commit.path.removeprefix("data/"))
            _check_bytes(shards, commit)
        except CacheError as error:
            report.problems.append(str(error))
            continue
        report.shards += 1
        report.bytes += commit.bytes
    report.orphans += len(set(shards.store.names(f"{shards.folder}/data")) - named)


def _units(shards: ShardSet) -> list[str]:
    names = shards.store.names(f"{shards.folder}/commits")
    return [n.removesuffix(".json") for n in names if n.endswith(".json") and n[0] != "."]


def _check_bytes(shards: ShardSet, commit: Commit) -> None:
    shard = shards.open(commit)  # size, schema and footer
    if _sha256(shard.path) != commit.sha256:
        raise CacheError(
            f"{shard.path} is damaged: its sha256 is not the committed one. Delete "
            f"{shards.folder}/commits/{commit.unit}.json to have it made again"
        )
    rows = sum(shard.batch(i).num_rows for i in range(shard.batch_count))
    if rows != commit.rows:
        raise CacheError(f"{shard.path} has {rows:,} rows, {commit.rows:,} were committed")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _collect(report: VerifyReport, problems: Iterator[str]) -> None:
    try:
        report.problems += list(problems)
    except CacheError as error:
        report.problems.append(str(error))


def _check_view(corpus: Corpus, view: ViewReader) -> Iterator[str]:
    """Alignment with the corpus, over every record batch (the reader raises)."""
    replicas: list[int | None] = list(range(view.replicas)) if "masked-" in view.name else [None]
    for replica in replicas:
        for shard in range(len(corpus.commits)):
            for index in range(corpus.shard(shard).batch_count):
                view.batch(shard, index, replica)
    yield from ()


def _check_teacher(cache: Cache, teacher: TeacherReader) -> Iterator[str]:
    """Alignment and ranges of every unit, and that it was made from this very corpus and mask."""
    replicas: list[int | None] = list(range(teacher.replicas)) if teacher.masked else [None]
    for replica in replicas:
        for shard, commit in enumerate(cache.corpus.commits):
            unit = unit_of(shard, replica)
            if not teacher.has(shard, replica):
                continue
            if teacher.commits[unit].facts.get("corpus_sha256") != commit.sha256:
                yield f"targets/{teacher.info.name}/{unit} was made from another corpus shard"
            yield from _check_rows(cache, teacher, shard, replica, commit.rows)


def _check_rows(
    cache: Cache, teacher: TeacherReader, shard: int, replica: int | None, rows: int
) -> Iterator[str]:
    if teacher.info.kind == "sequence":
        teacher.sequence_rows(shard, range(rows))
        return
    found = teacher.position_rows(shard, range(rows), replica)
    if teacher.masked and teacher.view is not None:
        for index in range(cache.corpus.shard(shard).batch_count):
            offsets, flat = list_views(teacher.view.batch(shard, index, replica)["positions"], "")
            for local in range(len(offsets) - 1):
                part, columns = found[index * ROWS_PER_BATCH + local]
                theirs = columns["positions"][part]
                ours = flat[offsets[local] : offsets[local + 1]]
                if len(theirs) and theirs.tolist() != ours.tolist():
                    yield f"targets/{teacher.info.name}: row {index * ROWS_PER_BATCH + local} has other positions"
