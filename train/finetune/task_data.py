"""A labelled task: texts or pairs of texts, each with a class, labels or scores, or tokens with a
tag each. Knows no model.

``task_files`` reads the files; ``labels`` and ``label_lists`` decide what their labels mean.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

import numpy as np

from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.train.finetune.config import TaskSettings, check_loss
from rekindle.train.finetune.entities import complete, tags_entities
from rekindle.train.finetune.label_lists import (
    SEVERAL,
    TAGS,
    Lists,
    are_several,
    check_settings,
    check_several,
    check_tags,
    named_rows,
    read_lists,
    refuse_joined,
    several_in,
    words_in,
)
from rekindle.train.finetune.labels import (
    SHOWN,
    Meaning,
    Rows,
    check_dropped,
    check_scores,
    class_indices,
    dropped_names,
    in_order,
    kept_rows,
    meaning_of,
    read_alike,
    refuse_doubtful,
)
from rekindle.train.finetune.positive import positive_class
from rekindle.train.finetune.task_files import TaskFile, read_file
from rekindle.train.ranking.groups import (
    GroupedFile,
    check_groups_unsplit,
    check_order,
    describe_groups,
    grades_of,
    number_names,
)
from rekindle.train.ranking.kinds import RANKING

T = TypeVar("T")


@dataclass(frozen=True)
class TaskData:
    """One split of a task, in the file's order.

    ``labels`` is int64 [N], class indices into ``label_names``; bool [N,C], which labels hold;
    int64 [W], a tag for each of the ``words`` of all texts, one after another; float32 scores [N],
    or [N,C] of C outputs, without names; or float32 grades [N] of documents, with ``groups`` int64
    [N], the number of each one's group. ``rows`` counts from 1 in the file; ``dropped`` counts
    those left out, by label. ``positive`` is the class for F1, if known; ``threshold`` the least
    probability at which one of several labels holds.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray
    label_names: tuple[str, ...]
    positive: str | None = None
    rows: Sequence[int] | None = None  # None: all
    dropped: dict[str, int] = field(default_factory=dict)
    words: list[list[str]] | None = None
    threshold: float = 0.5
    path: str = ""  # of the file
    groups: np.ndarray | None = None
    group_names: Sequence[str] = ()  # [N] of ``groups``

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def problem(self) -> str:
        """Return transformers' name of the problem; RANKING, which it does not know."""
        if self.words is not None:
            return TAGS
        if self.groups is not None:
            return RANKING
        if not self.label_names:
            return "regression"
        return "single_label_classification" if self.labels.ndim == 1 else SEVERAL

    @property
    def head_problem(self) -> str:
        """Return the problem as a model's files name it: to rank is to give a score."""
        return "regression" if self.problem == RANKING else self.problem

    @property
    def outputs(self) -> int:
        """Return the number of outputs of a model for a text: one for each class, or score."""
        return len(self.label_names) or (self.labels.shape[1] if self.labels.ndim > 1 else 1)

    @property
    def counts(self) -> dict[str, int]:
        """Return the rows of each class or label, or words of each tag, in order; empty
        for scores.
        """
        if not self.label_names:
            return {}
        if self.problem == SEVERAL:
            counts = self.labels.sum(axis=0)
        else:
            counts = np.bincount(self.labels, minlength=self.outputs)
        return dict(zip(self.label_names, map(int, counts), strict=True))

    @cached_property
    def ends(self) -> np.ndarray:
        """Return the place after the last word of each text, among the words of all: int64 [N]."""
        return np.cumsum([len(words) for words in self.words or ()], dtype=np.int64)

    def by_text(self, tags: Sequence[T]) -> list[Sequence[T]]:
        """Split values for the words of all texts into one part for each text."""
        starts = [0, *self.ends[:-1].tolist()]
        return [tags[a:b] for a, b in zip(starts, self.ends.tolist(), strict=True)]

    @property
    def positive_index(self) -> int | None:
        """Return the number of the class for F1."""
        return None if self.positive is None else self.label_names.index(self.positive)

    def part(self, begin: int, end: int) -> "TaskData":
        """Return the texts of some rows, without labels."""
        pairs, words = self.pairs and self.pairs[begin:end], self.words and self.words[begin:end]
        texts, nothing = self.texts[begin:end], self.labels[:0]
        return TaskData(texts, pairs, nothing, self.label_names, words=words)

    def per_row(self, logits: np.ndarray) -> list[np.ndarray]:
        """Split logits by text: [N,C] -> N of [C]; for words [W,C] -> N of [T,C]."""
        if self.words is None:
            return [*logits]
        return np.split(logits, self.ends[:-1])

    def described(self) -> str:
        """Return a line on how it was understood."""
        rows = counted(len(self), "row")
        if self.dropped:
            gone = (f"{number:,} of {name!r}" for name, number in self.dropped.items())
            rows += f" ({', '.join(gone)} left out)"
        if empty := sum(not text.strip() for text in self._whole()):
            rows += f", {empty:,} of them without text"
        if self.groups is not None:
            return f"ranking: {rows} {describe_groups(self.groups, self.labels)}"
        if not self.label_names:
            several = f"{self.outputs} scores each, " if self.outputs > 1 else ""
            span = f"{several}{self.labels.min():.4g} to {self.labels.max():.4g}"
            return f"regression: {rows}, {span}"
        each = [f"{name} {count:,}" for name, count in self.counts.items()]
        shown = ", ".join(each[:SHOWN]) + (" …" if len(each) > SHOWN else "")
        if self.problem == SEVERAL:
            return f"multi-label classification: {rows}, {len(each)} labels: {shown}; {self._mean}"
        if self.problem == TAGS:
            scored = "F1 is of whole entities" if tags_entities(self.label_names) else _ONE_EACH
            words = counted(len(self.labels), "word")
            return f"token classification: {rows}, {words}, {len(each)} tags: {shown}; {scored}"
        told = f"classification: {rows}, {len(each)} classes: {shown}"
        if len(each) != 2:
            return told
        named = f"F1 is that of {self.positive!r}" if self.positive is not None else _NO_F1
        return f"{told}; {named}"

    @property
    def _mean(self) -> str:
        """Return how many labels hold, in the words of a message."""
        many = self.labels.sum(axis=1)
        none = f", none in {counted(int((many == 0).sum()), 'row')}" if not many.all() else ""
        return f"{many.mean():.2f} a row on average{none}; F1 is at probability {self.threshold}"

    def _whole(self) -> Iterator[str]:
        return map(" ".join, zip(self.texts, self.pairs or self.texts, strict=True))

    def check_known(self, names: Sequence[str], who: str) -> None:
        """Raise InputError for scores, and for labels outside the ``names`` that ``who`` knows."""
        unknown = [name for name in self.label_names if name not in names]
        if unknown or not self.label_names:
            wrong = f"the labels {', '.join(unknown[:5])}" if unknown else "scores, not classes"
            other = "" if unknown else ", or a model that was fine-tuned on scores"
            raise InputError(
                f"the task has {wrong}; {who} know {', '.join(list(dict.fromkeys(names))[:20])}: "
                f"give a task whose labels they know{other}"
            )


