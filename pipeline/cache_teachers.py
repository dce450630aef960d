"""Stage 1: experts → cache. Builds the corpus and views, runs each teacher's missing units, commits
them.

Resume is plan − commits: the same command again does only what is missing. Reading and writing of
shards overlaps with the teacher's forward passes.
"""

import functools
import logging
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue

import numpy as np
import torch

from rekindle.data.cache import begin_manifest, write_manifest
from rekindle.data.corpus import Corpus, build_corpus
from rekindle.data.errors import InputError, RekindleError
from rekindle.data.shards import Commit, ShardSet
from rekindle.data.store import Store, open_store
from rekindle.data.targets import (
    TeacherInfo,
    no_positions,
    position_batches,
    sequence_batches,
    target_schema,
)
from rekindle.data.views import MaskedView, PairView, ViewReader
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.progress import Progress
from rekindle.pipeline.run_teacher import Unit, UnitResult, run_unit
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.pipeline.teachers import (
    Teacher,
    TeacherPlan,
    check_teacher,
    claim_teacher,
    plan_teacher,
)
from rekindle.train.models import cpu_count

log = logging.getLogger("rekindle")


@dataclass(frozen=True)
class StageOne:
    """What a run of stage 1 did."""

    corpus_sequences: int
    units_done: int
    units_present: int


def cache_teachers(
    config: RunConfig, only: Sequence[str] = (), workers: int = 1, progress: Progress | None = None
) -> StageOne:
    """Make the cache of ``config``, or what is missing of it.

    ``only`` limits the work to teachers of those names. Raises InputError or CacheMismatchError
    before any teacher runs if one of them cannot teach on this corpus.
    """
    progress = progress or Progress.silent()
    chosen = _chosen(config, only)
    store = open_store(config.cache.path)
    begin_manifest(store)
    corpus = _build_corpus(store, config, progress)
    views = build_views(corpus, config, progress)
    plans = [
        plan_teacher(t, corpus, views.masked, views.pairs.get(t.pairs or ""), config.cache.seed)
        for t in chosen
    ]
    for plan in plans:
        check_teacher(corpus, plan.info)
    done = present = 0
    for plan in plans:
        missing, finished = missing_units(corpus, plan.info, config.cache.replicas)
        present += finished
        done += len(missing)
        if missing:
            _run(plan, corpus, missing, workers, progress)
    write_manifest(store)
    return StageOne(len(corpus), done, present)


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


@dataclass(frozen=True)
class Views:
    """The views that the configured teachers and student need."""

    masked: MaskedView | None
    pairs: dict[str, PairView]


def build_views(corpus: Corpus, config: RunConfig, progress: Progress) -> Views:
    """Write the views the configuration asks for, or what is missing of them."""
    masked = None
    if config.needs_masks:
        if corpus.info["tokenizer"]["mask_id"] is None:
            raise InputError(
                f"{config.corpus.tokenizer} has no mask token, so nothing can be masked. A "
                "masked_lm "
                "teacher or student needs a tokenizer with one"
            )
        masked = MaskedView(corpus, config.cache.mask, config.cache.seed, config.cache.replicas)
        with progress.task("masks", unit="sequences"):
            masked.build()
    kinds = sorted({t.pairs for t in config.teachers if t.pair_expert and t.pairs})
    pairs: dict[str, PairView] = {kind: PairView(corpus, kind, config.cache.seed) for kind in kinds}
    for view in pairs.values():
        with progress.task(f"pairs ({view.kind})", unit="sequences"):
            view.build()
    return Views(masked, pairs)


def missing_units(corpus: Corpus, info: TeacherInfo, replicas: int) -> tuple[list[Unit], int]:
    """The units of a teacher that are not committed, in order, and how many are."""
    masked = info.view.startswith("masked-")
    each: Sequence[int | None] = range(replicas) if masked else [None]
    planned = [Unit(shard, replica) for replica in each for shard in range(len(corpus.commits))]
    done = ShardSet(corpus.store, f"targets/{info.name}").committed()
    missing = [unit for unit in planned if unit.name not in done]
    return missing, len(planned) - len(missing)


