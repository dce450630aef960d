"""Groups of documents: their names in files, checks of them, and batches of whole ones."""

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.train.ranking.scores import Ints, groups_with_order, parts_of

log = logging.getLogger("rekindle")


class Graded(Protocol):
    """A label as a file has it."""

    @property
    def raw(self) -> object:
        """The label as it is written."""

    @property
    def value(self) -> object:
        """The label's meaning."""

    @property
    def kind(self) -> str:
        """The label's type in the words of a message."""


class GroupedFile(NamedTuple):
    """The documents of one file: ``groups`` and ``queries`` are texts, ``numbers`` their rows in
    the file. ``has_group_names``: whether the file names the groups; otherwise the queries are
    the groups.
    """

    path: str
    groups: Sequence[str]
    queries: Sequence[str]
    numbers: Sequence[int]
    has_group_names: bool


def group_names(path: str, field: str, column: Sequence[object]) -> list[str]:
    """Return the groups of a file's rows, as text; raise InputError, naming the row, for a value
    that is not a group's id.
    """
    names = []
    for row, value in enumerate(column, start=1):
        missing = value is None or (isinstance(value, float) and np.isnan(value))
        text = "" if missing else str(value).strip()
        if not text or isinstance(value, list | tuple | dict | bytes | bool):
            given = "missing" if missing else f"{value!r}, a {type(value).__name__}"
            raise InputError(
                f"{path}, row {row}: {field} must be the id of the row's query, text or a number "
                f"(given: {given}); documents of one query have the same"
            )
        names.append(text)
    return names


