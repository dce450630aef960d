"""Check where predictions may be written: never over their inputs or over other kinds of files."""

import json
import os
from contextlib import suppress
from pathlib import Path

from rekindle.data.errors import InputError
from rekindle.data.source.sources import recorded_origin
from rekindle.data.text_files import PACKED_SUFFIXES, STDIN
from rekindle.train.model.folder import base_of

_ANSWER_KEYS = {
    "probabilities",
    "score",
    "scores",
    "loss_mask",
}  # every written line has one of them
_OTHER_FORMATS, _SPREADSHEETS = ("csv", "tsv", "txt", "parquet", "arrow"), (".xlsx", ".xls", ".ods")
_LONGEST_LINE = 1 << 24  # bytes of the first line that are read


def check_target(out: str, source: str, model: str, force: bool) -> None:
    """Raise InputError if ``out`` is named like another kind of file, is the file ``source``, lies
    in the folder of ``model`` or its base, exists and is not a file of predictions, or exists and
    ``force`` is not given.
    """
    if out == STDIN:
        return
    path = Path(out)
    if path.is_dir():
        raise InputError(
            f"{out!r} is a folder; give the path of a file, such as {out}/predictions.jsonl"
        )
    if recorded_origin(out).format in _OTHER_FORMATS or path.suffix.lower() in (
        *PACKED_SUFFIXES,
        *_SPREADSHEETS,
    ):
        raise InputError(
            f"{out!r} is the name of another kind of file; predictions are written as JSON lines, "
            "one for each row: give a name that ends in .jsonl"
        )
    for folder in _folders(model):
        if any(folder in place.parents for place in (path.resolve(), _place(path))):
            raise InputError(
                f"{out!r} lies in {str(folder)!r}, a folder of the model; give another --out"
            )
    if not path.exists():
        return
    if _is_same(path, source):
        raise InputError(f"{out!r} is the file being read; give another --out")
    if not force:
        raise InputError(f"{out!r} already exists; give another --out, or --force to replace it")
    if not _is_predictions(path):
        raise InputError(
            f"{out!r} is not a file of predictions, and is left as it is; give another --out"
        )


def _folders(model: str) -> list[Path]:
    """Return the model's folder and, for an adapter, its base's; none for a hub id."""
    directory = Path(model)
    if not directory.is_dir():
        return []
    return [one.resolve() for one in (directory, base_of(directory)) if one is not None]


def _place(path: Path) -> Path:
    """Return the path of the name itself, without following a link of that name."""
    return path.parent.resolve() / path.name


def _is_same(path: Path, source: str) -> bool:
    with suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(0) if source == STDIN else os.stat(source))
    return False


def _is_predictions(path: Path) -> bool:
    """Return whether the file is empty, or its first line holds an answer."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        line = file.readline(_LONGEST_LINE)
    try:
        answer = json.loads(line or b'{"score": 0}')
    except ValueError:
        return False
    return isinstance(answer, dict) and not _ANSWER_KEYS.isdisjoint(answer)
