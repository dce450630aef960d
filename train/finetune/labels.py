"""Decides what the labels of a task mean, by one rule, whatever file they come from: what is
written alike means the same, so that ``"3.5"`` is a number and ``"True"`` a boolean in a jsonl too.

Doubtful labels are refused, with the setting that decides. Knows no file, no text and no model.
"""

import decimal
import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from rekindle.data.counted import counted
from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.text_files import surrogate_problem

Raw = object  # as a file gives it
Value = bool | float | str | tuple[float, ...] | None  # numbers are floats; None: no label

SHOWN = 20  # classes that a message lists
_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*|(0|[1-9][0-9]*)?\.[0-9]+|(0|[1-9][0-9]*)\.)(e[+-]?\d+)?")
_MISSING = ("", "nan", "<na>")  # how files, and pandas, write that there is no label
_DOUBTFUL = ("-1", "-", "null")  # how data sets write "no agreement": a class if two are left
_LARGEST = sys.float_info.max
_LARGEST_SCORE = 3.4e38  # what float32, in which models compute, can hold
# if most rows have a label of their own and there are so many, they are not classes
_FEWEST_IDS = 10
_AS_WRITTEN = "--set problem={} (every label is a class as it is written)"
_CLASSIFY = _AS_WRITTEN.format("classification")
SAY_SEVERAL = "--set problem=multi_label_classification (every number is the name of a label)"
SAY_SCORES = "--set problem=regression (labels are scores)"
_TRUTH = ("true", "false")
_OF_NUMBERS = ("a number", "a list of numbers")


class Label(NamedTuple):
    """One row's label. ``name`` is its class's name, the same however a file writes it."""

    raw: Raw
    value: Value
    name: str
    decimal: bool = False  # a whole number written as 3.0

    @property
    def kind(self) -> str:
        """Return its type in the words of a message."""
        kinds = {bool: "a boolean", float: "a number", str: "a word", tuple: "a list of numbers"}
        return kinds.get(type(self.value), "missing")


@dataclass(frozen=True)
class Meaning:
    """The meaning of a task's labels: classes with ``names``, or scores, ``outputs`` in
    each row.
    """

    names: tuple[str, ...] = ()
    outputs: int = 1


class Rows(NamedTuple):
    """The labels of one file without the dropped ones, and the row of each, counted from 1."""

    path: str
    labels: list[Label]
    numbers: list[int]

    def refuse(self, place: int, problem: str) -> NoReturn:
        """Raise InputError about a label, naming its row."""
        raise InputError(f"{self.path}, row {self.numbers[place]}: {problem}")


def read_label(raw: Raw, as_written: bool = False) -> Label:
    """Read a label, with the same meaning in every file; raise ValueError, with a message, if it is
    not one.

    ``as_written``: text such as 1.10, 1E5 or +1 is not a number but a name of its own; 1.0 is 1.
    """
    if isinstance(raw, bool):
        return Label(raw, raw, str(raw).lower())
    if isinstance(raw, int | float | decimal.Decimal):
        number = float(raw) if isinstance(raw, decimal.Decimal) else raw
        return _number(raw, number, not isinstance(raw, int))
    if isinstance(raw, list | tuple):
        return _scores(raw, raw)
    if raw is not None and not isinstance(raw, str):
        raise ValueError(
            f"label must be a class name, a number or a list of numbers (given: {raw!r}, a "
            f"{type(raw).__name__})"
        )
    text = (raw or "").strip()
    if problem := surrogate_problem("label", raw or ""):
        raise ValueError(problem)
    if text.casefold() in _MISSING:
        return Label(raw, None, "")
    if _NUMBER.fullmatch(text.casefold()):
        return _read_number(raw, text, as_written)
    if text.startswith("[") and text.endswith("]"):  # a csv has no other way to write a list
        try:
            return _scores(raw, json.loads(text))
        except ValueError:
            return Label(raw, text, text)
    return Label(raw, text, text)


