"""Stage 1: experts → cache. Builds the corpus and views, runs each teacher's missing units, and
commits them.

Resume is plan − commits: the same command run again makes only what is missing. For several
processes that share the units of one cache, see ``make_unit``.
"""

import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rekindle.data.cache import write_manifest
from rekindle.data.corpus.additions import recorded_shard_size
from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.corpus.packing import default_shard_size
from rekindle.data.corpus.remarks import remarks
from rekindle.data.corpus.source_sample import estimate_sequences
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.hub.places import is_hub
from rekindle.data.inventory import roll_up_records
from rekindle.data.journal import adding, refuse_changing, refuse_renamed
from rekindle.data.storage.base import Store
from rekindle.data.storage.manifest import WITHOUT_TEXT, begin_manifest
from rekindle.data.storage.object_store import refuse_unconditional
from rekindle.data.storage.seal import seal
from rekindle.data.storage.shards import Commit, ShardSet
from rekindle.data.storage.store import LocalStore, open_store
from rekindle.data.targets.head import HEAD_FILES
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.cut import truncation_of
from rekindle.data.targets.reading.part import COMPLETE_FILE
from rekindle.data.targets.reading.stored import stored_error
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.registry import view_kind
from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.caching.compute_unit import Unit
from rekindle.pipeline.caching.extensions import plan_parts
from rekindle.pipeline.caching.first_checks import check_files, rehearse
from rekindle.pipeline.caching.hard_view import build_hard_masks, hard_view, masks_last
from rekindle.pipeline.caching.make_unit import Loader
from rekindle.pipeline.caching.repair import repair_cache
from rekindle.pipeline.caching.shared_pass import Group, describe_shared_pass, group_by_pass
from rekindle.pipeline.caching.teachers import TeacherPlan, plan_teacher, slow_pass_warning
from rekindle.pipeline.caching.views import build_views, few_pairs_warnings
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.processes.units import Executor, OnThisMachine, Work
from rekindle.pipeline.progress import SILENT, Progress
from rekindle.train.interrupts import reporting_interrupts
from rekindle.train.order.domains import check_domains
from rekindle.train.order.sequences import describe_too_few
from rekindle.train.record.disk_room import DiskRoom
from rekindle.train.running_out import report_shortage

log = logging.getLogger("rekindle")

ARRIVES_WITHIN = 60.0  # seconds: network file systems refresh only now and then


@dataclass(frozen=True)
class StageOne:
    """What a run of stage 1 did."""

    corpus_sequences: int
    units_done: int  # by this process and its workers
    units_present: int
    repaired: int = 0  # damaged files made again
    units_of_others: int = 0  # made by other processes meanwhile

    def as_text(self) -> str:
        """Return what was done, in one line."""
        summary = (
            f"{counted(self.corpus_sequences, 'sequence')}; "
            f"{counted(self.units_done, 'unit')} made, {self.units_present} were there "
            "(unit: a teacher's file)"
        )
        if self.units_of_others:
            summary += f", {self.units_of_others} were made by other processes meanwhile"
        if not self.repaired:
            return summary
        removed = f"{counted(self.repaired, 'damaged file')} removed"
        return f"{summary}, {removed}, and made again where in use"


