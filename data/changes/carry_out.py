"""Remove, rename or transcode a teacher of a cache, safely even if killed at any moment.

``data/journal.py`` defines the phases, and what readers see meanwhile. Works on local caches and on
those in object stores, which have no locks: there the caller makes sure that nothing else uses the
cache.
"""

import logging
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy

from rekindle.data.cache import Cache
from rekindle.data.changes.copying import Done, copy_units
from rekindle.data.changes.record_batches import rows_of_codec
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.counted import shown_bytes
from rekindle.data.errors import CacheError, InputError, did_you_mean, naming, unusable
from rekindle.data.inventory import orphans, roll_up_records, target_folders
from rekindle.data.journal import (
    Action,
    Change,
    Journal,
    describe_unfinished,
    journal_in,
    read_journal,
    write_journal,
)
from rekindle.data.roll_up import ROLLED_UP
from rekindle.data.settings import Settings, parse_settings
from rekindle.data.sharing.card import write_card
from rekindle.data.storage.base import NEXT_FOLDER, Overlay, Store
from rekindle.data.storage.manifest import MANIFEST, read_manifest
from rekindle.data.storage.seal import FORMAT_VERSION, VERSION, seal
from rekindle.data.storage.shards import ShardSet
from rekindle.data.targets.head import HEAD_FILES, read_head
from rekindle.data.targets.kinds.registry import KINDS, kind_of
from rekindle.data.targets.reading.files import has_files, read_parts
from rekindle.data.targets.reading.part import COMPLETE_FILE
from rekindle.data.targets.schema import TEACHER_NAME, TeacherInfo, TeacherName

log = logging.getLogger("rekindle")


class NewName(Settings):
    """A teacher's new name."""

    to: TeacherName


ChangeRequest = tuple[Action, str, str | None]  # the action, the teacher, and the goal
SAME_INTEGERS = ("default", "compact")  # codecs


def change_teacher(
    store: Store,
    action: Action,
    teacher: str,
    to: str | None = None,
    begin: Callable[[Change], object] = lambda change: None,
    done: Done = lambda commit: None,
) -> bool:
    """Carry out a change, or the rest of it; return False if it was done before.

    ``begin`` is called with a new change before anything is written, and may raise; ``done`` with
    each copied unit. Raises InputError, with the reason, for what cannot be done, and while others
    use the cache; CacheError if what is to be copied is damaged.
    """
    with store.changing():
        manifest = read_manifest(store)
        journal = journal_in(manifest, store)
        change = journal.change
        if change is not None and (change.action, action) == ("transcode", "remove"):
            # This ends it, whatever became of the copies.
            change = None if change.teacher == teacher else change
        if change is not None and change.request != (action, teacher, to):
            raise InputError(f"{store.location}: {describe_unfinished(change, store)}")
        if change is None:
            version = journal.change.version if journal.change else manifest[VERSION]
            change = _plan_change(store, journal, version, (action, teacher, to))
            if change is None:
                return False
            begin(change)
            _check_room(store, change)
            write_journal(store, journal.model_copy(update={"change": change}))
        else:
            log.info("%s: continuing: %s", store.location, change.describe())
        _carry_out(store, change, done)
        return True


def size_of(store: Store, teacher: str) -> tuple[int, int]:
    """Return the bytes and units of a teacher's sound shards, with its extensions, and the bytes of
    the files beside them.
    """
    total, units = 0, 0
    for folder in target_folders(store):
        if folder.split("/")[1] == teacher:
            commits = ShardSet(store, folder).survey()[0]
            units += len(commits)
            total += commits.bytes
            others = store.names(folder)
            total += sum(store.state(f"{folder}/{name}")[0] for name in others)
    return total, units


def finish_interrupted(store: Store) -> None:
    """Settle what a killed process left of a change: undo it if nobody has seen any of it,
    otherwise carry it out.
    """
    with store.changing():
        change = read_journal(store).change
        if change is not None and change.phase == "making":
            _abandon(store, change)
        elif change is not None:
            _carry_out(store, change, lambda commit: None)


# --- what can be done -----------------------------------------------------------------------------