def _run(
    plan: TeacherPlan, corpus: Corpus, units: list[Unit], workers: int, progress: Progress
) -> None:
    rows = sum(corpus.commits[unit.shard].rows for unit in units)
    with progress.task(plan.info.name, unit="sequences", total=rows) as task:

        def report(commit: Commit) -> None:
            task.advance(commit.rows, tokens=commit.facts["tokens"], bytes=commit.bytes)

        if workers == 1:
            run_units(plan, corpus, units, report)
        else:
            _run_in_processes(plan, corpus, units, workers, report)


def run_units(
    plan: TeacherPlan, corpus: Corpus, units: list[Unit], report: Callable[[Commit], None]
) -> None:
    """Run units one after another; each is encoded and written while the next is computed."""
    teacher = Teacher(plan, corpus)
    view = view_of(plan.info, corpus)
    pending: Future[Commit] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        for unit in units:
            result = run_unit(teacher, corpus, view, unit)
            if pending is not None:
                report(pending.result())  # at most one unit waits: memory stays bounded
            pending = writer.submit(write_unit, plan.info, corpus, unit, result)
        if pending is not None:
            report(pending.result())


def view_of(info: TeacherInfo, corpus: Corpus) -> ViewReader | None:
    """The view the teacher is shown, if it is not the corpus itself."""
    stored = info.view.startswith(("masked-", "pairs-"))
    return ViewReader(corpus, info.view) if stored else None


def write_unit(info: TeacherInfo, corpus: Corpus, unit: Unit, result: UnitResult) -> Commit:
    """Write and commit one unit."""
    shard = corpus.shard(unit.shard)
    schema = target_schema(info, {"shard": unit.shard, "replica": unit.replica})
    digests = [d for i in range(shard.batch_count) for d in shard.batch(i)["digest"].to_pylist()]
    if info.kind == "sequence":
        present = np.zeros(len(digests), bool)
        present[result.rows] = True
        batches = sequence_batches(schema, digests, present, result.columns)
    else:
        columns = result.columns if len(result.rows) else no_positions(info)
        batches = position_batches(schema, digests, result.rows, columns)
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
    shards = ShardSet(corpus.store, f"targets/{info.name}")
    return shards.write(unit.name, schema, batches, facts)


# --- several processes on one machine: one per device, or as many as asked for on CPUs ---

WorkerArguments = tuple[TeacherPlan, str, int, int]  # plan, cache, workers, number of this one

_arguments: WorkerArguments | None = None


def _start_worker(plan: TeacherPlan, location: str, workers: int, numbers: "Queue[int]") -> None:
    # Nothing that can fail: an exception here would only be known as "a process was killed".
    global _arguments
    _arguments = (plan, location, workers, numbers.get())


@functools.cache
def _worker() -> tuple[Teacher, Corpus, ViewReader | None]:
    """The process's teacher, loaded at its first unit."""
    assert _arguments is not None
    plan, location, workers, number = _arguments
    torch.set_num_threads(max(1, cpu_count() // workers))
    corpus = Corpus(open_store(location))
    return Teacher(plan, corpus, number), corpus, view_of(plan.info, corpus)


def _work(unit: Unit) -> Commit:
    teacher, corpus, view = _worker()
    return write_unit(teacher.info, corpus, unit, run_unit(teacher, corpus, view, unit))


def _run_in_processes(
    plan: TeacherPlan,
    corpus: Corpus,
    units: list[Unit],
    workers: int,
    report: Callable[[Commit], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    pool = ProcessPoolExecutor(
        max_workers=workers,
        mp_context=context,
        initializer=_start_worker,
        initargs=(plan, corpus.store.location, workers, numbers),
    )
    try:
        for future in as_completed([pool.submit(_work, unit) for unit in units]):
            report(future.result())
    except BrokenProcessPool:
        raise RekindleError(
            f"a worker process of teacher {plan.info.name!r} was killed (out of memory?). Finished "
            "shards are kept; run the same command again to go on, with fewer --workers if need be"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