def cache_teachers(
    config: RunConfig,
    only: Sequence[str] = (),
    executor: Executor | None = None,
    progress: Progress = SILENT,
    check: bool | None = None,
) -> StageOne:
    """Make the cache of ``config``, or its missing and damaged parts.

    ``only`` limits the work to the teachers of those names; ``executor`` runs them (None: this
    process); ``check`` is passed to ``repair_cache``. Raises InputError before anything is written
    for errors that show in the files of the teachers and of the student, or in a new corpus's first
    sequences; InputError or CacheMismatchError before any teacher runs if one of them cannot teach
    on this corpus.
    """
    config.check_single()
    config.check_samples()
    if is_hub(config.cache.path):
        refuse_unconditional(config.cache.path)
    chosen = config.teachers_named(only)
    check_files(chosen, config.student)
    make_missing(config)
    store = open_store(config.cache.path)
    refuse_changing(store)
    made_counts: Counter[str] = Counter()  # shards of the corpus, and units by teacher
    with reporting_interrupts(lambda: _describe_work(made_counts, store)):
        rehearse(config, chosen, store)
    with (
        reporting_interrupts(lambda: _describe_work(made_counts, store)),
        adding(store) as is_alone,
    ):
        # Only the first process repairs; later ones skip it.
        repaired = 0
        if is_alone is False:
            log.info("another process works on %s: the work is shared", store.location)
        else:
            repaired = repair_cache(store, [t.name for t in chosen], check, progress)
        begin_manifest(store)
        if is_alone is not False:  # nobody takes records back meanwhile
            roll_up_records(store)
        corpus = _build_corpus(store, config, executor or OnThisMachine(), progress, made_counts)
        if store.exists(WITHOUT_TEXT):  # it was passed on so, and is whole now
            store.discard(WITHOUT_TEXT)
        for line in remarks(corpus):
            log.info("corpus: %s", line)
        views = build_views(corpus, config, progress)
        for line in few_pairs_warnings(corpus, views, chosen):
            log.warning("%s", line)
        if config.student is not None:
            for line in describe_too_few(config.train, len(corpus)):
                log.warning("%s", line)
        hard_masks = hard_view(corpus, config)
        views = replace(views, masked=hard_masks or views.masked)
        for teacher in chosen:
            if teacher.domains is not None:
                check_domains(corpus, teacher.domains, f"teacher {teacher.name!r}: domains")
        plans = [plan_teacher(teacher, corpus, views, config.cache.seed) for teacher in chosen]
        refuse_renamed(store, [plan.info for plan in plans])
        parts = [part for plan in plans for part in plan_parts(corpus, plan)]
        before_masks, after_masks = masks_last(parts, hard_masks)
        _warn_of_slow(parts, corpus, config.cache.masked_replicas)
        missing_total = present_total = 0
        is_local = isinstance(store, LocalStore)
        disk_room = DiskRoom(Path(store.location) if is_local else None, "unit")
        for group in (*group_by_pass(before_masks), *group_by_pass(after_masks)):
            if hard_masks and group[0] in after_masks:
                build_hard_masks(hard_masks, True, progress)
            replicas = config.cache.masked_replicas
            to_make: list[tuple[TeacherPlan, list[Unit]]] = []
            for part in group:
                info = part.info
                missing, finished = missing_units(corpus, info.folder, info.view, replicas)
                present_total += finished
                missing_total += len(missing)
                if missing or _lacks_head(info, store):
                    to_make.append((part, missing))
            if to_make:
                units = list(dict.fromkeys(unit for _, missing in to_make for unit in missing))
                if not is_alone:  # in step with another process, both would make every unit
                    random.shuffle(units)
                memory_guard = report_shortage(
                    Path(store.location),
                    lambda: f"This call: {_describe_work(made_counts, store)[0]}",
                    _memory_advice(group[0]),
                )
                with memory_guard:
                    _run_group(
                        to_make,
                        corpus,
                        units,
                        executor or OnThisMachine(),
                        progress,
                        made_counts,
                        disk_room,
                    )
            for part in group:
                if not part.config.vocabulary:
                    _log_kept(corpus, part.info)
                if part.info.part:
                    store.create(f"{part.info.folder}/{COMPLETE_FILE}", seal({}))
        if hard_masks:
            build_hard_masks(hard_masks, False, progress)
        if is_alone is not False:
            roll_up_records(store)
        write_manifest(store)
    done = made_counts.total() - made_counts["corpus"]
    return StageOne(len(corpus), done, present_total, repaired, missing_total - done)


def _describe_work(made_counts: Counter[str], store: Store) -> tuple[str, bool]:
    """Return what an interrupt leaves of this call's work, and whether there is anything to
    continue from.
    """
    if not made_counts:
        return "no file was finished", bool(store.names("corpus/commits"))
    described = (
        [f"{counted(made_counts['corpus'], 'file')} of the corpus"] if made_counts["corpus"] else []
    )
    described += [
        f"{counted(n, 'file')} of {name}" for name, n in made_counts.items() if name != "corpus"
    ]
    return f"made and kept: {', '.join(described)}", True


def _build_corpus(
    store: Store,
    config: RunConfig,
    executor: Executor,
    progress: Progress,
    made_counts: Counter[str],
) -> Corpus:
    """Return the corpus. The shard size is the configuration's, else the cache's, else one that
    suits the corpus.
    """
    known_size = config.cache.sequences_per_shard or recorded_shard_size(store)
    skip_estimate = store.names("corpus") or (known_size and not progress.is_shown)
    total = None if skip_estimate else _about_sequences(config.corpus)
    with progress.task("corpus", unit="sequences", total=total) as task:

        def shard_done(rows: int, tokens: int) -> None:
            made_counts["corpus"] += 1
            task.advance(rows, tokens=tokens)

        size = known_size or default_shard_size(total)
        if not known_size:
            log.info(
                "corpus: %s per shard, a file (cache.sequences_per_shard)",
                counted(size, "sequence"),
            )
        in_order = partial(executor.in_order, "corpus")
        return build_corpus(store, config.corpus, size, shard_done, in_order=in_order)


def _warn_of_slow(parts: Sequence[TeacherPlan], corpus: Corpus, replicas: int) -> None:
    """Log, before any teacher runs, which teachers are slow on this device."""
    parts_with_work = {
        part.info.name: part
        for part in parts
        if missing_units(corpus, part.info.folder, part.info.view, replicas)[0]
    }
    for part in parts_with_work.values():
        if warning := slow_pass_warning(part, corpus):
            log.warning("%s", warning)