_ONE_EACH = "one label a token"
_NO_F1 = "no F1, for none of them is named positive (the setting positive)"
_AS_IT_IS = TaskSettings()


def read_task(
    train_path: str, *others: str, settings: TaskSettings = _AS_IT_IS
) -> tuple[TaskData, ...]:
    """Read the splits of one task; ``train_path`` and ``settings`` decide what the labels mean.

    Whole numbers, words and booleans are classes: numbers sorted numerically (0..C-1 keep their
    number), the rest alphabetically. Other numbers, and lists of them, are scores; lists of names
    are labels of which several may hold, or none; tokens have a tag each. Documents of queries
    (``problem: ranking``, a ``group_field``, or columns with these names) have grades, or clicks.

    Raises InputError for a file that cannot be read or lacks a column, a text that is not a string,
    a missing, mixed or doubtful label, a label that train does not have, or a single class.
    """
    check_settings(settings)
    files = [read_file(path, settings) for path in (train_path, *others)]
    _check_pairs(files)
    check_loss(settings, train_path, ranks=files[0].groups is not None)
    if files[0].groups is not None:
        return _read_ranked(files, settings)
    if files[0].words is not None or are_several(train_path, files[0].labels, settings):
        return _read_lists(files, settings)
    as_written = settings.problem == "classification"
    dropped = dropped_names(settings.drop_labels, as_written)
    if settings.problem is None:
        refuse_joined([(file.path, file.labels) for file in files], dropped)
    found = [kept_rows(file.path, file.labels, dropped, as_written) for file in files]
    for rows, gone in found:
        if not rows.labels:
            raise InputError(f"{rows.path}: drop_labels leaves none of its {gone.total()} rows")
    check_dropped(dropped, found)
    splits = read_alike([rows for rows, _ in found], as_written)
    if settings.label_names:
        splits = [named_rows(rows, settings.label_names) for rows in splits]
    meaning = meaning_of(splits[0], settings.problem)
    if settings.label_names:
        meaning = replace(meaning, names=settings.label_names)
    positive = positive_class(meaning.names, settings.positive)
    return tuple(
        _split(file, rows, gone, meaning, positive, train_path)
        for file, rows, (_, gone) in zip(files, splits, found, strict=True)
    )


