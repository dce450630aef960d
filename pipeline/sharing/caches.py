"""Make the files of a cache that are sent: a copy without paths of this machine, and its card."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rekindle.data.cache import Cache
from rekindle.data.changes.listed import teachers_of
from rekindle.data.counted import counted, shown_bytes
from rekindle.data.errors import CacheFormatError, InputError, did_you_mean
from rekindle.data.inventory import damaged_descriptions, lost_descriptions, roll_up_records
from rekindle.data.journal import refuse_changing
from rekindle.data.sharing.card import CARD, cache_card, licence_of
from rekindle.data.sharing.copy import copy_for_others, files_of
from rekindle.data.sharing.text import readable_share, reveals_text
from rekindle.data.storage.manifest import (
    MANIFEST,
    WITHOUT_TEXT,
    begin_manifest,
    read_manifest,
)
from rekindle.data.storage.seal import VERSION, describe_damage, seal
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.pipeline.progress import Progress

WITH_TEXT, WITH_READABLE, ONLY_TEACHER = (
    "--with-text",
    "--with-readable-targets",
    "--teacher",
)


@dataclass(frozen=True)
class CacheFiles:
    """The files by their names in the repository, and messages for the user."""

    files: dict[str, Path | bytes]
    fingerprints: frozenset[str]  # of the corpus, now and before it grew
    messages: list[str] = field(default_factory=list)


@contextmanager
def cache_files(
    place: str,
    address: str,
    requested: Sequence[str],
    *,
    with_text: bool,
    with_readable_targets: bool,
    progress: Progress,
    connect: Callable[[], object],
) -> Iterator[CacheFiles]:
    """Yield the files of the cache at ``place``, as they are sent to ``address``; they are removed
    afterwards.

    ``requested``: the teachers to send (empty: all that may be sent); ``with_readable_targets``:
    also teachers from whose targets the text can be read; ``connect`` is called before the copy,
    which takes long. Raise InputError for an unfinished cache and if there is nothing to send;
    CacheError for a damaged cache.
    """
    cache = Cache.open(place)
    refuse_changing(cache.store)
    _refuse_damaged(cache)
    chosen, messages = _choose_teachers(cache, requested, with_text, with_readable_targets)
    _refuse_unfinished(cache, chosen, place)
    connect()
    with (
        cache.store.reading(),
        tempfile.TemporaryDirectory(prefix="rekindle-push-") as folder,
    ):
        _check_room(cache, chosen, with_text, Path(folder))
        with progress.task("copy", unit="shards") as task:
            copy = copy_for_others(
                *(cache.corpus, chosen, Path(folder), with_text),
                lambda commit: task.advance(1, bytes=commit.bytes),
            )
        begin_manifest(copy)
        roll_up_records(copy)
        version = max(cache.manifest[VERSION], read_manifest(copy)[VERSION])
        copied_cache = Cache(copy)
        copy.replace(MANIFEST, seal(copied_cache.rolled_up, version))
        corpus = copied_cache.corpus
        card = cache_card(
            *(corpus, copied_cache.teachers, version),
            address=address,
            with_text=with_text,
            before=_card_before(cache),
        )
        if licence_of(card) is None:
            messages.append(_no_licence(place))
        files: dict[str, Path | bytes] = {**files_of(copy), CARD: card.encode()}
        fingerprints = frozenset([corpus.fingerprint, *corpus.fingerprints_before])
        yield CacheFiles(files, fingerprints, messages)


def _no_licence(place: str) -> str:
    return (
        f"its card names no licence: put `license: …` into the block at the top of {place}/{CARD}, "
        "where it stays, and send it again"
    )


def _card_before(cache: Cache) -> str:
    try:
        return cache.store.read_bytes(CARD).decode()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def _refuse_damaged(cache: Cache) -> None:
    """Raise CacheFormatError for a damaged or missing small file; shards are checked as they are
    copied.
    """
    faults = damaged_descriptions(cache.store) | lost_descriptions(cache.store)
    if faults:
        first = describe_damage(next(iter(faults.values()))).rstrip(".")
        raise CacheFormatError(
            f"{first}. Nothing was sent: `pipeline verify` names all damaged files, and `pipeline "
            "cache-teachers` makes them again"
        )


def _refuse_unfinished(cache: Cache, chosen: Sequence[str], place: str) -> None:
    if not cache.corpus.complete:
        raise InputError(
            f"{place}: its text was not read to the end. `pipeline cache-teachers` goes on; "
            "nothing was sent"
        )
    if not cache.corpus.commits:
        raise InputError(f"{place} holds no text; nothing was sent")
    if cache.store.exists(WITHOUT_TEXT):
        raise InputError(
            f"{place} was passed on without its text. Make it whole first (its README.md says "
            "how); nothing was sent"
        )
    teachers = {one.name for one in teachers_of(cache) if one.units < one.units_planned}
    if unfinished := sorted(teachers & {*chosen}):
        shares = ", ".join(f"{name} ({cache.teachers[name].coverage:.1%})" for name in unfinished)
        raise InputError(
            f"{place} is not finished: {shares}. `pipeline cache-teachers` goes on, or name the "
            f"teachers to send with {ONLY_TEACHER}; nothing was sent"
        )


def _choose_teachers(
    cache: Cache, requested: Sequence[str], with_text: bool, with_readable_targets: bool
) -> tuple[list[str], list[str]]:
    """Return the teachers that are sent, and messages about the others and the text."""
    place, messages = cache.store.location, list[str]()
    for name in requested:
        if name not in cache.teachers:
            known = ", ".join(cache.teachers)
            raise InputError(
                f"{place} has no teacher {name!r} (it has: {known})"
                f"{did_you_mean(name, cache.teachers)}"
            )
    readers = {
        name: teacher
        for name, teacher in cache.teachers.items()
        if not requested or name in requested
    }
    if not readers:
        raise InputError(f"{place} has no teachers: there is nothing to send")
    readable = [
        name
        for name, teacher in readers.items()
        if reveals_text(teacher) and not with_readable_targets
    ]
    chosen = [name for name in readers if name not in readable]
    if readable:
        reasons = "; ".join(_describe_readable(name, readers[name]) for name in readable)
        ways = (
            f"Send them with {WITH_READABLE}, or the text itself with {WITH_TEXT} (docs/sharing.md)"
        )
        if not chosen or {*requested} & {*readable}:
            raise InputError(
                f"{place}: nothing was sent, for the text can be read from {reasons}. {ways}"
            )
        messages.append(f"left out, for the text can be read from them: {reasons}. {ways}")
    if not with_text:
        messages.append(
            "the text is not sent: the card says how somebody with the same text makes the cache "
            "whole"
        )
    return chosen, messages


def _describe_readable(name: str, teacher: TeacherReader) -> str:
    share = readable_share(teacher)
    if share is None:
        return f"{name} ({teacher.info.task}: its values tell it)"
    return f"{name} ({teacher.info.task}: {share:.0%} of its positions name the token there)"


def _check_room(cache: Cache, chosen: Sequence[str], with_text: bool, folder: Path) -> None:
    """Raise InputError if the disk has no room for the copy."""
    needed = sum(cache.teachers[name].bytes_on_disk for name in chosen)
    needed += cache.corpus.commits_by_unit.bytes
    needed += sum(view.commits.bytes for view in cache.views.values()) if with_text else 0
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the copy without paths of this machine ({counted(len(chosen), 'teacher')}) takes "
            f"{shown_bytes(needed)} in {folder.parent}, which has {shown_bytes(free)} free; name a "
            "folder on another disk with TMPDIR. Nothing was sent"
        )
