"""Labels of which a row has several: those that hold for a text, or the tags of its tokens.

``labels`` defines what a single one means, here too. Knows no file and no model.
"""

import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import chain
from typing import NamedTuple, NoReturn

from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.text_files import surrogate_problem
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.finetune.labels import (
    SAY_SCORES,
    SAY_SEVERAL,
    Label,
    Raw,
    Rows,
    drop_setting,
    read_label,
)

log = logging.getLogger("rekindle")

SEVERAL, TAGS = "multi_label_classification", "token_classification"
SAY_TAGS = "--set problem=token_classification (every number is the name of a tag)"
_SAY_NAMES = "name them, in their order, with --set 'label_names=[…]'"
_QUOTED = re.compile(r"""'[^'\\]*'|"[^"\\]*\"""")
_PYTHON = re.compile(rf"\[\s*(?:(?:{_QUOTED.pattern})(?:\s*,\s*(?:{_QUOTED.pattern}))*)?\s*\]")

List = tuple[object, ...]
ListReader = Callable[[Raw], List | None]


class Lists(NamedTuple):
    """The labels of one file's rows, without those left out: ``each`` label of all rows, one after
    another, and how many each row has.
    """

    each: Rows
    lengths: list[int]
    numbers: list[int]  # of the rows, counted from 1


def parse_list(raw: Raw) -> List | None:
    """Return a list, also from a text that is one in JSON or Python; None for anything else.

    A Python list must have quoted names, as pandas writes them into a csv.
    """
    if isinstance(raw, list | tuple):
        return tuple(raw)
    text = raw.strip() if isinstance(raw, str) else ""
    if text.startswith("[") and text.endswith("]"):
        with suppress(ValueError, RecursionError):
            return tuple(json.loads(text))
        if _PYTHON.fullmatch(text):
            return tuple(name[1:-1] for name in _QUOTED.findall(text))
    return None


def parse_labels(raw: Raw, separator: str | None) -> List | None:
    """Return the labels of one text: ``parse_list``, or the parts between separators (none for an
    empty text).
    """
    if isinstance(raw, str) and separator is not None:
        return tuple(part for one in raw.split(separator) if (part := one.strip()))
    return parse_list(raw)


def parse_words(raw: Raw) -> List | None:
    """Return the words, or the tags, of one text: a list of them, or the text split at
    white space.
    """
    words = parse_list(raw)
    if isinstance(raw, str) and (words is None or not all(isinstance(one, str) for one in words)):
        return tuple(raw.split())  # "[1]" is a word
    return words


def has_label_lists(path: str, labels: Sequence[Raw], settings: TaskSettings) -> bool:
    """Return whether the labels of a task's train file are lists of names, by ``settings`` or by
    their form. Raises InputError for lists of whole numbers that cannot be scores.
    """
    if settings.problem is not None or settings.label_separator is not None:
        return settings.problem in (None, SEVERAL)
    lists = [
        (row, labels_of_row)
        for row, raw in enumerate(labels, 1)
        if (labels_of_row := parse_list(raw)) is not None
    ]
    if not lists:
        return False
    values = [*chain.from_iterable(labels_of_row for _, labels_of_row in lists)]
    if not values or settings.label_names or not all(map(_is_number, values)):
        return True
    row = next((row for row, labels_of_row in lists if len(labels_of_row) < 2), 0)
    if row and all(_is_whole(value) for value in values):
        raise InputError(
            f"{path}, row {row}: label {labels[row - 1]!r}: lists of whole numbers may be the "
            f"numbers of classes that do not exclude each other; say {SAY_SEVERAL}, or {_SAY_NAMES}"
        )
    return False


def _is_number(value: object) -> bool:
    """Return whether it is a number, also one written as text: what is written alike means the
    same.
    """
    if not isinstance(value, str):
        return isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return isinstance(read_label(value).value, float)
    except ValueError:
        return False


def _is_whole(value: object) -> bool:
    """Return whether a number is whole; another reader refuses one that is too large."""
    return isinstance(value, int) or float(str(value)).is_integer()


def refuse_joined(files: Sequence[tuple[str, Sequence[Raw]]], dropped: frozenset[str]) -> None:
    """Raise InputError for single labels that join others of the task's ``files``, as ``a;b`` does:
    they may be several labels of one text. "Salt Lake, Utah" alone joins none; paths in a tree,
    ``animal|dog``, ``animal|cat``, ``plant|rose``, ``plant|oak``, are classes, which is logged.
    """
    texts = [(path, [_single(raw) for raw in labels]) for path, labels in files]
    names = {name for _, row_names in texts for name in row_names if name} - dropped
    # an empty one: none holds for that text
    all_named = all(name for _, row_names in texts for name in row_names)
    for separator in ";|,":
        uses = Counter(part for name in names for part in {*_parts(name, separator)})
        joined = {name for name in names if _joins(_parts(name, separator), separator, uses)}
        if joined and separator == "|" and all_named and _are_paths(names):
            log.warning(
                "labels such as %r are taken as classes as they are written: paths in a tree, of "
                "equal length; if they are several labels of one text, say --set %s",
                min(joined),
                _say_separator(separator),
            )
            continue
        for path, row_names in texts if joined else ():
            if row := next((row for row, name in enumerate(row_names, 1) if name in joined), 0):
                _refuse_join(path, row, row_names, separator, joined)