def _read_ranked(files: Sequence[TaskFile], settings: TaskSettings) -> tuple[TaskData, ...]:
    """Return the splits of a task whose documents are in groups."""
    dropped = dropped_names(settings.drop_labels, as_written=False)
    found = [kept_rows(file.path, file.labels, dropped, as_written=False) for file in files]
    check_dropped(dropped, found)
    splits = read_alike([rows for rows, _ in found], as_written=False)
    each = [
        ranked(file, rows, gone, settings)
        for file, rows, (_, gone) in zip(files, splits, found, strict=True)
    ]
    check_groups_unsplit([grouped for _, grouped in each])
    return tuple(data for data, _ in each)


def ranked(
    file: TaskFile, rows: Rows, gone: Counter[str], settings: TaskSettings
) -> tuple[TaskData, GroupedFile]:
    """Return the documents of a file with their grades. Raises InputError, naming the row, for a
    label that is not a grade, and if all orders are equally good.
    """
    if settings.label_names or settings.positive is not None:
        key = "label_names" if settings.label_names else "positive"
        raise InputError(f"{key} is for classes, but a ranking has grades: leave it out")
    if not rows.labels:
        raise InputError(f"{file.path}: drop_labels leaves none of its {gone.total()} rows")
    assert file.groups is not None
    grades = grades_of(file.path, rows.labels, rows.numbers)
    names = [file.groups[number - 1] for number in rows.numbers]
    queries = [file.texts[number - 1] for number in rows.numbers]
    grouped = GroupedFile(file.path, names, queries, rows.numbers, file.named)
    check_order(grouped, grades)
    data = split_of(file, rows.numbers, gone, grades, ())
    return replace(data, groups=number_names(names), group_names=names), grouped