def number_names(names: Sequence[str]) -> Ints:
    """Return a number for each name, by first appearance: int64 [N]."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def grades_of(path: str, labels: Sequence[Graded], numbers: Sequence[int]) -> NDArray[np.float32]:
    """Return the grades [N] of labels in the rows ``numbers``: numbers as they are, clicks as 0 and
    1. Raises InputError, naming the row, for other labels, for a mixture of both, and for a grade
    that is negative or too large.
    """
    for label, row in zip(labels, numbers, strict=True):
        if label.kind not in ("a boolean", "a number") or label.kind != labels[0].kind:
            contrast = f", but row {numbers[0]} has {labels[0].raw!r}" if row != numbers[0] else ""
            raise InputError(
                f"{path}, row {row}: label {label.raw!r} is {label.kind}{contrast}; a ranking has "
                "grades (numbers from 0 on) or clicks (true, false), one kind throughout"
            )
    with np.errstate(over="ignore"):  # refused below
        grades = np.array([label.value for label in labels], np.float32)
    for place in np.flatnonzero(~np.isfinite(grades))[:1].tolist():
        raise InputError(
            f"{path}, row {numbers[place]}: label {labels[place].raw!r} is too large; a grade is a "
            f"number from 0 to {np.finfo(np.float32).max:.1e}: divide all of them, or drop the row"
        )
    for place in np.flatnonzero(grades < 0)[:1].tolist():
        raise InputError(
            f"{path}, row {numbers[place]}: label {labels[place].raw!r} is negative; a grade "
            "tells how relevant the document is, from 0 on: add a number that makes the least 0"
        )
    return grades


def check_order(file: GroupedFile, grades: NDArray[np.float32]) -> None:
    """Raise InputError if no group has documents of different grades; log how many lack them, and
    what is odd about the others.
    """
    parts = parts_of(number_names(file.groups))
    with_order = groups_with_order(grades, parts)
    if not with_order:
        single = sum(len(rows) == 1 for rows in parts)
        details = f", and {single:,} of them have one document" if single else ""
        advice = "the field of the groups (--set group_field=…)" if file.has_group_names else (
            "a field of groups (--set group_field=…), for each query text is a group now"
        )  # fmt: skip
        raise InputError(
            f"{file.path} has {counted(len(parts), 'group')}, and in none are there documents of "
            f"different grades{details}: no order is better than another. Give documents that are "
            f"less relevant, too, or name {advice}"
        )
    if not file.has_group_names:
        log.info(
            "%s has no field of groups: all rows of one query text are a group, %s",
            *(file.path, counted(len(parts), "group")),
        )
        return
    for rows in parts:
        first = file.queries[rows[0]]
        row = next((row for row in rows[1:].tolist() if file.queries[row] != first), None)
        if row is not None:
            log.warning(
                "%s: the group %r has more than one query: row %d has %.40r, row %d has %.40r; "
                "their documents are compared with each other",
                *(file.path, file.groups[row], file.numbers[rows[0]], first),
                *(file.numbers[row], file.queries[row]),
            )
            return


def describe_groups(groups: Ints, grades: NDArray[np.floating]) -> str:
    """Return how many groups there are, how large, and how many of them have no order."""
    parts = parts_of(groups)
    sizes = [len(rows) for rows in parts]
    unordered = len(parts) - len(groups_with_order(grades, parts))
    sizes_text = f"{min(sizes):,}" + (f" to {max(sizes):,}" if max(sizes) > min(sizes) else "")
    summary = f"in {counted(len(parts), 'group')} of {sizes_text}, grades "
    summary += f"{grades.min():.4g} to {grades.max():.4g}"
    if not unordered:
        return summary
    return (
        f"{summary}; {counted(unordered, 'group')} of one document, or of one grade throughout: "
        "left out of the scores and of losses that compare"
    )


def check_groups_unsplit(files: Sequence[GroupedFile]) -> None:
    """Raise InputError for a group that is in two files: scores would be on training data. Ids that
    another file uses again for another query are no problem.
    """
    for number, file in enumerate(files):
        known_rows = dict(
            zip(zip(file.groups, file.queries, strict=True), file.numbers, strict=True)
        )
        for other_file in files[number + 1 :]:
            if other_file.path == file.path:
                continue
            for key, row in zip(
                zip(other_file.groups, other_file.queries, strict=True),
                other_file.numbers,
                strict=True,
            ):
                if key in known_rows:
                    raise InputError(
                        f"{other_file.path}, row {row}: the group {key[0]!r} with its query is "
                        f"also in {file.path} (row {known_rows[key]}); all documents of a query "
                        "belong into one split, or what was trained on is scored. Put them into "
                        "one file"
                    )


def shuffle_groups(groups: Ints, random: np.random.Generator) -> Ints:
    """Return the rows [N], one group after another, with the groups in random order."""
    places = random.permutation(int(groups.max()) + 1)
    return np.argsort(places[groups], kind="stable")


def count_whole_groups(groups: Ints, count: int) -> int:
    """Return how many rows, sorted by group, whole groups take: at most ``count``, unless the first
    group is larger.
    """
    ends = np.append(np.flatnonzero(np.diff(groups)) + 1, len(groups))
    return int(ends[max(0, int(np.searchsorted(ends, count, side="right")) - 1)])


def batches_of_groups(
    groups: Ints, lengths: Ints, batch_size: int, *, seed: int, epoch: int, chosen_rows: Ints
) -> list[Ints]:
    """Return the rows of each batch of an epoch: every group of the ``chosen_rows`` whole,
    in one batch.

    Groups are shuffled and combined while they fit into ``batch_size``; a larger one is a batch of
    its own. In a batch rows are sorted by descending length. A pure function of its arguments.
    """
    parts = [chosen_rows[rows] for rows in parts_of(groups[chosen_rows])]
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    batches: list[list[Ints]] = []
    room = 0
    for number in generator.permutation(len(parts)).tolist():
        size = len(parts[number])
        if size > room:
            batches.append([])
            room = max(batch_size, size)
        batches[-1].append(parts[number])
        room -= size
    joined = [np.concatenate(batch) for batch in batches]
    return [rows[np.argsort(-lengths[rows], kind="stable")] for rows in joined]


def warn_large_groups(groups: Ints, batch_size: int) -> None:
    """Log that a group is larger than a batch."""
    largest = int(np.unique(groups, return_counts=True)[1].max())
    if largest > batch_size:
        log.warning(
            "the largest group has %d documents, more than batch_size %d: a group is never split, "
            "so that its step takes the memory of %d",
            *(largest, batch_size, largest),
        )


def trained_rows(groups: Ints, grades: NDArray[np.floating], pointwise: bool) -> Ints:
    """Return the rows that a loss is over: all if ``pointwise``, else those of groups with an
    order.
    """
    if pointwise:
        return np.arange(len(groups))
    return np.sort(np.concatenate(groups_with_order(grades, parts_of(groups))))