def _single(raw: Raw) -> str | None:
    """Return a label as text; None for a missing one, or a list."""
    single = isinstance(raw, str | int) and parse_list(raw) is None
    return str(raw).strip() if single else None


def _parts(name: str, separator: str) -> list[str]:
    return [part for one in name.split(separator) if (part := one.strip())]


def _joins(parts: Sequence[str], separator: str, uses: Counter[str]) -> bool:
    """Return whether a label's parts occur elsewhere: all of them, for names contain commas too."""
    elsewhere = [uses[part] > 1 for part in parts]
    return len(parts) > 1 and (all(elsewhere) if separator == "," else any(elsewhere))


def _are_paths(names: Collection[str]) -> bool:
    """Return whether labels are paths in trees, at least two, each of which branches at its root:
    with equally many parts, and each part below only one other. Several labels of one text are
    hardly ever so.
    """
    parents: dict[str, tuple[int, str]] = {}
    paths = [_parts(name, "|") for name in names]
    for parts in paths:
        for depth, part in enumerate(parts):
            place = (depth, parts[depth - 1] if depth else "")
            if parents.setdefault(part, place) != place:
                return False
    branches = Counter(root for depth, root in parents.values() if depth == 1)
    roots = [part for part, (depth, _) in parents.items() if not depth]
    equal_depth = len({len(parts) for parts in paths}) == 1
    return equal_depth and len(roots) > 1 and all(branches[root] > 1 for root in roots)


def _say_separator(separator: str) -> str:
    return shlex.quote(f'label_separator="{separator}"')


def _refuse_join(
    path: str, row: int, row_names: Sequence[str | None], separator: str, joined: set[str]
) -> NoReturn:
    setting = _say_separator(separator)
    empty = row_names.count("")
    empty_rows = ""
    if empty:
        empty_rows = f"; then none holds in {counted(empty, 'row')} with an empty label"
    rows = counted(sum(one in joined for one in row_names), "row")
    raise InputError(
        f"{path}, row {row}: label {row_names[row - 1]!r} joins labels of other rows with "
        f"{separator!r} (such labels: {rows}); if these are several labels of one text, say --set "
        f"{setting} (in a cycle: finetune.label_separator{empty_rows}); if each is a class as it "
        "is written, say --set problem=classification"
    )


def read_lists(
    path: str,
    raw: Sequence[Raw],
    read: ListReader,
    dropped: frozenset[str],
    label_names: Sequence[str] = (),
) -> tuple[Lists, Counter[str]]:
    """Read the labels of each row, without rows that have one in ``dropped`` ("": without any
    list), and count these. Raises InputError, naming the row, for anything but a list of names.
    """
    lists, left_out = Lists(Rows(path, [], []), [], []), Counter[str]()
    for number, value in enumerate(raw, start=1):
        row_labels = read(value)
        if value is None or (row_labels is None and isinstance(value, str) and not value.strip()):
            if "" not in dropped:
                raise InputError(
                    f"{path}, row {number}: label is missing (given: {value!r}; a text without "
                    "labels has an empty list); add it, or leave such rows out with "
                    f"{drop_setting('')}"
                )
            left_out[""] += 1
            continue
        if row_labels is None:
            example = next((row for row, one in enumerate(raw, 1) if read(one) is not None), 0)
            contrast = f", as that of row {example} is" if example else ""
            raise InputError(
                f"{path}, row {number}: label {value!r} is not a list of labels{contrast}; write "
                f'["{str(value)[:40]}"] for one label, or say what stands between several with '
                "label_separator, as in --set 'label_separator=\";\"'"
            )
        try:
            labels = [_label_of(one, label_names) for one in row_labels]
        except ValueError as error:
            raise InputError(f"{path}, row {number}: label {_short(value)}: {error}") from None
        if dropped_name := next((one.name for one in labels if one.name in dropped), None):
            left_out[dropped_name] += 1
            continue
        lists.each.labels.extend(labels)
        lists.each.numbers.extend([number] * len(labels))
        lists.lengths.append(len(labels))
        lists.numbers.append(number)
    return lists, left_out


