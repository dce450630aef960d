"""Reads a labelled file for a model that knows its labels: no train file says what they mean.

One class alone, or fewer than the model knows, is enough.
"""

import json
import logging
import re
import shlex
from collections.abc import Mapping, Sequence

import numpy as np

from rekindle.data.errors import InputError, did_you_mean
from rekindle.train.answers.judge import Judge
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.finetune.labels import (
    SHOWN,
    Label,
    Rows,
    check_dropped,
    check_scores,
    dropped_names,
    kept_rows,
)
from rekindle.train.finetune.positive import positive_class
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.finetune.task_files import read_file

log = logging.getLogger("rekindle")

_ROWS_SHOWN = 5
_NAMELESS = re.compile(r"LABEL_\d+")


def read_labelled(path: str, judge: Judge, settings: TaskSettings) -> TaskData:
    """Read a labelled file whose labels are those of ``judge``.

    Raises InputError as ``read_file`` does, and for labels that the model does not know, naming
    their rows.
    """
    file = read_file(path, settings)
    dropped = dropped_names(settings.drop_labels, as_written=False)
    rows, gone = kept_rows(path, file.labels, dropped, as_written=False)
    check_dropped(dropped, [(rows, gone)])
    if not rows.labels:
        raise InputError(f"{path}: drop_labels leaves none of its {gone.total()} rows")
    names: tuple[str, ...] = ()
    if judge.answers.problem == "regression":
        check_scores(rows, len(judge.labels))
        labels = np.array([label.value for label in rows.labels], dtype=np.float32)
    else:
        names = tuple(dict.fromkeys(judge.labels))
        labels = np.array(_numbers(rows, names, judge.who), dtype=np.int64)
    texts = [file.texts[number - 1] for number in rows.numbers]
    pairs = file.pairs and [file.pairs[number - 1] for number in rows.numbers]
    positive = positive_class(names, settings.positive)
    about = (rows.numbers, dict(gone), path)
    return TaskData(texts, pairs, labels, names, positive, *about)


def _numbers(rows: Rows, names: Sequence[str], who: str) -> list[int]:
    """The number of each label among the ``names`` that ``who`` knows."""
    index = {name: number for number, name in enumerate(names)}
    nameless = all(map(_NAMELESS.fullmatch, names))
    if nameless and not any(label.name in index for label in rows.labels):
        index = {str(number): number for number in range(len(names))}
        log.info("%s: its labels have no names; a number is that of an output, from 0", who)
    found = [_number(label, index) for label in rows.labels]
    wrong = [place for place, number in enumerate(found) if number is None]
    if wrong:
        raise InputError(_unknown(rows, wrong, names, who))
    return [number for number in found if number is not None]


def _number(label: Label, index: Mapping[str, int]) -> int | None:
    """As it is written, as it is read (1.0 is 1), or, of true and false, in any case."""
    names = [label.raw.strip() if isinstance(label.raw, str) else label.name, label.name]
    if label.name.casefold() in ("true", "false"):
        names.append(label.name.casefold())
    return next((index[name] for name in names if name in index), None)


def _unknown(rows: Rows, wrong: Sequence[int], names: Sequence[str], who: str) -> str:
    labels = [*dict.fromkeys(rows.labels[place].name for place in wrong)]
    numbers = ", ".join(str(rows.numbers[place]) for place in wrong[:_ROWS_SHOWN])
    more = f" … ({len(wrong):,} rows)" if len(wrong) > _ROWS_SHOWN else ""
    told = ", ".join(map(repr, labels[:_ROWS_SHOWN])) + (" …" if len(labels) > _ROWS_SHOWN else "")
    known = ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
    near = did_you_mean(labels[0], names)
    if len(wrong) == len(rows.labels):
        advice = "It knows no label of the file: check the model, the file and --label-field"
    else:
        leave = shlex.quote(f"drop_labels={json.dumps(labels, ensure_ascii=False)}")
        advice = f"Correct them, or leave such rows out with --set {leave}"
    return (
        f"{rows.path}, row {numbers}{more}: {who} does not know the label{'s' * (len(labels) > 1)} "
        f"{told}; it knows {len(names)}: {known}{near or '.'} {advice}"
    )
