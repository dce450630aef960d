"""Read a labelled file for a model that knows its own labels; no train file is needed.

One class alone, or fewer than the model knows, is enough.
"""

import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from rekindle.data.errors import InputError, did_you_mean
from rekindle.train.answers.judge import Judge
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.finetune.label_lists import (
    SEVERAL,
    TAGS,
    check_label_lists,
    check_settings,
    check_tags,
    parse_labels,
    parse_words,
    read_lists,
    resolve_numbers,
)
from rekindle.train.finetune.labels import (
    SHOWN,
    Label,
    Rows,
    check_dropped,
    check_scores,
    dropped_names,
    read_labels,
    unify_labels,
)
from rekindle.train.finetune.positive import positive_class
from rekindle.train.finetune.task_data import TaskData, ranked, split_of, split_of_lists
from rekindle.train.finetune.task_files import TaskFile, read_file

log = logging.getLogger("rekindle")

_ROWS_SHOWN = 5
_NAMELESS = re.compile(r"LABEL_\d+")


def read_labelled(
    path: str, judge: Judge, settings: TaskSettings, file: TaskFile | None = None
) -> TaskData:
    """Read a labelled file whose labels are those of ``judge``; ``file``: its content, if already
    read.

    Raises InputError as ``read_file`` does, and for labels that the model does not know, naming
    their rows.
    """
    check_settings(settings)
    problem, subject = judge.answers.problem, judge.subject
    file = file or read_file(path, with_problem(settings, problem))
    if file.words is not None and problem != TAGS:
        raise InputError(
            f"{path} has tokens, but {subject} scores whole texts: name the column of texts with "
            "--text-field"
        )
    if file.groups is not None:
        if problem != "regression" or len(judge.labels) > 1:
            raise InputError(
                f"{path} has documents to rank, and {subject} gives {len(judge.labels)} "
                f"{'scores' if problem == 'regression' else 'labels'}, not one score: give a "
                "ranker, or say --set problem=classification or problem=regression"
            )
        dropped = dropped_names(settings.drop_labels, as_written=False)
        rows, left_out = read_labels(path, file.labels, dropped, as_written=False)
        check_dropped(dropped, [(rows, left_out)])
        return ranked(file, unify_labels([rows], as_written=False)[0], left_out, settings)[0]
    names = () if problem == "regression" else tuple(dict.fromkeys(judge.labels))
    if problem in (SEVERAL, TAGS):
        return _read_lists(file, problem, names, subject, settings)
    dropped = dropped_names(settings.drop_labels, as_written=False)
    rows, left_out = read_labels(path, file.labels, dropped, as_written=False)
    check_dropped(dropped, [(rows, left_out)])
    _check_rows(path, rows.numbers, left_out)
    if settings.label_names:
        rows = resolve_numbers(rows, settings.label_names)
    if names:
        labels = np.array(_numbers(rows, names, subject), dtype=np.int64)
    else:
        check_scores(rows, len(judge.labels))
        labels = np.array([label.value for label in rows.labels], dtype=np.float32)
    positive = positive_class(names, settings.positive)
    return split_of(file, rows.numbers, left_out, labels, names, positive)


def with_problem(settings: TaskSettings, problem: str) -> TaskSettings:
    """Return the settings for reading a file's texts for a model with that problem."""
    return settings.model_copy(update={"problem": TAGS}) if problem == TAGS else settings


def _read_lists(
    file: TaskFile, problem: str, names: tuple[str, ...], subject: str, settings: TaskSettings
) -> TaskData:
    """Read rows that have several labels, or tokens with tags."""
    dropped = dropped_names(settings.drop_labels, as_written=True)
    parse_several = partial(parse_labels, separator=settings.label_separator)
    parse = parse_words if problem == TAGS else parse_several
    lists, left_out = read_lists(file.path, file.labels, parse, dropped, settings.label_names)
    check_dropped(dropped, [(lists.each, left_out)])
    _check_rows(file.path, lists.numbers, left_out)
    if file.words is None:
        check_label_lists(lists, train=False)
    else:
        check_tags(lists, file.words, with_problem(settings, problem))
    numbers = _numbers(lists.each, names, subject)
    return split_of_lists(file, lists, left_out, names, numbers, settings.threshold)


def _check_rows(path: str, rows: Sequence[int], left_out: Counter[str]) -> None:
    if not rows:
        raise InputError(f"{path}: drop_labels leaves none of its {left_out.total()} rows")


def _numbers(rows: Rows, names: Sequence[str], subject: str) -> list[int]:
    """Return the number of each label among the ``names`` that ``subject`` knows."""
    index = {name: number for number, name in enumerate(names)}
    nameless = all(map(_NAMELESS.fullmatch, names))
    if nameless and rows.labels and not any(label.name in index for label in rows.labels):
        index = {str(number): number for number in range(len(names))}
        log.info(
            "%s: its labels have no names; a number is taken as that of an output, from 0", subject
        )
    numbers = [_number(label, index) for label in rows.labels]
    wrong = [place for place, number in enumerate(numbers) if number is None]
    if wrong:
        raise InputError(_unknown(rows, wrong, names, subject))
    return [number for number in numbers if number is not None]


def _number(label: Label, index: Mapping[str, int]) -> int | None:
    """Look a label up as it is written, as it is parsed (1.0 is 1), or, for true and false, in any
    case.
    """
    names = [label.raw.strip() if isinstance(label.raw, str) else label.name, label.name]
    if label.name.casefold() in ("true", "false"):
        names.append(label.name.casefold())
    return next((index[name] for name in names if name in index), None)


def _unknown(rows: Rows, wrong: Sequence[int], names: Sequence[str], subject: str) -> str:
    labels = [*dict.fromkeys(rows.labels[place].name for place in wrong)]
    row_numbers = [*dict.fromkeys(rows.numbers[place] for place in wrong)]
    numbers = ", ".join(map(str, row_numbers[:_ROWS_SHOWN]))
    more = f" … ({len(row_numbers):,} rows)" if len(row_numbers) > _ROWS_SHOWN else ""
    shown_labels = ", ".join(map(repr, labels[:_ROWS_SHOWN])) + (
        " …" if len(labels) > _ROWS_SHOWN else ""
    )
    shown_names = ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
    suggestion = did_you_mean(labels[0], names)
    if len(wrong) == len(rows.labels):
        advice = "It knows none of the file's labels: check the model, the file and --label-field"
    else:
        setting = shlex.quote(f"drop_labels={json.dumps(labels, ensure_ascii=False)}")
        advice = f"Correct them, or leave such rows out with --set {setting}"
    return (
        f"{rows.path}, row {numbers}{more}: {subject} does not know the "
        f"label{'s' * (len(labels) > 1)} {shown_labels}; it knows {len(names)}: "
        f"{shown_names}{suggestion or '.'} {advice}"
    )