def _about_sequences(config: CorpusConfig) -> int | None:
    """Return about how many sequences the corpus has, None if unknown. Errors of the source are
    raised when it is read.
    """
    with suppress(InputError):
        return estimate_sequences(config, load_tokenizer(config.tokenizer))
    return None


def _lacks_head(info: TeacherInfo, store: Store) -> bool:
    """Return whether a matrix that belongs beside the targets is missing."""
    return kind_of(info).has_head and not {*HEAD_FILES} <= {*store.names(info.folder)}


def _log_kept(corpus: Corpus, info: TeacherInfo) -> None:
    commits = ShardSet(corpus.store, info.folder).committed()
    if cut := truncation_of(info, commits):
        log.warning("%s", cut.as_text(f"teacher {info.name}"))
    if (stored := stored_error(commits)) is not None:
        log.info("%s", stored.as_text(info))


def missing_units(corpus: Corpus, folder: str, view: str, replicas: int) -> tuple[list[Unit], int]:
    """Return the units of a folder that are not committed, in order, and the number of those that
    are.

    They are the units of the view itself, or of a teacher that is shown it.
    """
    replica_numbers, shards = view_kind(view).numbers(replicas), len(corpus.commits)
    commits = ShardSet(corpus.store, folder).committed()
    missing = [Unit(*place) for place in commits.missing_units(shards, replica_numbers)]
    return missing, len(replica_numbers) * shards - len(missing)


def _run_group(
    to_make: list[tuple[TeacherPlan, list[Unit]]],
    corpus: Corpus,
    units: list[Unit],
    executor: Executor,
    progress: Progress,
    made_counts: Counter[str],
    disk_room: DiskRoom,
) -> None:
    """Make the missing ``units``, in that order, of teachers that share their passes."""
    group = tuple(part for part, _ in to_make)
    shard_rows = corpus.commits_by_unit.rows
    rows = sum(int(shard_rows[unit.shard]) for _, missing in to_make for unit in missing)
    name = ", ".join(f"{part.info.name} {part.info.part}".strip() for part in group)
    if sum(map(bool, (missing for _, missing in to_make))) > 1:
        log.info("%s", describe_shared_pass(group))
    for part in group:
        if executor.on_other_machines and part.config.precision == "auto" and not part.info.served:
            log.info(
                "teacher %s: precision auto is %s, by this machine",
                part.info.name,
                part.info.precision,
            )
    maskings = len({unit.replica for unit in units})
    name += f", {maskings} maskings" if maskings > 1 else ""
    disk_room.remaining = len(units)
    with progress.task(name, unit="sequences", total=rows) as task:

        def report(commits: dict[str, Commit]) -> None:
            for teacher, commit in commits.items():
                if executor.on_other_machines:
                    _check_arrived(corpus.store, folders[teacher], commit.unit)
                made_counts[teacher] += 1
                task.advance(commit.rows, tokens=commit.facts["tokens"], bytes=commit.bytes)
            disk_room.after(sum(commit.bytes for commit in commits.values()))

        folders = {part.info.name: part.info.folder for part in group}
        names = " and ".join(f"teacher {name!r}" for name in folders)
        executor.run(Work(names, Loader(group, corpus), units, *_resources_of(group)), report)
    if executor.on_other_machines:  # including what a node found already made
        for part, missing in to_make:
            committed = {*corpus.store.names(f"{part.info.folder}/commits")}
            for unit in (unit.name for unit in missing if f"{unit.name}.json" not in committed):
                _check_arrived(corpus.store, part.info.folder, unit)


def _check_arrived(store: Store, folder: str, unit: str) -> None:
    """Raise InputError if another machine's commit does not show up here within
    ARRIVES_WITHIN s.
    """
    deadline = time.monotonic() + ARRIVES_WITHIN
    while not ShardSet(store, folder).has(unit):
        if time.monotonic() > deadline:
            raise InputError(
                f"a node has made unit {unit} of {folder}, or found it made, but this process "
                f"does not see it in {store.location}: that folder is not shared with the "
                "node. Give cache.path a folder that all nodes share, or an object store (s3://…)"
            )
        time.sleep(0.2)


def _resources_of(group: Group) -> tuple[dict[str, float], dict[str, float]]:
    """Return the resources that the most demanding of teachers with a common model needs of a
    cluster's machine, and the longest of their time limits.
    """
    needs, time_limits = dict[str, float](), dict[str, float]()
    for part in group:
        resources = part.config.resources
        for largest, values in (
            (needs, resources.ray_resources()),
            (time_limits, resources.time_limits()),
        ):
            for name, amount in values.items():
                largest[name] = max(amount, largest.get(name, 0))
    return needs, time_limits


def _memory_advice(plan: TeacherPlan) -> str:
    return (
        f"Teacher {plan.info.name!r} itself does not fit: set its precision to bf16 (now "
        f"{plan.info.precision}; fp16 on older devices), give it fewer --workers beside it, or "
        "take a smaller one"
    )