def _read_lists(files: Sequence[TaskFile], settings: TaskSettings) -> tuple[TaskData, ...]:
    """Return the splits of a task whose rows have several labels, or tokens with tags."""
    problem, train_path = (SEVERAL if files[0].words is None else TAGS), files[0].path
    if settings.positive is not None:
        raise InputError(
            f"positive is {settings.positive!r}, which is for two classes; the F1 of a {problem} "
            "counts all its labels: leave it out"
        )
    separator, names = settings.label_separator, settings.label_names
    dropped = dropped_names(settings.drop_labels, as_written=True)
    read = words_in if problem == TAGS else partial(several_in, separator=separator)
    found = [read_lists(file.path, file.labels, read, dropped, names) for file in files]
    for lists, gone in found:
        if not lists.numbers:
            raise InputError(
                f"{lists.each.path}: drop_labels leaves none of its {gone.total()} rows"
            )
    check_dropped(dropped, [(lists.each, gone) for lists, gone in found])
    for file, (lists, _) in zip(files, found, strict=True):
        if file.words is None:
            check_several(lists, train=file is files[0])
        else:
            check_tags(lists, file.words, settings)
    train = found[0][0].each
    if settings.problem is None:
        refuse_doubtful(train, problem)
    names_in_train = {one.name for one in train.labels}
    known = names or in_order(complete(names_in_train) if problem == TAGS else names_in_train)
    if len(known) < (2 if problem == TAGS else 1):
        what = f"every tag is {known[0]!r}" if known else "no row has a label"
        raise InputError(f"{train_path}: {what}; train needs rows of every label to learn")
    where = "label_names" if names else train_path
    return tuple(
        split_of_lists(
            file, lists, gone, known, class_indices(lists.each, known, where), settings.threshold
        )
        for file, (lists, gone) in zip(files, found, strict=True)
    )


def split_of_lists(
    file: TaskFile,
    lists: Lists,
    gone: Counter[str],
    names: tuple[str, ...],
    numbers: Sequence[int],
    threshold: float,
) -> TaskData:
    """Return the rows of a file that has several labels for each, or tags; ``numbers`` in ``names``
    are those of all rows, one after another.
    """
    labels = np.array(numbers, dtype=np.int64)
    if file.words is None:
        held = np.zeros((len(lists.numbers), len(names)), bool)
        held[np.repeat(np.arange(len(held)), lists.lengths), labels] = True
        labels = held
    return split_of(file, lists.numbers, gone, labels, names, threshold=threshold)


def _split(
    file: TaskFile,
    rows: Rows,
    gone: Counter[str],
    meaning: Meaning,
    positive: str | None,
    train_path: str,
) -> TaskData:
    if meaning.names:
        labels = np.array(class_indices(rows, meaning.names, train_path), dtype=np.int64)
    else:
        check_scores(rows, meaning.outputs)
        labels = np.array([label.value for label in rows.labels], dtype=np.float32)
    return split_of(file, rows.numbers, gone, labels, meaning.names, positive)


def split_of(
    file: TaskFile,
    rows: Sequence[int],
    gone: Counter[str],
    labels: np.ndarray,
    names: tuple[str, ...],
    positive: str | None = None,
    threshold: float = 0.5,
) -> TaskData:
    """Return the ``rows`` of a file, counted from 1 and without those ``gone``, with ``labels``."""
    texts = [file.texts[number - 1] for number in rows]
    pairs = file.pairs and [file.pairs[number - 1] for number in rows]
    words = file.words and [file.words[number - 1] for number in rows]
    about = (positive, rows, dict(gone), words, threshold, file.path)
    return TaskData(texts, pairs, labels, names, *about)


def _check_pairs(files: Sequence[TaskFile]) -> None:
    train = files[0]
    for other in files[1:]:
        if (train.words is None) != (other.words is None):
            has, lacks = (train, other) if other.words is None else (other, train)
            raise InputError(
                f"{has.path} has tokens but {lacks.path} has texts; the splits of one task are "
                "all of one kind: name their fields with --text-field and --label-field"
            )
        if (train.groups is None) != (other.groups is None):
            has, lacks = (train, other) if other.groups is None else (other, train)
            raise InputError(
                f"{has.path} has queries and documents but {lacks.path} has not; the splits of "
                "one "
                "task are all rankings or none is: name their fields, or say --set problem=ranking"
            )
        if (train.pairs is None) != (other.pairs is None):
            has, lacks = (train, other) if other.pairs is None else (other, train)
            raise InputError(
                f"{has.path} has sentence2 (or a second text field) but {lacks.path} has not; the "
                "splits of one task are all pairs or all single texts: add it or remove it"
            )
