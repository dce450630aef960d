"""The change of a teacher under way, as recorded in ``cache.json``; what readers see meanwhile.

A teacher is removed, renamed (a copy under the other name, because shards repeat it) or transcoded
(a copy in another codec). Each change goes through phases; ``cache.json``, written as a whole,
moves it from one to the next:

  making    the copy is written beside the old targets. Readers see the old ones.
  placing   for a transcoded teacher only: new records replace the old ones. Readers see the
            new ones where they were made, in folders ``.next``.
  clearing  the old targets are removed. Readers see the final state.

So whoever opens the cache sees one state or the other, wherever the changing process was killed,
and the same command continues. ``renamed`` and ``removed`` in ``cache.json`` remember what became
of names.
"""

import logging
import shlex
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field, model_validator

from rekindle.data.errors import CacheError, InputError, unusable
from rekindle.data.settings import Settings, parse_settings
from rekindle.data.storage.base import Overlay, Store
from rekindle.data.storage.manifest import MANIFEST, NEWEST_VERSION, read_manifest
from rekindle.data.storage.seal import CHANGING, REPAIR, seal
from rekindle.data.targets.reading.files import read_teacher
from rekindle.data.targets.schema import TeacherInfo, TeacherName

log = logging.getLogger("rekindle")

# keys of cache.json that cannot be rebuilt from the rest
JOURNAL_KEYS = ("change", "renamed", "removed")
Action = Literal["remove", "rename", "transcode"]
PASSIVE = {"remove": "being removed", "rename": "being renamed", "transcode": "being transcoded"}


class Change(Settings):
    """A change of a teacher that was begun and is not finished."""

    action: Action
    teacher: TeacherName
    to: TeacherName | None = Field(None, description="its new name, or codec")
    sets: tuple[str, ...] = Field((), description="the shard sets that are transcoded")
    version: int = Field(
        ge=1, le=NEWEST_VERSION, description="version of the cache without the change"
    )
    phase: Literal["making", "placing", "clearing"] = "making"

    @model_validator(mode="after")
    def _check_consistent(self) -> "Change":
        folder = f"targets/{self.teacher}"
        is_inside = all(f"{one}/".startswith(f"{folder}/") and ".." not in one for one in self.sets)
        is_transcoding = self.action == "transcode"
        fits = bool(self.sets) == is_transcoding and (is_transcoding or self.phase != "placing")
        if not is_inside or not fits:
            raise ValueError(f"a change of {folder} cannot be like that")
        if (self.to is None) != (self.action == "remove") or self.to == self.teacher:
            raise ValueError(f"{self.action} cannot have this goal: {self.to!r}")
        return self

    @property
    def request(self) -> tuple[Action, str, str | None]:
        """Return what was asked for."""
        return self.action, self.teacher, self.to

    @property
    def overlay(self) -> Overlay:
        """Return what readers see of the cache meanwhile."""
        if self.phase == "placing":
            return Overlay(replaced=self.sets)
        if self.action == "transcode" or (self.phase, self.action) == ("making", "remove"):
            return Overlay()
        return Overlay(f"targets/{self.to if self.phase == 'making' else self.teacher}")

    def command(self, location: str) -> str:
        """Return the command line that continues it."""
        words = ["pipeline", "teachers", location, f"--{self.action}", self.teacher]
        words += [self.to] if self.to else ["--yes"]
        return f"`{shlex.join(words)}`"

    def describe(self) -> str:
        """Return what is under way."""
        to = {"rename": f" to {self.to!r}", "transcode": f" to the {self.to} codec"}
        return f"teacher {self.teacher!r} is {PASSIVE[self.action]}{to.get(self.action, '')}"


class Journal(Settings):
    """What ``cache.json`` says about changes."""

    change: Change | None = None
    renamed: dict[str, str] = Field({}, description="a former name -> its new name")
    removed: tuple[str, ...] = ()

    def current_name(self, name: str, present: Container[str]) -> str | None:
        """Return the present name of a renamed teacher; None if it was not renamed, or
        was removed.
        """
        seen = set[str]()
        while name not in present and name in self.renamed and name not in seen:
            seen.add(name)
            name = self.renamed[name]
        return name if seen and name in present else None

    def after(self, change: Change) -> "Journal":
        """Return the same with what to remember of ``change``, which is under way."""
        renamed, removed = dict(self.renamed), {*self.removed}
        if change.action == "rename":
            assert change.to is not None
            renamed[change.teacher] = change.to
            renamed.pop(change.to, None)
            removed -= {change.teacher, change.to}
        elif change.action == "remove":
            renamed.pop(change.teacher, None)
            removed.add(change.teacher)
        return Journal(change=change, renamed=renamed, removed=tuple(sorted(removed)))

    def as_json(self) -> dict[str, Any]:
        """Return its entries in ``cache.json``, without empty ones."""
        return {key: value for key, value in self.model_dump(mode="json").items() if value}


