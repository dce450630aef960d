"""Groups of documents: their names in files, checks of them, and batches of whole ones."""

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.train.ranking.scores import Ints, ordered, parts_of

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


class Grouped(NamedTuple):
    """The documents of one file: ``groups`` and ``queries`` are texts, ``numbers`` their rows in
    the file. ``named``: whether the file names the groups; otherwise the queries are the groups.
    """

    path: str
    groups: Sequence[str]
    queries: Sequence[str]
    numbers: Sequence[int]
    named: bool


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


def numbered(names: Sequence[str]) -> Ints:
    """Return a number for each name, by first appearance: int64 [N]."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], np.int64)


def grades_of(path: str, labels: Sequence[Graded], numbers: Sequence[int]) -> NDArray[np.float32]:
    """Return the grades [N] of labels in the rows ``numbers``: numbers as they are, clicks as 0 and
    1. Raises InputError, naming the row, for other labels, for a mixture of both, and for a grade
    that is negative or too large.
    """
    for label, row in zip(labels, numbers, strict=True):
        if label.kind not in ("a boolean", "a number") or label.kind != labels[0].kind:
            beside = f", but row {numbers[0]} has {labels[0].raw!r}" if row != numbers[0] else ""
            raise InputError(
                f"{path}, row {row}: label {label.raw!r} is {label.kind}{beside}; a ranking has "
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


def check_order(found: Grouped, grades: NDArray[np.float32]) -> None:
    """Raise InputError if no group has documents of different grades; log how many lack them, and
    what is odd about the others.
    """
    parts = parts_of(numbered(found.groups))
    told = ordered(grades, parts)
    if not told:
        single = sum(len(rows) == 1 for rows in parts)
        ones = f", and {single:,} of them have one document" if single else ""
        whose = "the field of the groups (--set group_field=…)" if found.named else (
            "a field of groups (--set group_field=…), for each query text is a group now"
        )  # fmt: skip
        raise InputError(
            f"{found.path} has {counted(len(parts), 'group')}, and in none are there documents of "
            f"different grades{ones}: no order is better than another. Give documents that are "
            f"less relevant, too, or name {whose}"
        )
    if not found.named:
        log.info(
            "%s has no field of groups: all rows of one query text are a group, %s",
            *(found.path, counted(len(parts), "group")),
        )
        return
    for rows in parts:
        first = found.queries[rows[0]]
        other = next((row for row in rows[1:].tolist() if found.queries[row] != first), None)
        if other is not None:
            log.warning(
                "%s: the group %r has more than one query: row %d has %.40r, row %d has %.40r; "
                "their documents are compared with each other",
                *(found.path, found.groups[other], found.numbers[rows[0]], first),
                *(found.numbers[other], found.queries[other]),
            )
            return


def told_groups(groups: Ints, grades: NDArray[np.floating]) -> str:
    """Return how many groups there are, how large, and how many of them have no order."""
    parts = parts_of(groups)
    sizes = [len(rows) for rows in parts]
    silent = len(parts) - len(ordered(grades, parts))
    span = f"{min(sizes):,}" + (f" to {max(sizes):,}" if max(sizes) > min(sizes) else "")
    told = f"in {counted(len(parts), 'group')} of {span}, grades "
    told += f"{grades.min():.4g} to {grades.max():.4g}"
    if not silent:
        return told
    return (
        f"{told}; {counted(silent, 'group')} of one document, or of one grade throughout: left out "
        "of the scores and of losses that compare"
    )


def refuse_split(files: Sequence[Grouped]) -> None:
    """Raise InputError for a group that is in two files: scores would be on training data. Ids that
    another file uses again for another query are no problem.
    """
    for number, one in enumerate(files):
        known = dict(zip(zip(one.groups, one.queries, strict=True), one.numbers, strict=True))
        for other in files[number + 1 :]:
            if other.path == one.path:
                continue
            for key, row in zip(
                zip(other.groups, other.queries, strict=True), other.numbers, strict=True
            ):
                if key in known:
                    raise InputError(
                        f"{other.path}, row {row}: the group {key[0]!r} with its query is also in "
                        f"{one.path} (row {known[key]}); all documents of a query belong into "
                        "one split, or what was trained on is scored. Put them into one file"
                    )


def groups_in_order(groups: Ints, random: np.random.Generator) -> Ints:
    """Return the rows [N], one group after another, with the groups in random order."""
    places = random.permutation(int(groups.max()) + 1)
    return np.argsort(places[groups], kind="stable")


def whole_until(groups: Ints, count: int) -> int:
    """Return how many rows, sorted by group, whole groups take: at most ``count``, unless the first
    group is larger.
    """
    ends = np.append(np.flatnonzero(np.diff(groups)) + 1, len(groups))
    return int(ends[max(0, int(np.searchsorted(ends, count, side="right")) - 1)])


def batches_of_groups(
    groups: Ints, lengths: Ints, batch_size: int, *, seed: int, epoch: int, taught: Ints
) -> list[Ints]:
    """Return the rows of each batch of an epoch: every group of the ``taught`` rows whole, in one
    batch.

    Groups are shuffled and combined while they fit into ``batch_size``; a larger one is a batch of
    its own. In a batch rows are sorted by descending length. A pure function of its arguments.
    """
    parts = [taught[rows] for rows in parts_of(groups[taught])]
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
    whole = [np.concatenate(batch) for batch in batches]
    return [rows[np.argsort(-lengths[rows], kind="stable")] for rows in whole]


def tell_large(groups: Ints, batch_size: int) -> None:
    """Log that a group is larger than a batch."""
    largest = int(np.unique(groups, return_counts=True)[1].max())
    if largest > batch_size:
        log.warning(
            "the largest group has %d documents, more than batch_size %d: a group is never split, "
            "so that its step takes the memory of %d",
            *(largest, batch_size, largest),
        )


def taught_rows(groups: Ints, grades: NDArray[np.floating], pointwise: bool) -> Ints:
    """Return the rows that a loss is over: all if ``pointwise``, else those of groups with an
    order.
    """
    if pointwise:
        return np.arange(len(groups))
    return np.sort(np.concatenate(ordered(grades, parts_of(groups))))