def _plan_change(
    store: Store, journal: Journal, version: int, request: ChangeRequest
) -> Change | None:
    """Return the requested change of a cache of that version; None if it was done before."""
    action, teacher, to = request
    present = [name for name in store.folders("targets") if has_files(store, name)]
    if teacher not in present:
        current = journal.current_name(teacher, present)
        removed = action == "remove" and teacher in journal.removed
        if removed or (action == "rename" and current is not None and current == to):
            return None
        raise InputError(_describe_unknown(store, teacher, present, current))
    if not re.fullmatch(TEACHER_NAME, teacher):
        raise InputError(
            f"{store.location}/targets/{teacher} has a name that no teacher can have: remove "
            "it by hand"
        )
    if action == "remove":
        return _new_change(action, teacher, None, version)
    assert to is not None
    if version == 1:
        raise InputError(
            f"{store.location} has cache format 1, which does not fit what is to be written: run "
            "`pipeline cache-teachers` with its run file once, which raises the format. "
            "(--remove works)"
        )
    version = max(version, FORMAT_VERSION)
    if action == "rename":
        _check_name(store, teacher, to, present)
        return _new_change(action, teacher, to, version)
    sets = tuple(info.folder for info in to_transcode(read_parts(store, teacher), to))
    if not sets:
        return None
    return _new_change(action, teacher, to, version, sets)


def _new_change(
    action: Action, teacher: str, to: str | None, version: int, sets: tuple[str, ...] = ()
) -> Change:
    values = {"action": action, "teacher": teacher, "to": to, "version": version, "sets": sets}
    return parse_settings(Change, values)


def _describe_unknown(store: Store, teacher: str, present: list[str], current: str | None) -> str:
    known = ", ".join(present) or "none"
    hint = (
        f"; {teacher!r} was renamed to {current!r}" if current else did_you_mean(teacher, present)
    )
    return f"{store.location} has no teacher {teacher!r} (it has: {known}){hint}"


def _check_name(store: Store, teacher: str, to: str, present: list[str]) -> None:
    if to == teacher:
        raise InputError(f"teacher {teacher!r} is already called {to!r}; give another name")
    with naming(f"--rename {teacher} {to}"):
        parse_settings(NewName, {"to": to})
    # on file systems that ignore case, the list has only one of them
    if to in present or has_files(store, to):
        raise InputError(
            f"{store.location} already has a teacher {to!r}: give another name, or remove that "
            f"one first (`pipeline teachers {store.location} --remove {to}`)"
        )


def to_transcode(parts: list[TeacherInfo], codec: str) -> list[TeacherInfo]:
    """Return the parts of a teacher that must be rearranged; raise InputError if none can be."""
    name, able = parts[0].name, [part for part in parts if len(kind_of(part).codecs) > 1]
    able = [part for part in able if part.kind != "tails"]  # equally small in either codec
    if codec not in SAME_INTEGERS:
        raise InputError(
            f"--transcode {name} {codec}: a teacher is transcoded to "
            f"{' or '.join(SAME_INTEGERS)}, which are two arrangements of the same integers. What "
            "another codec stores is not there: cache the teacher with it under another name"
        )
    if not able:
        fitting_kinds = " and ".join(kind for kind in KINDS if "compact" in KINDS[kind].codecs)
        raise InputError(
            f"teacher {name!r} keeps {kind_of(parts[0]).description} ({parts[0].kind}): compact is "
            f"only a codec for {fitting_kinds}"
        )
    if any(part.codec not in SAME_INTEGERS for part in able):
        raise InputError(
            f"teacher {name!r} has the codec precise: {codec} would lose precision for good. "
            f"Cache it with targets.codec: {codec} under another name"
        )
    parts_to_change = [part for part in able if part.codec != codec]
    for part in parts_to_change:
        if contradiction := kind_of(part.model_copy(update={"codec": codec})).contradiction():
            raise InputError(
                f"teacher {name!r} cannot have the codec {codec}: {contradiction} (a vocabulary of "
                f"{part.vocabulary_size:,} tokens)"
            )
    return parts_to_change


# --- the phases -----------------------------------------------------------------------------------


def _carry_out(store: Store, change: Change, done: Done) -> None:
    if change.phase == "making":
        try:
            for info in _parts_to_copy(store, change):
                _copy_part(store, change, info, done)
        except CacheError:  # whoever makes the damaged part must repair it first
            _abandon(store, change)
            raise
        except InputError as error:  # a full disk, a server that is away
            place = shlex.quote(store.location)
            raise InputError(
                f"{str(error).rstrip('.')}; `pipeline gc {place} --older-than 0` abandons it"
            ) from error
        change = change.model_copy(
            update={"phase": "placing" if change.action == "transcode" else "clearing"}
        )
        write_journal(store, read_journal(store).after(change))
    if change.phase == "placing":
        for folder in change.sets:
            _replace_records(store, change, folder)
        change = change.model_copy(update={"phase": "clearing"})
        write_journal(store, read_journal(store).model_copy(update={"change": change}))
    for folder in change.sets:
        _remove_orphans(store, folder)
        store.remove_folder(f"{folder}/{NEXT_FOLDER}")
    if change.action != "transcode":
        store.remove_folder(f"targets/{change.teacher}")
    _finish(store, change)
    if change.action != "remove":
        roll_up_records(store)