def read_journal(store: Store) -> Journal:
    """Return a cache's journal; raise CacheFormatError if it is damaged or there is no cache."""
    return journal_in(read_manifest(store), store)


def journal_in(manifest: Mapping[str, Any], store: Store) -> Journal:
    """Return a manifest's journal; raise CacheFormatError if it is invalid."""
    with unusable(f"{store.location}/{MANIFEST} is damaged", InputError, advice=f". {REPAIR}"):
        return parse_settings(
            Journal, {key: manifest[key] for key in JOURNAL_KEYS if key in manifest}
        )


def write_journal(store: Store, journal: Journal) -> None:
    """Record how far its change has got."""
    others = {key: value for key, value in read_manifest(store).items() if key not in JOURNAL_KEYS}
    version = max(CHANGING, journal.change.version if journal.change else 0)
    store.replace(MANIFEST, seal(others | journal.as_json(), version))


def read_with_overlay(store: Store) -> dict[str, Any]:
    """Return ``cache.json``. From here on the store shows the cache as readers are to see it,
    whatever is being changed.
    """
    manifest = read_manifest(store)
    change = journal_in(manifest, store).change
    store.overlay = change.overlay if change else Overlay()
    return manifest


def log_change(manifest: Mapping[str, Any], store: Store) -> None:
    """Log that a change is under way, and which state is shown."""
    if (change := journal_in(manifest, store).change) is not None:
        state = "before" if change.phase == "making" else "after"
        log.info("%s: %s; it is shown as it is %s that", store.location, change.describe(), state)


def refuse_changing(store: Store) -> None:
    """Raise InputError while a teacher is being changed, or a change was interrupted: nothing may
    be added then.
    """
    try:
        change = read_journal(store).change if store.exists(MANIFEST) else None
    except CacheError:
        return  # a damaged cache is handled elsewhere
    if change is not None:
        raise InputError(f"{store.location}: {describe_unfinished(change, store)}")


@contextmanager
def adding(store: Store) -> Iterator[bool | None]:
    """Yield ``store.working()``, for a cache without a change under way."""
    with store.working() as is_alone:
        refuse_changing(store)
        yield is_alone


def refuse_renamed(store: Store, teachers: Iterable[TeacherInfo]) -> None:
    """Raise InputError for a teacher of the run file that was renamed in this cache: it would be
    run, and stored, twice. Log if a removed teacher is made again.
    """
    journal, present = read_journal(store), store.folders("targets")
    for info in teachers:
        if info.name in present:
            continue
        if current := journal.current_name(info.name, present):
            existing = read_teacher(store, current).model_copy(update={"name": info.name})
            if existing.identity_of_model() == info.identity_of_model():
                raise InputError(
                    f"teacher {info.name!r} was renamed to {current!r} in {store.location}, "
                    f"where its targets are: call it {current!r} in the run file or command (or "
                    "give it its name back: `pipeline teachers "
                    f"{shlex.quote(store.location)} --rename {current} {info.name}`). To cache the "
                    "same model twice, give this one a third name"
                )
        elif info.name in journal.removed:
            log.info("teacher %s was removed from this cache; it is cached again", info.name)


def describe_unfinished(change: Change, store: Store) -> str:
    """Return what is under way, and how to end it."""
    give_up = f"; `pipeline gc {shlex.quote(store.location)} --older-than 0` abandons it"
    return (
        f"{change.describe()}, or that was interrupted. Run {change.command(store.location)} "
        f"(again) first{give_up * (change.phase == 'making')}"
    )


def explain_missing(
    manifest: Mapping[str, Any], store: Store, name: str, present: Container[str]
) -> str:
    """Return a sentence on a teacher that is no longer there; "" if nothing is known of it."""
    journal, location = journal_in(manifest, store), shlex.quote(store.location)
    if current := journal.current_name(name, present):
        return (
            f" Teacher {name!r} was renamed to {current!r}: use {current!r} instead. A run that "
            f"was begun with the old name continues once `pipeline teachers {location} --rename "
            f"{current} {name}` has given it back"
        )
    if name in journal.removed or name in journal.renamed:
        return (
            f" Teacher {name!r} was removed from this cache (`pipeline teachers --remove`): a run "
            "that was begun with it continues once `pipeline cache-teachers` has made it again. "
            "Or remove it from train.objective"
        )
    return ""
