"""Stage 1: experts → cache. Builds the corpus and views, runs each teacher's missing units, commits
them.

Resume is plan − commits: the same command again does only what is missing.
"""

import functools
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from rekindle.data.cache import write_manifest
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.errors import InputError
from rekindle.data.storage.commits import SECONDS
from rekindle.data.storage.manifest import begin_manifest
from rekindle.data.storage.seal import seal
from rekindle.data.storage.shards import Commit, ShardSet
from rekindle.data.storage.store import Store, open_store
from rekindle.data.targets.head import HEAD_FILES, write_head
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.files import is_described, read_teacher
from rekindle.data.targets.reading.reader import FINISHED, TeacherReader
from rekindle.data.targets.scalars import ScalarSums
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.registry import view_kind
from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.caching.compute_unit import Unit, UnitResult, run_unit
from rekindle.pipeline.caching.extensions import plan_parts, view_of
from rekindle.pipeline.caching.hard_view import build_hard_masks, hard_view, masks_last
from rekindle.pipeline.caching.repair import repair_cache
from rekindle.pipeline.caching.teachers import (
    Teacher,
    TeacherPlan,
    claim_teacher,
    plan_teacher,
)
from rekindle.pipeline.caching.views import build_views
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.processes.devices import places_for
from rekindle.pipeline.processes.pool import run_units
from rekindle.pipeline.progress import Progress
from rekindle.pipeline.teacher_config import TeacherConfig

log = logging.getLogger("rekindle")

ZSTD_LEVEL = 1  # of the compact codec: higher ones cost time and gain nothing


@dataclass(frozen=True)
class StageOne:
    """What a run of stage 1 did."""

    corpus_sequences: int
    units_done: int
    units_present: int
    repaired: int = 0  # damaged files that were made again

    def as_text(self) -> str:
        """What was done, in a line."""
        told = (
            f"{self.corpus_sequences:,} sequences; {self.units_done} units made, "
            f"{self.units_present} were there"
        )
        if not self.repaired:
            return told
        return f"{told}, {self.repaired} damaged files removed, and made anew where they are in use"


def cache_teachers(
    config: RunConfig,
    only: Sequence[str] = (),
    workers: int = 1,
    progress: Progress | None = None,
    check: bool | None = None,
) -> StageOne:
    """Make the cache of ``config``, or what is missing of it, or damaged.

    ``only`` limits the work to teachers of those names; ``check`` is for ``repair_cache``.
    Raises InputError or CacheMismatchError before any teacher runs if one of them cannot teach on
    this corpus.
    """
    config.check_single()
    progress = progress or Progress.silent()
    chosen = _chosen(config, only)
    make_missing(config)
    store = open_store(config.cache.path)
    with store.working() as alone:
        # Only the first process repairs; later ones skip it.
        repaired = 0
        if alone is False:
            log.info("another process works on %s: its units are shared out", store.location)
        else:
            repaired = repair_cache(store, [t.name for t in chosen], check, progress)
        begin_manifest(store)
        corpus = _build_corpus(store, config, progress)
        views = build_views(corpus, config, progress)
        hard = hard_view(corpus, config)
        views = replace(views, masked=hard or views.masked)
        plans = [plan_teacher(teacher, corpus, views, config.cache.seed) for teacher in chosen]
        parts = [part for plan in plans for part in plan_parts(corpus, plan)]
        before, after = masks_last(parts, hard)
        done = present = 0
        for part in [*before, *after]:
            if hard and part in after:
                build_hard_masks(hard, True, progress)
            replicas = config.cache.masked_replicas
            missing, finished = missing_units(corpus, part.info.folder, part.info.view, replicas)
            present += finished
            done += len(missing)
            if not alone:  # in step with another process, both would make every unit
                random.shuffle(missing)
            lacks_head = kind_of(part.info).has_head and not {*HEAD_FILES} <= {
                *store.names(part.info.folder)
            }
            if missing or lacks_head:
                _run(part, corpus, missing, workers, progress)
            if part.info.part:
                store.create(f"{part.info.folder}/{FINISHED}", seal({}))
        if hard:
            build_hard_masks(hard, False, progress)
        write_manifest(store)
    return StageOne(len(corpus), done, present, repaired)


def _chosen(config: RunConfig, only: Sequence[str]) -> list[TeacherConfig]:
    known = {t.name: t for t in config.teachers}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise InputError(
            f"no teacher {unknown[0]!r} in the configuration (it has: {', '.join(known) or 'none'})"
        )
    return [known[name] for name in dict.fromkeys(only)] if only else list(known.values())


