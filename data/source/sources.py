"""What a corpus source stands for: files, datasets ids, the Python docs, in reading order.

No text is read here: names and directories decide, and of what ``save_to_disk`` wrote its list.
"""

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rekindle.data.errors import InputError
from rekindle.data.places import expanded
from rekindle.data.text_files import PACKED_SUFFIXES

PYTHON_DOCS = "python-docs"
HUB = "hub"
TABLES = ("csv", "tsv")
_PACKABLE = ("txt", "jsonl", *TABLES)
_SUFFIXES = {f".{name}": name for name in (*_PACKABLE, "parquet", "arrow")} | {".json": "jsonl"}
_KNOWN_SUFFIXES = (
    f".txt, .jsonl, .json, .csv, .tsv (each also {', '.join(PACKED_SUFFIXES)}), .parquet, .arrow"
)
# owner/name or name, then optionally :config and :split
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[^:/]*){0,2}")
_LOOKED_AT = 10_000  # files of a directory that was given, to say what it holds


class Origin(NamedTuple):
    """One thing that is read.

    ``place`` is where it is; ``name`` is what its documents are called by: a file that has moved
    since keeps the name that it was first read under.
    """

    format: str  # txt | jsonl | csv | tsv | parquet | arrow | hub | python-docs
    place: str  # a path, or a datasets id
    name: str

    @property
    def is_file(self) -> bool:
        """Whether it is a local file, which can be told apart and added to."""
        return self.format not in (HUB, PYTHON_DOCS)


def find_origins(source: Sequence[str]) -> list[Origin]:
    """What ``source`` stands for, in reading order, each once.

    An entry is one of
      - a file, or a glob (``**`` descends; its files are taken in sorted order): .txt, .jsonl or
        .json with one object per line, .csv, .tsv, each of these also .gz, .zst or .bz2; .parquet;
        .arrow (the IPC file format and the stream format). Where a file or a directory has glob
        characters in its name, it is meant as it stands;
      - a directory written by ``datasets``' ``save_to_disk`` (of several splits: ``train``);
      - a datasets id, ``name``, ``name:config`` or ``name:config:split``, an empty config being the
        default one (``ag_news::test``); the split is ``train`` unless given; it is streamed;
      - ``python-docs``: the documentation of the installed Python.
    A file that is named twice is read once, at its first place.

    Raises InputError for a source that does not exist or is of no known kind.
    """
    return list(_by_identity(source).values())


def named_again(source: Sequence[str]) -> int:
    """How often ``source`` names a file that it has named before."""
    found = [origin for entry in source for origin in _resolve(entry)]
    return len(found) - len(_by_identity(source))


def source_files(source: Sequence[str]) -> list[str]:
    """The local files ``source`` stands for, in reading order; none for a hub id or python-docs.

    Raises InputError as ``find_origins`` does.
    """
    return [origin.place for origin in find_origins(source) if origin.is_file]


def recorded_origin(place: str) -> Origin:
    """The origin of a place that a cache has recorded, whether it is still there or not."""
    known = None if place == PYTHON_DOCS else _format(place)
    if known:
        return Origin(known, place, os.path.basename(place))
    return Origin(PYTHON_DOCS if place == PYTHON_DOCS else HUB, place, place)


def _by_identity(source: Sequence[str]) -> dict[str, Origin]:
    entries = [source] if isinstance(source, str) else source
    if not entries:
        raise InputError("no corpus source; give files, globs, a datasets id or python-docs")
    found: dict[str, Origin] = {}
    for entry in entries:
        for origin in _resolve(entry):
            key = origin.place if origin.format == HUB else os.path.realpath(origin.place)
            found.setdefault(key, origin)
    return found


def _resolve(entry: str) -> list[Origin]:
    if entry == PYTHON_DOCS:
        return [recorded_origin(entry)]
    path = expanded(entry)
    if os.path.isdir(path):
        return _saved_dataset(Path(path))
    if os.path.exists(path):
        return [_file(path)]
    if glob.has_magic(path):
        matches = glob.glob(_with_literal_directories(path), recursive=True)
        files = sorted(filter(os.path.isfile, matches))
        if files:
            return [_file(file) for file in files]
    elif _HUB_ID.fullmatch(entry) and _format(entry) is None:
        return [recorded_origin(entry)]
    raise no_such_source(entry)


def _with_literal_directories(pattern: str) -> str:
    """The glob in which the directories that are there by that very name are meant."""
    parts = pattern.split("/")
    for count in range(len(parts) - 1, 0, -1):
        directory = "/".join(parts[:count])
        if glob.has_magic(directory) and os.path.isdir(directory):
            return "/".join([glob.escape(directory), *parts[count:]])
    return pattern


def no_such_source(entry: str, reason: object = None) -> InputError:
    """The error about an ``entry`` that nothing is found for."""
    because = f" ({' '.join(str(reason).split())})" if reason else ""
    return InputError(
        f"corpus source {entry!r} is neither a file, a glob that matches files, nor a datasets id "
        f"that could be loaded{because}; give an existing file, a glob such as 'texts/**/*.jsonl', "
        f"a datasets id as name:config:split, or {PYTHON_DOCS}"
    )


def _format(path: str) -> str | None:
    stem, suffix = os.path.splitext(path.lower())
    packed = suffix in PACKED_SUFFIXES
    kind = _SUFFIXES.get(os.path.splitext(stem)[1] if packed else suffix)
    return None if packed and kind not in _PACKABLE else kind


def _file(path: str) -> Origin:
    if _format(path) is None:
        raise InputError(f"{path}: unknown extension; known are {_KNOWN_SUFFIXES}")
    return recorded_origin(path)


def _saved_dataset(directory: Path) -> list[Origin]:
    splits = _saved(directory, "dataset_dict.json", "splits")
    if splits is not None:
        if "train" not in splits:
            raise InputError(
                f"{directory} holds the splits {', '.join(map(str, splits))} and no 'train'; "
                f"name one of them, such as {directory / str(splits[0])}"
                if splits
                else f"{directory} holds no splits"
            )
        return _saved_dataset(directory / "train")
    files = _saved(directory, "state.json", "_data_files")
    if files is None:
        raise InputError(
            f"{directory} is a directory that datasets' save_to_disk did not write; "
            f"{_name_its_files(directory)}"
        )
    return [_file(str(directory / part["filename"])) for part in files]


def _saved(directory: Path, name: str, key: str) -> list[Any] | None:
    """What a file of a saved dataset lists; None where there is no such file."""
    path = directory / name
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
        sound = isinstance(found, list) and (
            key == "splits" or all(isinstance(part["filename"], str) for part in found)
        )
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise InputError(f"{path} is damaged: it does not list {key}; save the dataset again")
    return list(found)


def _name_its_files(directory: Path) -> str:
    for name in islice(_names_below(directory), _LOOKED_AT):
        if _format(name):
            stem, suffix = os.path.splitext(name)
            ending = os.path.splitext(stem)[1] * (suffix in PACKED_SUFFIXES) + suffix
            pattern = os.path.join(glob.escape(str(directory)), "**", f"*{ending}")
            return f"name its files with a glob, such as {pattern}"
    return f"and it holds no file that is read ({_KNOWN_SUFFIXES})"


def _names_below(directory: Path) -> Iterator[str]:
    for _, folders, names in os.walk(directory):
        folders.sort()
        yield from sorted(names)