def _read_number(raw: Raw, text: str, as_written: bool) -> Label:
    name, number = Label(raw, text, text), float(text)
    if math.isinf(number) and as_written:
        return name
    whole = text.lstrip("+-").isdecimal() and math.isfinite(number)  # too many digits: infinite
    label = _number(raw, int(text) if whole else number, not whole)
    return label if not as_written or text in (label.name, f"{label.name}.0") else name


def _number(raw: Raw, number: float, written_decimal: bool) -> Label:
    if abs(number) > _LARGEST:
        shown = f"{str(raw)[:40]}{'…' if len(str(raw)) > 40 else ''}"
        raise ValueError(
            f"label is {shown}; a number must be finite, and below 1.8e308: drop the row"
        )
    if math.isnan(number):
        return Label(raw, None, "")
    if number == int(number):
        return Label(raw, float(number), str(int(number)), written_decimal)
    return Label(raw, number, repr(number))


def _scores(raw: Raw, values: Sequence[object]) -> Label:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    finite = all(abs(number) <= _LARGEST for number in numbers)
    if len(numbers) != len(values) or len(numbers) < 2 or not finite:
        raise ValueError(
            f"label is the list {raw!r}; a list must have at least two finite numbers, the "
            "scores of one text"
        )
    return Label(raw, tuple(map(float, numbers)), json.dumps(numbers))


# ---- what they mean ----------------------------------------------------------------------------