def _build_corpus(store: Store, config: RunConfig, progress: Progress) -> Corpus:
    with progress.task("corpus", unit="sequences") as task:
        return build_corpus(
            store,
            config.corpus,
            config.cache.sequences_per_shard,
            lambda sequences, tokens: task.advance(sequences, tokens=tokens),
        )


def missing_units(corpus: Corpus, folder: str, view: str, replicas: int) -> tuple[list[Unit], int]:
    """Return the units of a folder that are not committed, in order, and how many are.

    They are of the view itself, or of a teacher that is shown it.
    """
    each, shards = view_kind(view).numbers(replicas), range(len(corpus.commits))
    planned = [Unit(shard, replica) for replica in each for shard in shards]
    done = ShardSet(corpus.store, folder).committed()
    missing = [unit for unit in planned if unit.name not in done]
    return missing, len(planned) - len(missing)


def _run(
    plan: TeacherPlan, corpus: Corpus, units: list[Unit], workers: int, progress: Progress
) -> None:
    rows = sum(corpus.commits[unit.shard].rows for unit in units)
    name = f"{plan.info.name} {plan.info.part}".strip()
    with progress.task(name, unit="sequences", total=rows) as task:

        def report(commit: Commit | None) -> None:
            if commit is not None:
                task.advance(commit.rows, tokens=commit.facts["tokens"], bytes=commit.bytes)

        if workers == 1 or not units:
            runner = UnitRunner(plan, corpus)
            for unit in units:
                report(runner.make(unit))
        else:
            load = functools.partial(_load, plan, corpus.store.location)
            places = places_for(workers)
            run_units(f"teacher {plan.info.name!r}", load, units, places, report)


def _load(plan: TeacherPlan, location: str) -> Callable[[Unit], Commit | None]:
    """What a worker process does with each unit: its teacher is loaded here, once."""
    return UnitRunner(plan, Corpus(open_store(location))).make


class UnitRunner:
    """A loaded teacher and all that it needs to make units of one part of its targets."""

    def __init__(self, plan: TeacherPlan, corpus: Corpus):
        self.corpus, self.info = corpus, plan.info
        self.teacher = Teacher(plan, corpus)
        self.view = view_of(plan.info, corpus)
        self.head = self.teacher.output_matrix() if kind_of(plan.info).has_head else None
        self.kept = None  # reads the part whose ids tails are taken of
        if plan.info.extends is not None:
            main = read_teacher(corpus.store, plan.info.name, plan.info.extends)
            self.kept = TeacherReader(corpus, [main], self.view)
        if is_described(corpus.store, plan.info.name):  # a matrix of this teacher that was lost
            self._store_head()

    def make(self, unit: Unit) -> Commit | None:
        """Compute, write and commit a unit, so that a kill costs no more than one.

        None if another process has made it meanwhile: two that were started on one cache share
        the work.
        """
        if ShardSet(self.corpus.store, self.info.folder).has(unit.name):
            return None
        began = time.perf_counter()
        result = run_unit(self.teacher, self.corpus, self.view, unit, kept=self.kept)
        self._store_head()
        return write_unit(self.info, self.corpus, unit, result, began)

    def _store_head(self) -> None:
        """The matrix comes after the teacher's description, and before any unit."""
        if self.head is not None:
            claim_teacher(self.corpus, self.info)
            write_head(self.corpus.store, self.info.folder, self.head)
            self.head = None


def write_unit(
    info: TeacherInfo,
    corpus: Corpus,
    unit: Unit,
    result: UnitResult,
    began: float | None = None,
) -> Commit:
    """Write and commit one unit. ``began``: by ``time.perf_counter``, when work on it did; the
    record then says how many seconds it took until all was encoded.
    """
    shard = corpus.shard(unit.shard)
    kind = kind_of(info)
    schema = kind.schema({"shard": unit.shard, "replica": unit.replica})
    digests = [d for batch in shard.batches() for d in batch["digest"].to_pylist()]
    batches = kind.batches(schema, digests, result.rows, result.columns)
    facts = {
        "positions": len(result.rows),
        "tokens": corpus.commits[unit.shard].facts["tokens"],
        "shard": unit.shard,
        "replica": unit.replica,
        "corpus_sha256": corpus.commits[unit.shard].sha256,
    }
    # Not before there is something to write: a teacher that cannot be loaded, or says NaN, leaves
    # its name free for the corrected configuration.
    claim_teacher(corpus, info)
    shards = ShardSet(corpus.store, info.folder)
    options = None
    if kind.codec.compressed:
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=ZSTD_LEVEL))
    sums = ScalarSums()

    def late() -> dict[str, str | float]:
        spent = {} if began is None else {SECONDS: round(time.perf_counter() - began, 6)}
        return sums.facts() | spent

    return shards.write(
        unit.name, schema, sums.over(batches), facts, options, info.rows_per_batch, late
    )
