"""Which files a corpus was read from, identified by their content: with another path or name, or
among new files, they are the same files. Objects of a store are identified by their size and the
store's checksum (or, if it gives none, by when they were written).
"""

import fnmatch
import glob
import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import xxhash

from rekindle.data.errors import CacheMismatchError
from rekindle.data.source.sources import (
    Entry,
    Origin,
    origins_and_repeats,
    recorded_origin,
)
from rekindle.data.storage.addresses import states_of_objects
from rekindle.data.storage.client import is_remote

log = logging.getLogger("rekindle")

State = list[int | str]  # bytes; checksum of samples, or the tag that its store gives an object
States = dict[str, State]  # by the path of a source file
SAMPLES = 8  # places at which a source file is sampled, to notice changes
SAMPLE_BYTES = 1 << 16


class Present(NamedTuple):
    """An origin that exists now; its state, if it is a file."""

    origin: Origin
    state: State | None


def find_present(source: Sequence[str | Entry]) -> list[Present]:
    """Return what ``source`` stands for now, in reading order. Raise InputError for what is
    missing.
    """
    origins, repeats = origins_and_repeats(source)
    if repeats:
        log.info("corpus.source names %d of its files more than once; each is read once", repeats)
    remote = states_of_objects([o.place for o in origins if o.is_file and is_remote(o.place)])

    def state(origin: Origin) -> State | None:
        if not origin.is_file:
            return None
        known = remote.get(origin.place)
        return _state_of(origin.place) if known is None else [*known]

    return [Present(origin, state(origin)) for origin in origins]


def states_of(present: Sequence[Present]) -> States:
    """Return the state of every file, by path."""
    return {origin.place: state for origin, state in present if state is not None}


def _state_of(path: str) -> State:
    digest, size = xxhash.xxh3_64(), os.path.getsize(path)
    with open(path, "rb") as file:
        if size <= SAMPLE_BYTES:  # every sample is the whole file
            digest.update(file.read(SAMPLE_BYTES) * SAMPLES)
            return [size, digest.hexdigest()]
        for sample in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return [size, digest.hexdigest()]


def contents_of(present: Sequence[Present]) -> dict[str, str]:
    """Return the kind of content of each origin, by place, unless it is text."""
    return {o.place: o.content for o, _ in present if o.content != "text"}


def assumed_order(source: Sequence[str], states: States) -> tuple[str, ...]:
    """Return the order in which a ``source`` with files of these ``states`` was read: assumed for
    corpora that did not record it. A glob's files were sorted. Files of no entry are left out:
    their place cannot be known.
    """
    order: dict[str, None] = {}
    for entry in source:
        files = _files_of(os.path.expanduser(entry), states)
        if not files and entry.startswith("~"):  # it is unknown whose home it was
            files = _files_of(f"**/{entry.partition('/')[2]}", states)
        is_not_path = not (
            glob.has_magic(entry) or entry[:1] in "/~." or recorded_origin(entry).is_file
        )
        order |= dict.fromkeys(files or [entry] * is_not_path)
    return tuple(order)


def _files_of(entry: str, states: States) -> list[str]:
    below = f"{entry.rstrip('/')}/"
    if direct := sorted(known for known in states if known == entry or known.startswith(below)):
        return direct
    pattern, folder = entry.rstrip("/").split("/"), not glob.has_magic(entry.removeprefix("**/"))
    return sorted(known for known in states if _matches(known.split("/"), pattern, folder))


def _matches(path: Sequence[str], pattern: Sequence[str], folder: bool) -> bool:
    """Return whether a path's parts match a pattern, or lie below it if the pattern is a
    folder's.
    """
    if not pattern:
        return folder or not path
    if pattern[0] == "**":
        return any(_matches(path[count:], pattern[1:], folder) for count in range(len(path) + 1))
    matches_first = bool(path) and fnmatch.fnmatchcase(path[0], pattern[0])
    return matches_first and _matches(path[1:], pattern[1:], folder)


def match_recorded(
    order: Sequence[str],
    states: States,
    present: Sequence[Present],
    contents: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[Origin], list[Origin]]:
    """Return (the origins that were read, in that ``order``; those that are new).

    Each keeps the name under which it was read, wherever it is now. ``contents``: the kinds of
    content that are not text. Raises CacheMismatchError if one is missing, was changed, or is to be
    read as another kind.
    """
    contents_by_place = {place: contents.get(place, "text") for place in order}
    recorded = [
        Present(
            recorded_origin(place)._replace(content=contents_by_place[place]), states.get(place)
        )
        for place in order
    ]
    matches = _match_by_content(recorded, present)
    matched = set(matches.values())
    new = [one for number, one in enumerate(present) if number not in matched]
    missing = [place for number, place in enumerate(order) if number not in matches]
    if missing:
        raise _changed_error(missing, new)
    places = [matches[number] for number in range(len(order))]
    origins = [
        one.origin._replace(place=present[place].origin.place)
        for one, place in zip(recorded, places, strict=True)
    ]
    all_origins = [*origins, *(one.origin for one in present)]
    if places != list(range(len(present))) and not all(origin.is_file for origin in all_origins):
        raise CacheMismatchError(
            "the corpus source is now another one: with a datasets id or python-docs nothing can "
            "be added, and the order cannot change. Use another cache.path"
        )
    moved = sum(origin.place != place for origin, place in zip(origins, order, strict=True))
    if moved:
        log.info(
            "%d files of the corpus source are at another path now; recognised by content", moved
        )
    return origins, [one.origin for one in new]


def _match_by_content(recorded: Sequence[Present], present: Sequence[Present]) -> dict[int, int]:
    """Return which of ``present`` each of ``recorded`` is: one of equal content, preferably at the
    same path, else of the same name, else the first.
    """
    pairs: dict[int, int] = {}
    for second_key in (lambda one: one.origin.place, lambda one: one.origin.name, lambda one: ""):
        free: dict[object, deque[int]] = {}
        matched = set(pairs.values())
        for number, one in enumerate(present):
            if number not in matched:
                free.setdefault((_content(one), second_key(one)), deque()).append(number)
        for number, one in enumerate(recorded):
            if number not in pairs and (equals := free.get((_content(one), second_key(one)))):
                pairs[number] = equals.popleft()
    return pairs


def _content(one: Present) -> object:
    return (one.origin.format, one.origin.content, *one.state) if one.state else one.origin


def _changed_error(missing: Sequence[str], new: Sequence[Present]) -> CacheMismatchError:
    names: Mapping[str, str] = {one.origin.name: one.origin.place for one in new}
    descriptions = [
        f"{names[name]} (has other content)"
        if (name := os.path.basename(place)) in names
        else f"{place} (is not there)"
        for place in missing[:3]
    ]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return CacheMismatchError(
        "the corpus source has changed since the cache was begun: "
        f"{', '.join(descriptions)}{more}. Files are identified by their content (and format), "
        "whatever their names; a corpus grows by further files (and by a larger limit_sequences). "
        "Use another cache.path for changed text"
    )
