"""A model's answers about rows in their one written form: a JSON line for each row.

A line has the row's own columns, and then, by problem:
  classes  label: the class's name; probabilities: {name: p} of all
  several labels  labels: the names of those that hold; probabilities: {name: p} of all
  scores   score: a number, or scores: a list of several
  tokens   tags: a name for each (null: not read); probabilities: that of each of these tags
An own column with one of these names is kept as ``given_NAME``.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress
from typing import Any, BinaryIO

import numpy as np
from scipy.special import expit, softmax

from rekindle.data.errors import InputError
from rekindle.data.source.rows import Row, read_rows
from rekindle.train.finetune.label_lists import SEVERAL, TAGS
from rekindle.train.finetune.metrics import predictions_of
from rekindle.train.finetune.task_data import TaskData

GIVEN = "given_"  # prefix for the name of an own column that an answer takes
Answer = dict[str, Any]  # the columns that are added to a row
_COLUMNS = {
    "single_label_classification": ("label", "probabilities"),
    SEVERAL: ("labels", "probabilities"),
    TAGS: ("tags", "probabilities"),
}


@dataclass(frozen=True)
class Answers:
    """How to read the C outputs of a model: its problem, as transformers names it, and names."""

    problem: str
    names: tuple[str, ...]
    threshold: float = 0.5  # if several labels may hold

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of a line that it fills."""
        return _COLUMNS.get(self.problem, ("score" if len(self.names) == 1 else "scores",))

    def of(self, logits: np.ndarray) -> Answer:
        """Return one row's answer, from fp32 logits [C], or [T,C] of its T tokens (NaN:
        not read).
        """
        if self.problem == "regression":
            values = _numbers(logits)
            return {self.columns[0]: values[0] if len(self.names) == 1 else values}
        rows = np.atleast_2d(logits)
        predictions = predictions_of(self.problem, rows, self.threshold)
        if self.problem == TAGS:
            tags = [self.names[i] if i >= 0 else None for i in predictions]
            likely = softmax(rows.astype(np.float64), axis=1).max(axis=1, initial=-np.inf)
            probs = [p if tag else None for p, tag in zip(_numbers(likely), tags, strict=True)]
            return {"tags": tags, "probabilities": probs}
        wide = logits.astype(np.float64)
        probabilities = expit(wide) if self.problem == SEVERAL else softmax(wide)
        by_name = dict(zip(self.names, _numbers(probabilities), strict=True))
        if self.problem == SEVERAL:
            held_names = [
                name for name, holds in zip(self.names, predictions[0], strict=True) if holds
            ]
            return {"labels": held_names, "probabilities": by_name}
        return {"label": self.names[int(predictions[0])], "probabilities": by_name}


def _numbers(values: np.ndarray) -> list[float]:
    """Return the numbers with the fewest digits that identify a float32."""
    return [float(str(value)) for value in values.astype(np.float32)]


def labels_of(answer: Answer) -> list[str]:
    """Return the labels or tags of an answer; none for scores."""
    for name in ("label", "labels", "tags"):
        if name in answer:
            labels = answer[name]
            return (
                [labels] if isinstance(labels, str) else [one for one in labels if one is not None]
            )
    return []


def add_answers(
    rows: Iterable[Row], answers: Iterable[Answer], path: str, first: int = 1
) -> Iterator[Row]:
    """Yield each row of ``path``, from number ``first`` on, with its answer; InputError if a name
    is taken twice.
    """
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True), start=first):
        columns = {
            f"{GIVEN}{name}" if name in answer else name: value for name, value in row.items()
        }
        if len(columns) < len(row):
            repeated = next(name for name in row if name in answer and f"{GIVEN}{name}" in row)
            raise InputError(
                f"{path}, row {number}: it has the columns {repeated!r} and {GIVEN + repeated!r}, "
                f"and the first would be kept under the name of the second, for {repeated} is the "
                "model's answer; rename or remove one of them"
            )
        yield columns | answer


def write_rows(rows: Iterable[Row], file: BinaryIO, ascii_only: bool = False) -> None:
    """Write JSON lines; ``ascii_only``: for a terminal, with everything else escaped.

    Raises InputError, naming the row, for a value that JSON cannot write.
    """
    for number, row in enumerate(rows, start=1):
        file.write(_line(row, number, ascii_only).encode() + b"\n")


def _line(row: Row, number: int, ascii_only: bool) -> str:
    try:
        try:
            line = json.dumps(row, ensure_ascii=ascii_only, allow_nan=False, default=_as_text)
        except ValueError:  # NaN, as Parquet may hold it
            row = {name: _finite(value) for name, value in row.items()}
            line = json.dumps(row, ensure_ascii=ascii_only, default=_as_text)
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair in an own column
        return json.dumps(row, default=_as_text)
    except TypeError as error:
        raise InputError(f"row {number}: {error}; leave that column out") from None
    return line


def _as_text(value: object) -> str:
    if isinstance(value, bytes):
        raise TypeError("a column holds bytes, which JSON cannot write")
    return str(value)  # dates and decimal numbers


def _finite(value: object) -> object:
    """Return the same, with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_finite(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_predictions(file: BinaryIO, data: TaskData, answers: Answers, logits: np.ndarray) -> None:
    """Write a model's answers for the rows from which ``data`` was read, in their order; rows left
    out for their labels have no line.

    Raises InputError if the file has changed since.
    """
    last = data.rows[-1] if data.rows is not None else len(data)
    is_read = np.zeros(last, bool)
    is_read[np.array(data.rows) - 1 if data.rows is not None else slice(None)] = True
    rows = [*compress(read_rows(data.path), is_read)]
    if len(rows) != len(data):
        raise InputError(f"{data.path} has fewer rows than when it was read")
    row_answers = map(answers.of, data.per_row(logits))
    write_rows(add_answers(rows, row_answers, data.path), file)
