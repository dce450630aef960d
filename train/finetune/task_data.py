"""Reads a labelled task: texts or pairs of texts, each with a class or a score. Knows no model.

Files: jsonl, csv (double quotes quote), tsv (as GLUE publishes it: nothing quotes), each also .gz
or .zst, and parquet. Fields: ``text`` or ``sentence1``, optionally ``sentence2``, and ``label``;
others are ignored. Rows in messages count from 1, without a csv's header and without blank lines.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from rekindle.data.errors import InputError

_FIELDS = ("text", "sentence1", "sentence2", "label")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf)", re.I)
_SHOWN_LABELS = 20
_KINDS: dict[type, str] = {bool: "boolean", str: "string"}  # of labels; all others are numbers
Label = bool | int | float | str
_Columns = dict[str, list[object]]  # those that are no field of a task may be empty


@dataclass(frozen=True)
class TaskData:
    """One split of a task, in the file's order.

    ``labels`` [N] is int64 class indices into ``label_names``, or float32 scores with no names.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def problem(self) -> str:
        """The name transformers gives the problem: classes where there are names, else scores."""
        return "single_label_classification" if self.label_names else "regression"

    def check_known(self, names: Sequence[str], who: str) -> None:
        """Raise InputError for scores, and for labels that are none of the ``names`` that ``who``
        knows.
        """
        unknown = [name for name in self.label_names if name not in names]
        if unknown or not self.label_names:
            wrong = f"the labels {', '.join(unknown[:5])}" if unknown else "scores, not classes"
            other = "" if unknown else ", or a model that was fine-tuned on scores"
            raise InputError(
                f"the task has {wrong}; {who} know {', '.join(list(dict.fromkeys(names))[:20])}: "
                f"give a task whose labels they know{other}"
            )


@dataclass(frozen=True)
class _Split:
    """One file's columns before labels have a meaning; ``kind`` is number, string or boolean."""

    path: str
    texts: list[str]
    pairs: list[str] | None
    labels: list[Label]
    kind: str


def read_task(train_path: str, *others: str) -> tuple[TaskData, ...]:
    """Read the splits of one task; ``train_path`` alone decides what the labels mean.

    Whole numbers, strings and booleans are classes: numbers sorted numerically (0..C-1 keep their
    number), the rest alphabetically. A train column with any float, 3.0 included, makes the task a
    regression; write classes without a decimal point.

    Raises InputError for a file that cannot be read or lacks a field, a text that is no string, a
    missing, mixed or non-finite label, a label that train does not have, or a single class.
    """
    splits = [_read_split(path) for path in (train_path, *others)]
    train = splits[0]
    for split in splits[1:]:
        if (train.pairs is None) != (split.pairs is None):
            has, lacks = (train, split) if split.pairs is None else (split, train)
            raise InputError(
                f"{has.path} has sentence2 and {lacks.path} has not; the splits of one task are "
                "all pairs or all single texts: add the field or take it away"
            )
    if train.kind == "number" and any(isinstance(label, float) for label in train.labels):
        return tuple(_as_regression(split) for split in splits)
    names = _class_names(train)
    return tuple(_as_classes(split, names, train.path) for split in splits)


def _class_names(train: _Split) -> tuple[str, ...]:
    by_name = {_class_name(label): label for label in train.labels}
    if len(by_name) < 2:
        raise InputError(
            f"{train.path}: every label is {next(iter(by_name))!r}; a classification task needs at "
            "least two classes in train"
        )
    if train.kind == "number":
        return tuple(sorted(by_name, key=cast("dict[str, float]", by_name).__getitem__))
    return tuple(sorted(by_name))


def _class_name(label: Label) -> str:
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))  # pandas writes a class column that once had a gap as 0.0, 1.0
    return str(label)


def _as_classes(split: _Split, names: tuple[str, ...], train_path: str) -> TaskData:
    index = {name: number for number, name in enumerate(names)}
    numbers = [index.get(_class_name(label), -1) for label in split.labels]
    if -1 in numbers:
        row = numbers.index(-1)
        known = ", ".join(names[:_SHOWN_LABELS]) + (" …" if len(names) > _SHOWN_LABELS else "")
        raise InputError(
            f"{split.path}, row {row + 1}: label {_class_name(split.labels[row])!r} does not occur "
            f"in {train_path}; the labels are those of train ({len(names)}: {known}): "
            "correct the label or add such rows to train"
        )
    return TaskData(split.texts, split.pairs, np.array(numbers, dtype=np.int64), names)


def _as_regression(split: _Split) -> TaskData:
    if split.kind != "number":
        raise InputError(
            f"{split.path}, row 1: label {split.labels[0]!r} is no number, but the train labels "
            "are scores (floats); give numbers here, or class names in every split"
        )
    return TaskData(split.texts, split.pairs, np.array(split.labels, dtype=np.float32), ())