def meaning_of(train: Rows, problem: str | None) -> Meaning:
    """Return what the labels of a task mean, judging by those of its train file.

    Without ``problem``: whole numbers, words and booleans are classes; other numbers, and lists of
    numbers, are scores. Raises InputError for labels that may mean two things.
    """
    if problem == "regression":
        return _as_scores(train)
    if problem is None:
        _refuse_mixed(train)
        kind, values = train.labels[0].kind, [label.value for label in train.labels]
        all_integers = all(number.is_integer() for value in values for number in _numbers(value))
        if kind == "a list of numbers" and all_integers:
            train.refuse(
                0,
                f"label {train.labels[0].raw!r}: lists of whole numbers may be scores, or classes "
                f"that do not exclude each other; say {SAY_SCORES} or {SAY_SEVERAL}",
            )
        if kind in _OF_NUMBERS and not all_integers:
            return _as_scores(train)
        refuse_doubtful(train)
    by_name = {label.name: label.value for label in train.labels}
    if len(by_name) < 2:
        raise InputError(
            f"{train.path}: every label is {next(iter(by_name))!r}; a classification task needs at "
            "least two classes in train"
        )
    return Meaning(sort_names(by_name))


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return names of classes, each once: sorted by number if all are numbers, else
    alphabetically.
    """
    each = {*names}
    if all(_NUMBER.fullmatch(name.casefold()) for name in each):
        return tuple(sorted(each, key=lambda name: (decimal.Decimal(name), name)))
    return tuple(sorted(each))


def _numbers(value: Value) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) if isinstance(value, float) else ()


def _refuse_mixed(train: Rows) -> None:
    first = train.labels[0]
    for place, label in enumerate(train.labels):
        if label.kind != first.kind:
            train.refuse(
                place,
                f"label {label.raw!r} is {label.kind}, but row {train.numbers[0]} has "
                f"{first.raw!r}, {first.kind}; use one type of label throughout, leave rows out "
                f"with {drop_setting(label.name)}, or say {_CLASSIFY}",
            )


def refuse_doubtful(train: Rows, problem: str = "classification") -> None:
    """Raise InputError for labels that may be missing ones, differ only in blanks or case, or are
    not classes; ``problem`` is the setting that takes them as they are written.
    """
    as_written = _AS_WRITTEN.format(problem)
    counts = Counter(label.name for label in train.labels)
    places = {label.name: place for place, label in reversed([*enumerate(train.labels)])}
    for name in _DOUBTFUL:
        if name in counts and len(counts) > 2:
            train.refuse(
                places[name],
                f"label {name!r} ({counted(counts[name], 'row')}) may be a class, or mean that "
                f"there is no label; leave these rows out with {drop_setting(name)}, or say "
                f"{as_written}",
            )
    spelled: dict[str, tuple[int, str]] = {}
    for place, label in enumerate(train.labels):
        if not isinstance(label.raw, str) or not isinstance(label.value, str):
            continue
        first_spelling = spelled.setdefault(
            " ".join(label.raw.split()).casefold(), (place, label.raw)
        )
        if first_spelling[1] != label.raw:
            train.refuse(
                place,
                f"label {label.raw!r}, but row {train.numbers[first_spelling[0]]} has "
                f"{first_spelling[1]!r}: they differ only in blanks or case; write both alike, or "
                f"say --set problem={problem} (then case makes classes of their own, and blanks "
                "around a name do not count)",
            )
    if len(counts) >= _FEWEST_IDS and len(train.labels) < 2 * len(counts):
        scores = f" or {SAY_SCORES}" if problem == "classification" else ""
        train.refuse(
            0,
            f"label {train.labels[0].raw!r}: there are {len(counts)} labels in "
            f"{len(train.labels)} rows, more like ids or scores than classes; name the field of "
            f"the labels with --label-field, or say {as_written}{scores}",
        )
    first_decimal = next((place for place, label in enumerate(train.labels) if label.decimal), None)
    if first_decimal is not None and not counts.keys() <= {"0", "1"}:
        train.refuse(
            first_decimal,
            f"label {train.labels[first_decimal].raw!r}: all are whole numbers, written as "
            f"decimals, and not 0 and 1; they may be classes or scores: say {_CLASSIFY} or "
            f"{SAY_SCORES}",
        )


def _as_scores(train: Rows) -> Meaning:
    outputs = max(1, len(_numbers(train.labels[0].value)))
    check_scores(train, outputs)
    return Meaning(outputs=outputs)


# ---- what every split has of them --------------------------------------------------------------


def check_scores(split: Rows, outputs: int) -> None:
    """Raise InputError, naming the row, for a label that is not ``outputs`` numbers."""
    for place, label in enumerate(split.labels):
        values = _numbers(label.value)
        count = len(values)
        if label.kind not in _OF_NUMBERS:
            split.refuse(
                place,
                f"label {label.raw!r} is not a number, but the train labels are scores; give "
                "numbers here, class names in every split, or leave such rows out with drop_labels",
            )
        if any(abs(value) > _LARGEST_SCORE for value in values):
            split.refuse(
                place, f"label {label.raw!r} is too large; a score is at most {_LARGEST_SCORE:.1e}"
            )
        if count != outputs:
            split.refuse(place, f"label {label.raw!r} has {count} numbers; the first has {outputs}")


def class_indices(split: Rows, names: Sequence[str], train_path: str) -> list[int]:
    """Return the number of each label in ``names``; raise InputError for one outside."""
    index = {name: number for number, name in enumerate(names)}
    numbers = [index.get(label.name, -1) for label in split.labels]
    if -1 in numbers:
        place = numbers.index(-1)
        label = split.labels[place]
        shown_names = ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
        split.refuse(
            place,
            f"label {label.name!r} does not occur in {train_path}; the labels are those of train "
            f"({len(names)}: {shown_names}){did_you_mean(label.name, names) or '.'} Correct the "
            f"label, add such rows to train, or leave them out with {drop_setting(label.name)}",
        )
    return numbers


def dropped_names(labels: Sequence[Raw], as_written: bool) -> frozenset[str]:
    """Return the names of labels whose rows are to be left out; "" for a missing one."""
    try:
        return frozenset(_to_drop(read_label(label, as_written)) for label in labels)
    except ValueError as error:
        raise InputError(f"drop_labels: {error}") from None


def _to_drop(label: Label) -> str:
    """Return its name; true and false are the same in any case, as in a csv."""
    return label.name.casefold() if label.name.casefold() in _TRUTH else label.name


def check_dropped(dropped: frozenset[str], files: Sequence[tuple[Rows, Counter[str]]]) -> None:
    """Raise InputError for a label to leave out that no file has; "" (missing) need not occur.

    ``files``: for each file the rows kept, and how many were not.
    """
    for name in sorted(dropped - {""}):
        if not any(left_out[name] for _, left_out in files):
            names = dict.fromkeys(label.name for rows, _ in files for label in rows.labels)
            shown_names = ", ".join([*names][:SHOWN]) + (" …" if len(names) > SHOWN else "")
            quoted = ' (YAML reads 09 as the number 9; write "09")' if name.isdecimal() else ""
            raise InputError(
                f"drop_labels has {name!r}, which is not a label of "
                f"{', '.join(dict.fromkeys(rows.path for rows, _ in files))} (there are: "
                f"{shown_names}){did_you_mean(name, names) or '.'} Correct it, or give it to a "
                f"task that has it{quoted}"
            )


def read_labels(
    path: str, raw: Sequence[Raw], dropped: frozenset[str], as_written: bool
) -> tuple[Rows, Counter[str]]:
    """Read the labels of a file without those in ``dropped``, by name ("" is a missing one), and
    count these. Raises InputError, naming the row, for a missing label or one that is not a label.
    """
    rows, left_out = Rows(path, [], []), Counter[str]()
    for number, value in enumerate(raw, start=1):
        try:
            label = read_label(value, as_written)
        except ValueError as error:
            raise InputError(f"{path}, row {number}: {error}") from None
        if (name := _to_drop(label)) in dropped:
            left_out[name] += 1
        elif label.value is None:
            raise InputError(
                f"{path}, row {number}: label is missing (given: {value!r}); add it, or leave such "
                f"rows out with {drop_setting('')}"
            )
        else:
            rows.labels.append(label)
            rows.numbers.append(number)
    return rows, left_out


def unify_labels(splits: Sequence[Rows], as_written: bool) -> list[Rows]:
    """Read words in the way that fits all labels of the first file: if these are true and false, in
    any case, as booleans (a csv has no others); if they are codes such as 09 and 10, none as a
    number.

    ``as_written``: nor if 1.0 occurs beside 1, 1.5 or a word, so that it is not a number either.
    """
    first = splits[0].labels
    if all(label.name.casefold() in _TRUTH for label in first):
        read = _boolean
    elif _are_codes(first) or (as_written and not _are_counts(first)):
        read = _code
    else:
        return [*splits]
    return [rows._replace(labels=[read(label) for label in rows.labels]) for rows in splits]


def _boolean(label: Label) -> Label:
    name = label.name.casefold()
    return Label(label.raw, name == "true", name) if name in _TRUTH else label


def _are_codes(labels: Sequence[Label]) -> bool:
    numerals = all(label.kind == "a number" or label.name.isdecimal() for label in labels)
    return numerals and any(label.kind == "a word" for label in labels)


def _are_counts(labels: Sequence[Label]) -> bool:
    """Return whether all are whole numbers, each written in one way."""
    written = {(label.name, label.decimal) for label in labels if isinstance(label.raw, str)}
    whole = (isinstance(label.value, float) and label.value.is_integer() for label in labels)
    return all(whole) and len(written) == len({name for name, _ in written})


def _code(label: Label) -> Label:
    name = label.raw.strip() if isinstance(label.raw, str) else label.name
    return Label(label.raw, name, name)


def drop_setting(name: str) -> str:
    """Return the setting that leaves rows with a label out ("": a missing one)."""
    setting = f"drop_labels=[{_quoted(name) if name else 'null'}]"
    return f"--set {shlex.quote(setting)} (in a cycle: finetune.drop_labels)"


def _quoted(name: str) -> str:
    """Return a label as YAML reads it in a list."""
    return json.dumps(name, ensure_ascii=False) if not _NUMBER.fullmatch(name) else name