def _label_of(value: object, label_names: Sequence[str]) -> Label:
    """Return one label of a list; raise ValueError, with a message, if it is not a name."""
    if value is None or isinstance(value, bool | list | tuple | dict):
        raise ValueError(
            f"{value!r} in a list is not a label; give the names of the labels that hold"
        )
    if isinstance(value, str):
        if problem := surrogate_problem("label", value):
            raise ValueError(problem)
        name = value.strip()
        if not name:
            raise ValueError("a label in it is empty; give it a name, or take it out")
        return resolve_number(Label(value, name, name), label_names)
    label = read_label(value)
    if not isinstance(label.value, float) or not label.value.is_integer():
        raise ValueError(f"{value!r} is not a label: give names, or whole numbers")
    return resolve_number(Label(value, label.name, label.name), label_names)


def resolve_number(label: Label, label_names: Sequence[str]) -> Label:
    """Return the label that a whole number stands for in ``label_names``, if there are any; a name
    unchanged. Raises ValueError for a number outside.
    """
    if not label_names or not label.name.lstrip("-").isdecimal():
        return label
    if not 0 <= (number := int(label.name)) < len(label_names):
        raise ValueError(
            f"{label.name} is not the number of a label: label_names has {len(label_names)}, and "
            f"the first is 0; name them all, or leave such rows out with {drop_setting(label.name)}"
        )
    return Label(label.raw, label_names[number], label_names[number])


def resolve_numbers(rows: Rows, label_names: Sequence[str]) -> Rows:
    """Return single labels ``resolve_number``; InputError, naming the row, for a number outside."""
    labels: list[Label] = []
    for place, label in enumerate(rows.labels):
        try:
            labels.append(resolve_number(label, label_names))
        except ValueError as error:
            rows.refuse(place, f"label {error}")
    return rows._replace(labels=labels)


def check_settings(settings: TaskSettings) -> None:
    """Raise InputError for settings of labels that contradict each other."""
    problem, names = settings.problem, settings.label_names
    if settings.label_separator is not None and problem not in (None, SEVERAL):
        raise InputError(
            f"label_separator is {settings.label_separator!r}, but problem {problem}: only labels "
            "of which several may hold are separated; leave one of the two out"
        )
    if names and problem == "regression":
        raise InputError(
            "label_names are names of classes, but problem is regression; leave one out"
        )
    if len({*names}) < len(names):
        raise InputError(
            f"label_names has a name twice: {', '.join(names)}; give each number its own"
        )


def check_label_lists(lists: Lists, train: bool) -> None:
    """Raise InputError for a label that is twice in a row, and for ``train`` lists that have 0 or 1
    for every label instead of naming those that hold.
    """
    rows = [*_by_row(lists)]
    all_binary = all({one.name for one in row} <= {"0", "1"} for row in rows)
    are_numbers = all_binary and not any(isinstance(one.raw, str) for one in lists.each.labels)
    if train and are_numbers and len({*lists.lengths}) == 1 and lists.lengths[0] > 1:
        raise InputError(
            f"{lists.each.path}, row {lists.numbers[0]}: label {[one.raw for one in rows[0]]}: "
            "every row has a 0 or a 1 for each label; give the names, or the numbers, of the "
            f"labels that hold. If they are scores, say {SAY_SCORES}"
        )
    for number, row in zip(lists.numbers, rows, strict=True):
        repeated = [name for name, count in Counter(one.name for one in row).items() if count > 1]
        if repeated:
            raise InputError(
                f"{lists.each.path}, row {number}: label {repeated[0]!r} is twice in the list; "
                "name each label that holds once"
            )


def check_tags(lists: Lists, words: Sequence[Sequence[str]], settings: TaskSettings) -> None:
    """Raise InputError if a row does not have one tag for each of its ``words`` (by row of the
    file), or if tags are numbers without a known meaning.
    """
    for number, length in zip(lists.numbers, lists.lengths, strict=True):
        if length != len(words[number - 1]):
            raise InputError(
                f"{lists.each.path}, row {number}: {len(words[number - 1])} tokens, but {length} "
                "tags; each token has one tag"
            )
    has_names = settings.problem is not None or settings.label_names
    labels = lists.each.labels
    if not has_names and labels and all(_is_number(label.raw) for label in labels):
        lists.each.refuse(
            0,
            f"tag {lists.each.labels[0].raw!r}: all tags are numbers, which do not show where an "
            f"entity begins; {_SAY_NAMES}, or say {SAY_TAGS}",
        )


def _by_row(lists: Lists) -> list[list[Label]]:
    labels = iter(lists.each.labels)
    return [[next(labels) for _ in range(length)] for length in lists.lengths]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} …"