def _read_split(path: str) -> _Split:
    columns = _read_columns(path)
    if not columns["label"]:
        raise InputError(f"{path} has no rows; give at least one labelled example")
    for field, values in columns.items():
        for row, value in enumerate(values, start=1):
            if problem := _problem(field, value):
                raise InputError(f"{path}, row {row}: {problem}")
    labels = cast("list[Label]", columns["label"])
    kinds = [_KINDS.get(type(label), "number") for label in labels]
    for row, (label, kind) in enumerate(zip(labels, kinds, strict=True), start=1):
        if kind != kinds[0]:
            raise InputError(
                f"{path}, row {row}: label {label!r} is a {kind}, but row 1 has {labels[0]!r}, "
                f"a {kinds[0]}; use one type of label throughout"
            )
    texts = cast("dict[str, list[str]]", columns)
    first = texts.get("text") or texts["sentence1"]
    return _Split(path, first, texts.get("sentence2"), labels, kinds[0])


def _problem(field: str, value: object) -> str | None:
    """Say what is wrong with a value of a field, if anything."""
    given = "missing" if value is None else f"{value!r}, a {type(value).__name__}"
    if field != "label":
        return None if isinstance(value, str) else f"{field} must be a string (given: {given})"
    if value is None:
        return "label is missing; every row needs one: add it or drop the row"
    if not isinstance(value, str | int | float):
        return f"label must be a class name, an integer or a float (given: {given})"
    if not isinstance(value, str) and not math.isfinite(value):
        return f"label is {value}; a score must be finite: drop the row"
    return None


def _read_columns(path: str) -> _Columns:
    """Read the fields of a task that ``path`` has, as Python values; InputError for too few."""
    if not Path(path).is_file():
        raise InputError(f"no such file: {path!r}; give a jsonl, csv, tsv or parquet file")
    read = _reader_of(path)
    try:
        found = read(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not found:
        return {"text": [], "label": []}
    columns = {field: found[field] for field in _FIELDS if field in found}
    has = f"the fields it has: {', '.join(found)}"
    if "label" not in columns:
        raise InputError(f"{path} has no field 'label' ({has})")
    if ("text" in columns) == ("sentence1" in columns):
        both = "both 'text' and 'sentence1'; which of them is meant is not clear"
        neither = "no field 'text' or 'sentence1'"
        raise InputError(f"{path} has {both if 'text' in columns else neither} ({has})")
    return columns


def _reader_of(path: str) -> Callable[[str], _Columns]:
    name = Path(path).name.lower()
    if name.endswith(".parquet"):
        return _read_parquet
    for packed in (".gz", ".zst"):
        name = name.removesuffix(packed)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_csv}
    if Path(name).suffix in readers:
        return readers[Path(name).suffix]
    raise InputError(
        f"{path}: unknown type of file; a task is .jsonl, .csv or .tsv (each also .gz or .zst) "
        "or .parquet: rename or convert it"
    )


def _read_jsonl(path: str) -> _Columns:
    # Not pyarrow.json: it reads a column of dates as timestamps, and stops at a mixed column
    # without naming the row.
    rows: list[dict[str, object]] = []
    with pa.input_stream(path, compression="detect") as stream:
        content = stream.read().decode("utf-8-sig")
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: each line must be an object {{…}}")
        rows.append(row)
    fields = dict.fromkeys(field for row in rows for field in row)
    return {field: [row.get(field) for row in rows] for field in fields}


def _read_csv(path: str) -> _Columns:
    # Every field as a string: a text "12" stays a text, and what labels are is decided here, alike
    # for all files. GLUE's tsv files hold lone quotation marks, so that a tsv has no quoting.
    tabbed = ".tsv" in Path(path).name.lower()
    parse = pa.csv.ParseOptions(
        delimiter="\t" if tabbed else ",",
        quote_char=False if tabbed else '"',
        newlines_in_values=not tabbed,
    )
    convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(_FIELDS, pa.string()))
    with pa.input_stream(path, compression="detect") as stream:
        if not Path(path).stat().st_size:
            return {}
        table = pa.csv.read_csv(stream, parse_options=parse, convert_options=convert)
    columns = _listed(table)
    if "label" in columns:
        columns["label"] = _typed(columns["label"])
    return columns


def _read_parquet(path: str) -> _Columns:
    return _listed(pa.parquet.ParquetFile(path).read())


def _listed(table: pa.Table) -> _Columns:
    names = table.column_names
    return {name: table.column(name).to_pylist() if name in _FIELDS else [] for name in names}


def _typed(labels: list[object]) -> list[object]:
    """Return a csv's labels as numbers where all are written so; an empty one is None."""
    given = [str(label) for label in labels if label]
    as_type: Callable[[str], Label] = str
    if all(_WHOLE.fullmatch(label) for label in given):
        as_type = int
    elif all(_DECIMAL.fullmatch(label) for label in given):
        as_type = float
    return [as_type(str(label)) if label else None for label in labels]
