"""Removes what is damaged from a cache, so that stage 1 makes exactly that again. Runs no teacher.

A shard whose bytes do not match its commit record loses that record; a damaged small file is
removed. A teacher's description is restored from what each shard says of its teacher.
"""

import logging
from collections.abc import Collection

from rekindle.data.corpus.additions import info_name, new_addition, record_addition
from rekindle.data.corpus.config import recorded_entries
from rekindle.data.errors import CacheFormatError, naming
from rekindle.data.inventory import (
    damaged_descriptions,
    imported_teachers,
    shard_sets,
    target_folders,
)
from rekindle.data.source.source_states import find_present
from rekindle.data.storage.base import Store
from rekindle.data.storage.seal import describe_damage, seal
from rekindle.data.storage.shards import Commit, ShardSet
from rekindle.data.storage.store import LocalStore
from rekindle.data.storage.units import unit_of
from rekindle.data.targets.schema import TeacherInfo
from rekindle.pipeline.progress import Progress

log = logging.getLogger("rekindle")


def repair_cache(
    store: Store, teachers: Collection[str], check: bool | None, progress: Progress
) -> int:
    """Remove what is damaged and log it; return the number of files removed.

    Only ``teachers`` are checked: this run can make those again. ``check`` first compares every
    byte of every shard with its checksum; None does so only for a local cache, since an object
    store would have to send all of it. Without it, only damaged descriptions and commit records are
    found.
    """
    removed_count = 0
    imported = imported_teachers(store)
    teachers = {*teachers} - {*imported}
    for name, error in damaged_descriptions(store).items():
        if not _can_be_made(name, teachers):
            _log_imported(name, error, imported)
            continue
        log.warning("%s: made again", describe_damage(error).rstrip("."))
        store.discard(name)
        if name.endswith("head.safetensors"):
            store.discard(name.replace("head.safetensors", "head.json"))
        removed_count += 1
    check_all = isinstance(store, LocalStore) if check is None else check
    with progress.task("check", unit="shards") as task:
        for shards in shard_sets(store):
            if not _can_be_made(shards.folder, teachers):
                for problem in shards.survey()[1].values() if imported else ():
                    _log_imported(shards.folder, problem, imported)
                continue

            def check_bytes(commit: Commit, shards: ShardSet = shards) -> None:
                task.advance(1, bytes=commit.bytes)
                shards.check(commit)

            sound, damaged = shards.survey(check_bytes if check_all else None)
            if check_all and not damaged and (roll_up_error := shards.records.roll_up_error(sound)):
                log.warning("%s: made again", describe_damage(roll_up_error).rstrip("."))
                shards.records.forget_roll_up()
                removed_count += 1
            for unit, problem in damaged.items():
                log.warning("%s: made again", describe_damage(problem).rstrip("."))
                shards.forget(unit)
            removed_count += len(damaged)
    _restore_additions(store)
    for folder in target_folders(store):
        _restore_description(store, folder)
    return removed_count


def _log_imported(name: str, error: CacheFormatError, imported: Collection[str]) -> None:
    """Log how a damaged part of an imported teacher is made again: not here."""
    kind, _, remainder = name.partition("/")
    if kind == "targets" and remainder.partition("/")[0] in imported:
        log.warning(
            "%s: it was imported, so no model can be run for it; `pipeline import-targets` "
            "with the original rows and provenance makes it again",
            describe_damage(error).rstrip("."),
        )


def _can_be_made(name: str, teachers: Collection[str]) -> bool:
    kind, _, remainder = name.partition("/")
    return kind != "targets" or remainder.partition("/")[0] in teachers


def _restore_additions(store: Store) -> None:
    """Write missing descriptions of the corpus from what its shards say of themselves."""
    shards = ShardSet(store, "corpus")
    commits = shards.survey()[0]
    if not commits:
        return
    newest = shards.open(commits.last_commit).metadata.get("stage", 0)
    if all(store.exists(info_name(number)) for number in range(newest + 1)):
        return
    metadata_of = {int(commit.unit): shards.open(commit).metadata for commit in commits.records()}
    for number in sorted({metadata.get("stage", 0) for metadata in metadata_of.values()}):
        if store.exists(info_name(number)):
            continue
        first = min(n for n, metadata in metadata_of.items() if metadata.get("stage", 0) == number)
        if not {*range(first)} <= metadata_of.keys():
            raise CacheFormatError(
                f"{store.location}/{info_name(number)} and corpus shards before {first} are both "
                "damaged: the start of that part of the corpus is lost. Restore the cache from a "
                "copy"
            )
        rows_before = sum(commits[unit_of(n)].rows for n in range(first))
        config = metadata_of[first]["config"]
        subject = f"{store.location}/{info_name(number)} is lost; to write it again, what was read "
        with naming(f"{subject}must be where it was"):
            present = find_present(recorded_entries(config))
        addition = new_addition(config, present, number, first, rows_before)
        record_addition(store, addition, metadata_of[first]["tokenizer"])


def _restore_description(store: Store, folder: str) -> None:
    """Write a missing ``teacher.json`` from what an intact shard says of its teacher."""
    if "teacher.json" in store.names(folder):
        return
    shards = ShardSet(store, folder)
    for commit in shards.survey()[0].records():
        info = TeacherInfo.model_validate(shards.open(commit).metadata["teacher"])
        store.create(f"{folder}/teacher.json", seal(info.model_dump(mode="json")))
        return
