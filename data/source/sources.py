"""Find what a corpus source stands for: files here or in a store, datasets ids, the Python docs, in
reading order.

No text is read here: names and directories decide, and the file list that ``save_to_disk`` wrote.
"""

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

from rekindle.data.errors import InputError
from rekindle.data.places import expanded
from rekindle.data.storage.addresses import find_objects, open_binary
from rekindle.data.storage.client import FILE_URL, is_remote
from rekindle.data.text_files import PACKED_SUFFIXES

PYTHON_DOCS = "python-docs"
HUB = "hub"
TABLES = ("csv", "tsv")
_COMPRESSIBLE = ("txt", "jsonl", *TABLES)
_SUFFIXES = {f".{name}": name for name in (*_COMPRESSIBLE, "parquet", "arrow")} | {".json": "jsonl"}
_KNOWN_SUFFIXES = (
    f".txt, .jsonl, .json, .csv, .tsv (each also {', '.join(PACKED_SUFFIXES)}), .parquet, .arrow"
)
# owner/name or name, then optionally :config and :split
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[^:/]*){0,2}")
_MAX_INSPECTED = 10_000  # files of a given directory that are looked at to say what it holds

Content = Literal["text", "chat", "tokens"]  # what a record holds


class Entry(NamedTuple):
    """One entry of a source, and what its records hold."""

    place: str
    content: str = "text"  # a Content, or that of a written sample (forms/written.py)

    @classmethod
    def of(cls, entry: "str | Entry") -> "Entry":
        """Return an entry; a place alone is one whose records are texts."""
        return entry if isinstance(entry, Entry) else cls(str(entry))  # it may be a Path


class Origin(NamedTuple):
    """One thing that is read.

    ``place`` is where it is; ``name`` is the name its documents get: a file that has moved keeps
    the name that it was first read under.
    """

    format: str  # txt | jsonl | csv | tsv | parquet | arrow | hub | python-docs
    place: str  # a path, an address (s3://…), or a datasets id
    name: str
    content: str = "text"

    @property
    def is_file(self) -> bool:
        """Return whether it is a file, here or in a store, which can be identified and added to."""
        return self.format not in (HUB, PYTHON_DOCS)


def find_origins(source: Sequence[str | Entry]) -> list[Origin]:
    """Return what ``source`` stands for, in reading order, each once.

    An entry is a place, or an ``Entry`` of one whose records hold something other than text. A
    place is one of:

    - a file, or a glob (``**`` descends; its files are taken in sorted order): .txt, .jsonl or
      .json with one object per line, .csv, .tsv, each of these also .gz, .zst or .bz2; .parquet;
      .arrow (the IPC file format and the stream format). A file or directory whose name contains
      glob characters is taken literally;
    - an object in a store (``s3://bucket/a.jsonl``), or a glob that matches objects;
    - a directory written by ``datasets``' ``save_to_disk`` (of several splits: ``train``);
    - a datasets id, ``name``, ``name:config`` or ``name:config:split``; an empty config is the
      default one (``ag_news::test``); the split is ``train`` unless given; it is streamed;
    - ``python-docs``: the documentation of the installed Python.

    A file that is named twice is read once, at its first place.

    Raises InputError for a source that does not exist or is of an unknown kind.
    """
    return origins_and_repeats(source)[0]


def origins_and_repeats(source: Sequence[str | Entry]) -> tuple[list[Origin], int]:
    """Return ``find_origins(source)``, and how many of its names repeat a file."""
    entries = [source] if isinstance(source, str) else source
    if not entries:
        raise InputError("no corpus source; give files, globs, a datasets id or python-docs")
    found: dict[str, Origin] = {}
    named_count = 0
    for place, content in map(Entry.of, entries):
        for origin in _resolve(place):
            named_count += 1
            is_local = origin.format != HUB and not is_remote(origin.place)
            key = os.path.realpath(origin.place) if is_local else origin.place
            first = found.setdefault(key, origin._replace(content=content))
            if first.content != content:
                raise InputError(
                    f"{origin.place} is named twice, once with format {first.content} and once "
                    f"with format {content}; give it only one of them"
                )
    return list(found.values()), named_count - len(found)


def source_files(source: Sequence[str | Entry]) -> list[str]:
    """Return the files ``source`` stands for, in reading order; none for a hub id or python-docs.

    Raises InputError as ``find_origins`` does.
    """
    return [origin.place for origin in find_origins(source) if origin.is_file]


def recorded_origin(place: str) -> Origin:
    """Return the origin of a place that a cache has recorded, whether or not it still exists."""
    file_format = None if place == PYTHON_DOCS else _format(place)
    if file_format:
        return Origin(file_format, place, os.path.basename(place))
    return Origin(PYTHON_DOCS if place == PYTHON_DOCS else HUB, place, place)


