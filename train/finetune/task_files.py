"""Reads the texts and labels of one file, as they are written; ``labels`` decides what they mean.

Files: jsonl, csv (double quotes quote), tsv (as GLUE publishes it: nothing quotes), each also .gz,
.zst or .bz2, and parquet. Rows in messages count from 1, without a csv's header and blank lines.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.source.record import BadRecord
from rekindle.data.source.records import read_records
from rekindle.data.source.sources import Origin, recorded_origin
from rekindle.data.text_files import PACKED_SUFFIXES, is_file, surrogate_problem
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.finetune.label_lists import TAGS, parse_words
from rekindle.train.ranking.groups import group_names
from rekindle.train.ranking.kinds import RANKING

_FORMATS = ("jsonl", "csv", "tsv", "parquet")
# Columns of texts, in this order, and of tokens with their tags.
_RANKED, _GROUP = ("query", "document"), "group"
_USUAL = (("text",), ("sentence1", "sentence2"), ("sentence1",), _RANKED, ("tokens",))
_TAGS = "tags"
_SAY_TEXT = "--text-field (in a cycle: finetune.text_field)"
_Columns = dict[str, list[object]]


class TaskFile(NamedTuple):
    """The rows of one file; ``pairs`` are the second texts, ``labels`` as they are written.

    ``words`` are the tokens of each text, if it is given as tokens; then the text is these, joined
    by blanks. ``groups`` are those of documents to rank; ``has_group_names``: by a field of their
    own, else by their queries.
    """

    path: str
    texts: list[str]
    pairs: list[str] | None
    labels: list[object]
    words: list[list[str]] | None = None
    groups: list[str] | None = None
    has_group_names: bool = False


def read_file(path: str, settings: TaskSettings) -> TaskFile:
    """Read the columns of a task; InputError, naming the row, for a text that is not one."""
    if not is_file(path):
        problem_text = (
            f"{path!r} is not a file" if os.path.exists(path) else f"no such file: {path!r}"
        )
        raise InputError(f"{problem_text}; give a jsonl, csv, tsv or parquet file")
    origin = recorded_origin(path)
    if origin.format not in _FORMATS:
        raise InputError(
            f"{path}: unknown type of file; a task is .jsonl, .csv or .tsv (each also packed: "
            f"{', '.join(PACKED_SUFFIXES)}) or .parquet: rename or convert it"
        )
    column_names = {
        *settings.text_field,
        settings.label_field,
        _TAGS,
        *(n for u in _USUAL for n in u),
    }
    column_names |= {settings.group_field or _GROUP}
    columns = _read_records(origin, column_names)
    if not columns or not next(iter(columns.values())):
        raise InputError(f"{path} has no rows; give at least one labelled example")
    label_field = settings.label_field
    if label_field == "label" not in columns and {"tokens", _TAGS} <= columns.keys():
        label_field = _TAGS
    names = text_fields(path, [*columns], settings, label_field)
    if label_field not in columns:
        raise InputError(
            f"{path} has no column {label_field!r} (it has: {', '.join(columns)}"
            f"{did_you_mean(label_field, columns)}); name that of the labels with "
            "--label-field (in a cycle: finetune.label_field)"
        )
    labels = columns[label_field]
    tokens_unread = "tokens" in columns and names != ("tokens",) and not settings.text_field
    if tokens_unread and settings.problem is None and any(isinstance(one, list) for one in labels):
        raise InputError(
            f"{path} has {' and '.join(names)} and tokens, and {label_field} holds lists: the tags "
            f"of the tokens, or labels of the text; say which is read with {_SAY_TEXT}"
        )
    if _are_tokens(path, names, columns, settings):
        words = [
            row_words(path, names[0], row, raw) for row, raw in enumerate(columns[names[0]], 1)
        ]
        return TaskFile(path, [*map(" ".join, words)], None, labels, words)
    for name in names:
        for row, value in enumerate(columns[name], start=1):
            if not isinstance(value, str):
                given = "missing" if value is None else f"{value!r}, a {type(value).__name__}"
                raise InputError(f"{path}, row {row}: {name} must be a string (given: {given})")
            if problem := surrogate_problem(name, value):
                raise InputError(f"{path}, row {row}: {problem}")
    texts = [cast("list[str]", columns[name]) for name in names]
    if not any(one.strip() for column in texts for one in column):
        raise InputError(
            f"{path} has no text in any of its rows ({', '.join(names)}); name the column of the "
            f"texts with {_SAY_TEXT}"
        )
    pairs = texts[1] if len(texts) > 1 else None
    file = TaskFile(path, texts[0], pairs, labels)
    return _grouped(file, names, columns, settings) if _ranks(names, settings) else file


def check_same_form(files: Sequence[TaskFile]) -> None:
    """Raise InputError if only some splits of a task have tokens, groups or pairs."""
    train = files[0]
    for other in files[1:]:
        if (train.words is None) != (other.words is None):
            has, lacks = (train, other) if other.words is None else (other, train)
            raise InputError(
                f"{has.path} has tokens but {lacks.path} has texts; the splits of one task are all "
                "of one kind: name their fields with --text-field and --label-field"
            )
        if (train.groups is None) != (other.groups is None):
            has, lacks = (train, other) if other.groups is None else (other, train)
            raise InputError(
                f"{has.path} has queries and documents but {lacks.path} has not; the splits of one "
                "task are all rankings or none is: name their fields, or say --set problem=ranking"
            )
        if (train.pairs is None) != (other.pairs is None):
            has, lacks = (train, other) if other.pairs is None else (other, train)
            raise InputError(
                f"{has.path} has sentence2 (or a second text field) but {lacks.path} has not; the "
                "splits of one task are all pairs or all single texts: add it or remove it"
            )


def _ranks(names: Sequence[str], settings: TaskSettings) -> bool:
    """Return whether a file with those columns of texts has documents to rank."""
    if settings.problem is not None:
        return settings.problem == RANKING
    return settings.group_field is not None or tuple(names) == _RANKED


def _grouped(
    file: TaskFile, names: Sequence[str], columns: _Columns, settings: TaskSettings
) -> TaskFile:
    """Return the file with the groups of its documents; raise InputError if it has no documents, or
    lacks the named field.
    """
    if file.pairs is None:
        raise InputError(
            f"{file.path} has one text a row, {names[0]}; a ranking needs queries and documents: "
            f"name both columns with {_SAY_TEXT}, the query's first"
        )
    field = settings.group_field or _GROUP
    if field in columns:
        groups = group_names(file.path, field, columns[field])
        return file._replace(groups=groups, has_group_names=True)
    if settings.group_field is not None:
        raise InputError(
            f"{file.path} has no column {field!r} (it has: {', '.join(columns)}"
            f"{did_you_mean(field, columns)}); name that of the queries' ids with --set "
            "group_field=… (in a cycle: finetune.group_field), or leave it out: rows of one query "
            "text are a group then"
        )
    return file._replace(groups=[*file.texts])


def text_fields(
    path: str, columns: Sequence[str], settings: TaskSettings, label_field: str
) -> tuple[str, ...]:
    """Return the columns of texts; raise InputError if they are missing or ambiguous."""
    columns_text = f"it has: {', '.join(columns)}"
    if missing := [name for name in settings.text_field if name not in columns]:
        raise InputError(
            f"{path} has no column {missing[0]!r} "
            f"({columns_text}{did_you_mean(missing[0], columns)}); name that of the texts with "
            f"{_SAY_TEXT}"
        )
    if settings.text_field:
        return settings.text_field
    if "tokens" in columns and (label_field == _TAGS or settings.problem == TAGS):
        return ("tokens",)
    usable = [usual for usual in _USUAL if all(name in columns for name in usual)]
    if settings.problem == RANKING or settings.group_field is not None:
        usable.sort(key=lambda usual: usual != _RANKED)
    if not usable:
        raise InputError(
            f"{path} has no column 'text', 'sentence1' or 'tokens' ({columns_text}); name that of "
            f"the texts with {_SAY_TEXT}, given twice for pairs"
        )
    if usable[0] != _RANKED and _RANKED in usable:
        raise InputError(
            f"{path} has both {usable[0][0]!r} and 'query' with 'document' ({columns_text}); say "
            f"which is meant with {_SAY_TEXT}"
        )
    if "text" in columns and "sentence1" in columns:
        raise InputError(
            f"{path} has both 'text' and 'sentence1' ({columns_text}); say which is meant with "
            f"{_SAY_TEXT}"
        )
    return usable[0]


def _are_tokens(path: str, names: Sequence[str], columns: _Columns, settings: TaskSettings) -> bool:
    """Return whether a text is given as its tokens: by ``settings``, by its column's name, or
    because it is a list.
    """
    first = next((value for value in columns[names[0]] if value is not None), None)
    if settings.problem != TAGS and (
        settings.problem is not None or (names != ("tokens",) and not isinstance(first, list))
    ):
        return False
    if len(names) > 1:
        raise InputError(
            f"{path}: {' and '.join(names)} are two fields, but tokens with tags are not pairs of "
            "texts; name the one column of the tokens"
        )
    return True


def row_words(path: str, name: str, row: int, raw: object) -> list[str]:
    """Return the tokens of one row; raise InputError if they are not tokens."""
    words = parse_words(raw)
    bad_word = (
        raw if words is None else next((one for one in words if not isinstance(one, str)), None)
    )
    if words is None or bad_word is not None:
        given = "missing" if bad_word is None else f"{bad_word!r}, a {type(bad_word).__name__}"
        raise InputError(
            f"{path}, row {row}: {name} must be a list of strings, or a text with blanks between "
            f"its tokens (given: {given})"
        )
    tokens = [str(word) for word in words]
    if problem := surrogate_problem(name, " ".join(tokens)):
        raise InputError(f"{path}, row {row}: {problem}")
    return tokens


def _read_records(origin: Origin, column_names: set[str]) -> _Columns:
    """Return the rows of a file by column; columns outside ``column_names`` may hold only None."""
    rows: list[Mapping[str, object]] = []
    for record in read_records(origin, sorted(column_names)):
        if isinstance(record, BadRecord):
            raise InputError(record.message)
        rows.append(record.values)
    fields = dict.fromkeys(field for row in rows for field in row)
    return {field: [row.get(field) for row in rows] for field in fields}
