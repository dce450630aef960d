"""The files of a cache that are sent: a copy that says nothing of this machine, with its card."""

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

WITH_TEXT, READABLE, ONE = "--with-text", "--with-readable-targets", "--teacher"


@dataclass(frozen=True)
class CacheFiles:
    """The files by their names in the repository, what is said of them, whose text it is."""

    files: dict[str, Path | bytes]
    fingerprints: frozenset[str]  # that the corpus has, and had before it grew
    told: list[str] = field(default_factory=list)


@contextmanager
def cache_files(
    place: str,
    address: str,
    only: Sequence[str],
    *,
    with_text: bool,
    readable: bool,
    progress: Progress,
    ready: Callable[[], object],
) -> Iterator[CacheFiles]:
    """The files of the cache at ``place``, for ``address``, as long as they are needed.

    ``only``: the teachers that are sent (none: all that may be); ``readable``: also those from
    whose targets the text can be read; ``ready`` is called before the copy, which takes long.
    Raises InputError for a cache that is not finished, and where there is nothing to send;
    CacheError for a damaged one.
    """
    cache = Cache.open(place)
    refuse_changing(cache.store)
    _refuse_damaged(cache)
    chosen, told = _chosen(cache, only, with_text, readable)
    _refuse_unfinished(cache, chosen, place)
    ready()
    with cache.store.reading(), tempfile.TemporaryDirectory(prefix="rekindle-push-") as folder:
        _check_room(cache, chosen, with_text, Path(folder))
        with progress.task("copy", unit="shards") as task:
            made = copy_for_others(
                *(cache.corpus, chosen, Path(folder), with_text),
                lambda commit: task.advance(1, bytes=commit.bytes),
            )
        begin_manifest(made)
        roll_up_records(made)
        version = max(cache.manifest[VERSION], read_manifest(made)[VERSION])
        copied = Cache(made)
        made.replace(MANIFEST, seal(copied.rolled_up, version))
        before = _card_before(cache)
        card = cache_card(
            *(copied.corpus, copied.teachers, version),
            address=address,
            with_text=with_text,
            before=before,
        )
        if licence_of(card) is None:
            told.append(_no_licence(place))
        files: dict[str, Path | bytes] = {**files_of(made), CARD: card.encode()}
        had = frozenset([copied.corpus.fingerprint, *copied.corpus.fingerprints_before])
        yield CacheFiles(files, had, told)


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
    """Of the small files; those of the shards' bytes are found when they are copied."""
    wrong = damaged_descriptions(cache.store) | lost_descriptions(cache.store)
    if wrong:
        first = describe_damage(next(iter(wrong.values()))).rstrip(".")
        raise CacheFormatError(
            f"{first}. Nothing was sent: `pipeline verify` names all that is damaged, `pipeline "
            "cache-teachers` makes it anew"
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
    left = {one.name for one in teachers_of(cache) if one.units < one.units_planned}
    if missing := sorted(left & {*chosen}):
        told = ", ".join(f"{name} ({cache.teachers[name].coverage:.1%})" for name in missing)
        raise InputError(
            f"{place} is not finished: {told}. `pipeline cache-teachers` goes on, or name those "
            f"that are to be sent with {ONE}; nothing was sent"
        )


def _chosen(
    cache: Cache, only: Sequence[str], with_text: bool, readable: bool
) -> tuple[list[str], list[str]]:
    """The teachers that are sent, and what is said of the others."""
    place, told = cache.store.location, list[str]()
    for name in only:
        if name not in cache.teachers:
            known = ", ".join(cache.teachers)
            raise InputError(
                f"{place} has no teacher {name!r} (it has: {known})"
                f"{did_you_mean(name, cache.teachers)}"
            )
    wanted = [name for name in cache.teachers if not only or name in only]
    if not wanted:
        raise InputError(f"{place} has no teachers: there is nothing to send")
    given = {name: cache.teachers[name] for name in wanted}
    telling = {name: one for name, one in given.items() if reveals_text(one) and not readable}
    chosen = [name for name in wanted if name not in telling]
    if telling:
        why = "; ".join(_why(name, teacher) for name, teacher in telling.items())
        ways = f"Send them with {READABLE}, or the text itself with {WITH_TEXT} (docs/sharing.md)"
        if not chosen or {*only} & {*telling}:
            raise InputError(f"{place}: nothing was sent, for the text can be read: {why}. {ways}")
        told.append(f"left out, for the text can be read from them: {why}. {ways}")
    if not with_text:
        told.append(
            "the text is not sent: its card says how who has the same text makes the cache whole"
        )
    return chosen, told


def _why(name: str, teacher: TeacherReader) -> str:
    share = readable_share(teacher)
    if share is None:
        return f"{name} ({teacher.info.task}: its values tell it)"
    return f"{name} ({teacher.info.task}: {share:.0%} of its positions name the token there)"


def _check_room(cache: Cache, chosen: Sequence[str], with_text: bool, folder: Path) -> None:
    """InputError where the copy has no room."""
    needed = sum(cache.teachers[name].bytes_on_disk for name in chosen)
    needed += cache.corpus.units.bytes
    needed += sum(view.commits.bytes for view in cache.views.values()) if with_text else 0
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"a copy that says nothing of this machine takes {shown_bytes(needed)} in "
            f"{folder.parent}, which has {shown_bytes(free)} free; name a folder on another disk "
            f"with TMPDIR ({counted(len(chosen), 'teacher')}). Nothing was sent"
        )