def _resolve(entry: str) -> list[Origin]:
    if entry == PYTHON_DOCS:
        return [recorded_origin(entry)]
    path = expanded(entry).removeprefix(FILE_URL)
    if is_remote(path):
        return _objects_at(path)
    if os.path.isdir(path):
        return _saved_dataset(path)
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise InputError(
                f"{path} is a pipe or a device, but a corpus is read more than once; write its "
                "output to a file"
            )
        return [_file(path)]
    if glob.has_magic(path):
        matches = glob.glob(_with_literal_directories(path), recursive=True)
        files = sorted(filter(os.path.isfile, matches))
        if files:
            return [_file(file) for file in files]
    elif _HUB_ID.fullmatch(entry) and _format(entry) is None:
        return [recorded_origin(entry)]
    raise no_such_source_error(entry)


def _objects_at(address: str) -> list[Origin]:
    if files := find_objects(address):
        return [_file(file) for file in files]
    directory = address.rstrip("/")
    if objects := find_objects(f"{directory}/"):
        return _saved_dataset(directory, objects)
    raise InputError(
        f"corpus source {address!r}: there is no such object, and none matches it as a glob (or "
        "these credentials may not list them); give an object, or a glob such as "
        "s3://bucket/texts/**/*.jsonl.gz"
    )


def _with_literal_directories(pattern: str) -> str:
    """Return the glob with those directories escaped that exist under that literal name."""
    parts = pattern.split("/")
    for count in range(len(parts) - 1, 0, -1):
        directory = "/".join(parts[:count])
        if glob.has_magic(directory) and os.path.isdir(directory):
            return "/".join([glob.escape(directory), *parts[count:]])
    return pattern


def no_such_source_error(entry: str, reason: object = None) -> InputError:
    """Return the error about an ``entry`` for which nothing is found."""
    reason_text = f" ({' '.join(str(reason).split())})" if reason else ""
    return InputError(
        f"corpus source {entry!r} is neither a file, a glob that matches files, nor a datasets id "
        f"that could be loaded{reason_text}; give an existing file, a glob such as "
        f"'texts/**/*.jsonl', a datasets id as name:config:split, or {PYTHON_DOCS}"
    )


def _format(path: str) -> str | None:
    stem, suffix = os.path.splitext(path.lower())
    is_compressed = suffix in PACKED_SUFFIXES
    kind = _SUFFIXES.get(os.path.splitext(stem)[1] if is_compressed else suffix)
    return None if is_compressed and kind not in _COMPRESSIBLE else kind


def _file(path: str) -> Origin:
    if _format(path) is None:
        raise InputError(f"{path}: unknown extension; known are {_KNOWN_SUFFIXES}")
    return recorded_origin(path)


def _saved_dataset(directory: str, objects: Sequence[str] | None = None) -> list[Origin]:
    """Return the files that ``save_to_disk`` wrote; ``objects``: the folder's objects in
    a store.
    """
    splits = _read_saved_list(directory, "dataset_dict.json", "splits")
    if splits is not None:
        if "train" not in splits:
            raise InputError(
                f"{directory} holds the splits {', '.join(map(str, splits))} but no 'train'; name "
                f"one of them, such as {os.path.join(directory, str(splits[0]))}"
                if splits
                else f"{directory} holds no splits"
            )
        return _saved_dataset(os.path.join(directory, "train"), objects)
    files = _read_saved_list(directory, "state.json", "_data_files")
    if files is None:
        raise InputError(
            f"{directory} is a directory that datasets' save_to_disk did not write; "
            f"{_name_its_files(directory, objects)}"
        )
    return [_file(os.path.join(directory, part["filename"])) for part in files]


def _read_saved_list(directory: str, name: str, key: str) -> list[Any] | None:
    """Return the list in a file of a saved dataset; None if there is no such file."""
    path = os.path.join(directory, name)
    try:
        with open_binary(path) as file:
            content = file.read()
    except FileNotFoundError:
        return None
    try:
        entries = json.loads(content)[key]
        is_valid = isinstance(entries, list) and (
            key == "splits" or all(isinstance(part["filename"], str) for part in entries)
        )
    except (ValueError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise InputError(f"{path} is damaged: it does not list {key}; save the dataset again")
    return list(entries)


def _name_its_files(directory: str, objects: Sequence[str] | None) -> str:
    for name in islice(_names_below(directory) if objects is None else objects, _MAX_INSPECTED):
        if _format(name):
            stem, suffix = os.path.splitext(name)
            ending = os.path.splitext(stem)[1] * (suffix in PACKED_SUFFIXES) + suffix
            pattern = os.path.join(glob.escape(directory), "**", f"*{ending}")
            return f"name its files with a glob, such as {pattern}"
    return f"and it holds no file of a supported type ({_KNOWN_SUFFIXES})"


def _names_below(directory: str) -> Iterator[str]:
    for _, folders, names in os.walk(directory):
        folders.sort()
        yield from sorted(names)