def _parts_to_copy(store: Store, change: Change) -> Iterator[TeacherInfo]:
    """Yield the parts to copy."""
    if change.action == "remove":
        return
    for info in read_parts(store, change.teacher):
        if change.action == "rename" or info.folder in change.sets:
            yield info


def _changed_fields(corpus: Corpus, change: Change, info: TeacherInfo) -> dict[str, object]:
    """Return the fields of a part that differ in its copy."""
    if change.action == "rename":
        return {"name": change.to}
    return {"codec": change.to, "rows_per_batch": rows_of_codec(corpus, info, str(change.to))}


def _copy_store(store: Store, change: Change) -> Store:
    """Return the store as it is written to while the copy is made."""
    made = copy(store)
    made.overlay = Overlay(replaced=change.sets)
    return made


def _copy_part(store: Store, change: Change, info: TeacherInfo, done: Done) -> None:
    """Make what is missing of the copy of a part."""
    target, corpus = _copy_store(store, change), Corpus(store)
    changes = _changed_fields(corpus, change, info)
    new = info.model_copy(update=changes)
    target.create(f"{new.folder}/teacher.json", seal(new.model_dump(mode="json")))
    if change.action == "rename":
        names = store.names(info.folder)
        for name in [*HEAD_FILES, COMPLETE_FILE]:
            if name in names:
                store.create(f"{new.folder}/{name}", store.read_bytes(f"{info.folder}/{name}"))
        if {*HEAD_FILES} <= {*names}:
            read_head(store, new.folder)
    copy_units(corpus, target, info, changes, done)
    # for a transcoded teacher the old files would look like orphans, too
    if change.action == "rename":
        _remove_orphans(store, new.folder)


def _replace_records(store: Store, change: Change, folder: str) -> None:
    """Replace the old records with the new ones."""
    copy_store = _copy_store(store, change)
    for unit in ShardSet(copy_store, folder).committed():
        name = f"{folder}/commits/{unit}.json"
        store.replace(name, copy_store.read_bytes(name))
    name = f"{folder}/teacher.json"
    message = f"{store.location}/{folder}/{NEXT_FOLDER}, from which it was read, no longer exists"
    advice = f". `pipeline teachers {store.location} --remove {change.teacher} --yes` ends it"
    with unusable(message, FileNotFoundError, advice=advice):
        store.replace(name, copy_store.read_bytes(name))
    ShardSet(store, folder).records.forget_roll_up()


def _remove_orphans(store: Store, folder: str) -> None:
    for name in orphans(ShardSet(store, folder)):
        store.discard(name)


def _abandon(store: Store, change: Change) -> None:
    """Remove what was made; nobody has seen it."""
    log.info("%s: abandoned: %s", store.location, change.describe())
    if change.action == "rename":
        store.remove_folder(f"targets/{change.to}")
    for folder in change.sets:
        store.remove_folder(f"{folder}/{NEXT_FOLDER}")
        _remove_orphans(store, folder)
    _finish(store, change)


def _finish(store: Store, change: Change) -> None:
    """Write ``cache.json`` without the change, at once."""
    manifest = read_manifest(store)
    rolled = {key: manifest[key] for key in ROLLED_UP if key in manifest}
    cache = None
    with suppress(CacheError):  # about another teacher, which `verify` names
        cache = Cache(store)
        rolled = cache.rolled_up
    journal = journal_in(manifest, store).model_copy(update={"change": None})
    if cache is not None:
        write_card(store, cache.corpus, cache.teachers, change.version)
    store.replace(MANIFEST, seal(rolled | journal.as_json(), change.version))
    store.overlay = Overlay()


def _check_room(store: Store, change: Change) -> None:
    """Raise InputError if the disk has no room for the copy beside the original."""
    needed = 0
    for info in _parts_to_copy(store, change):
        commits = ShardSet(store, info.folder).committed()
        needed += commits.bytes
        if change.to == "default":
            positions = int(commits.count_facts("positions").sum())
            new = info.model_copy(update={"codec": "default"})
            needed += positions * kind_of(new).bytes_per_position - commits.bytes
    free_bytes = store.free_bytes
    if free_bytes is not None and free_bytes < needed:
        raise InputError(
            f"{store.location}: {change.describe()}, which needs {shown_bytes(needed)} for a copy "
            f"beside the original until it is finished, but the disk has {shown_bytes(free_bytes)} "
            "free. Make room first; nothing was changed"
        )
