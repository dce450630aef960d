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
from rekindle.train.finetune.entities import complete_tags, tags_entities
from rekindle.train.finetune.label_lists import (
    SEVERAL,
    TAGS,
    Lists,
    check_label_lists,
    check_settings,
    check_tags,
    has_label_lists,
    parse_labels,
    parse_words,
    read_lists,
    refuse_joined,
    resolve_numbers,
)
from rekindle.train.finetune.labels import (
    SHOWN,
    Meaning,
    Rows,
    check_dropped,
    check_scores,
    class_indices,
    dropped_names,
    meaning_of,
    read_labels,
    refuse_doubtful,
    sort_names,
    unify_labels,
)
from rekindle.train.finetune.positive import positive_class
from rekindle.train.finetune.task_files import TaskFile, check_same_form, read_file
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
        texts, no_labels = self.texts[begin:end], self.labels[:0]
        return TaskData(texts, pairs, no_labels, self.label_names, words=words)

    def per_row(self, logits: np.ndarray) -> list[np.ndarray]:
        """Split logits by text: [N,C] -> N of [C]; for words [W,C] -> N of [T,C]."""
        if self.words is None:
            return [*logits]
        return np.split(logits, self.ends[:-1])

    def describe(self) -> str:
        """Return a line on how it was understood."""
        rows = counted(len(self), "row")
        if self.dropped:
            dropped = (f"{number:,} of {name!r}" for name, number in self.dropped.items())
            rows += f" ({', '.join(dropped)} left out)"
        if empty := sum(not text.strip() for text in self._joined_texts()):
            rows += f", {empty:,} of them without text"
        if self.groups is not None:
            return f"ranking: {rows} {describe_groups(self.groups, self.labels)}"
        if not self.label_names:
            each_text = f"{self.outputs} scores each, " if self.outputs > 1 else ""
            range_text = f"{each_text}{self.labels.min():.4g} to {self.labels.max():.4g}"
            return f"regression: {rows}, {range_text}"
        classes = [f"{name} {count:,}" for name, count in self.counts.items()]
        shown = ", ".join(classes[:SHOWN]) + (" …" if len(classes) > SHOWN else "")
        if self.problem == SEVERAL:
            return (
                f"multi-label classification: {rows}, {len(classes)} labels: {shown}; {self._mean}"
            )
        if self.problem == TAGS:
            f1_text = "F1 is of whole entities" if tags_entities(self.label_names) else _ONE_EACH
            words = counted(len(self.labels), "word")
            return f"token classification: {rows}, {words}, {len(classes)} tags: {shown}; {f1_text}"
        summary = f"classification: {rows}, {len(classes)} classes: {shown}"
        if len(classes) != 2:
            return summary
        f1_text = f"F1 is that of {self.positive!r}" if self.positive is not None else _NO_F1
        return f"{summary}; {f1_text}"

    @property
    def _mean(self) -> str:
        """Return how many labels hold, in the words of a message."""
        label_counts = self.labels.sum(axis=1)
        summary = f"{label_counts.mean():.2f} a row on average"
        if not label_counts.all():
            summary += f", none in {counted(int((label_counts == 0).sum()), 'row')}"
        return f"{summary}; F1 is at probability {self.threshold}"

    def _joined_texts(self) -> Iterator[str]:
        return map(" ".join, zip(self.texts, self.pairs or self.texts, strict=True))

    def check_known(self, names: Sequence[str], subject: str) -> None:
        """Raise InputError for scores, and for labels outside the ``names`` that are known."""
        unknown = [name for name in self.label_names if name not in names]
        if unknown or not self.label_names:
            labels_text = (
                f"the labels {', '.join(unknown[:5])}" if unknown else "scores, not classes"
            )
            alternative = "" if unknown else ", or a model that was fine-tuned on scores"
            raise InputError(
                f"the task has {labels_text}; {subject} know "
                f"{', '.join(list(dict.fromkeys(names))[:20])}: give a task whose labels they "
                f"know{alternative}"
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
    check_same_form(files)
    check_loss(settings, train_path, ranks=files[0].groups is not None)
    if files[0].groups is not None:
        return _read_ranked(files, settings)
    if files[0].words is not None or has_label_lists(train_path, files[0].labels, settings):
        return _read_lists(files, settings)
    as_written = settings.problem == "classification"
    dropped = dropped_names(settings.drop_labels, as_written)
    if settings.problem is None:
        refuse_joined([(file.path, file.labels) for file in files], dropped)
    read_files = [read_labels(file.path, file.labels, dropped, as_written) for file in files]
    for rows, left_out in read_files:
        if not rows.labels:
            raise InputError(f"{rows.path}: drop_labels leaves none of its {left_out.total()} rows")
    check_dropped(dropped, read_files)
    splits = unify_labels([rows for rows, _ in read_files], as_written)
    if settings.label_names:
        splits = [resolve_numbers(rows, settings.label_names) for rows in splits]
    meaning = meaning_of(splits[0], settings.problem)
    if settings.label_names:
        meaning = replace(meaning, names=settings.label_names)
    positive = positive_class(meaning.names, settings.positive)
    return tuple(
        _split(file, rows, left_out, meaning, positive, train_path)
        for file, rows, (_, left_out) in zip(files, splits, read_files, strict=True)
    )


def _read_ranked(files: Sequence[TaskFile], settings: TaskSettings) -> tuple[TaskData, ...]:
    """Return the splits of a task whose documents are in groups."""
    dropped = dropped_names(settings.drop_labels, as_written=False)
    read_files = [read_labels(file.path, file.labels, dropped, as_written=False) for file in files]
    check_dropped(dropped, read_files)
    splits = unify_labels([rows for rows, _ in read_files], as_written=False)
    splits_in_groups = [
        ranked(file, rows, left_out, settings)
        for file, rows, (_, left_out) in zip(files, splits, read_files, strict=True)
    ]
    check_groups_unsplit([grouped for _, grouped in splits_in_groups])
    return tuple(data for data, _ in splits_in_groups)


def ranked(
    file: TaskFile, rows: Rows, dropped: Counter[str], settings: TaskSettings
) -> tuple[TaskData, GroupedFile]:
    """Return the documents of a file with their grades. Raises InputError, naming the row, for a
    label that is not a grade, and if all orders are equally good.
    """
    if settings.label_names or settings.positive is not None:
        key = "label_names" if settings.label_names else "positive"
        raise InputError(f"{key} is for classes, but a ranking has grades: leave it out")
    if not rows.labels:
        raise InputError(f"{file.path}: drop_labels leaves none of its {dropped.total()} rows")
    assert file.groups is not None
    grades = grades_of(file.path, rows.labels, rows.numbers)
    names = [file.groups[number - 1] for number in rows.numbers]
    queries = [file.texts[number - 1] for number in rows.numbers]
    grouped = GroupedFile(file.path, names, queries, rows.numbers, file.has_group_names)
    check_order(grouped, grades)
    data = split_of(file, rows.numbers, dropped, grades, ())
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
    parse = parse_words if problem == TAGS else partial(parse_labels, separator=separator)
    read_files = [read_lists(file.path, file.labels, parse, dropped, names) for file in files]
    for lists, left_out in read_files:
        if not lists.numbers:
            raise InputError(
                f"{lists.each.path}: drop_labels leaves none of its {left_out.total()} rows"
            )
    check_dropped(dropped, [(lists.each, left_out) for lists, left_out in read_files])
    for file, (lists, _) in zip(files, read_files, strict=True):
        if file.words is None:
            check_label_lists(lists, train=file is files[0])
        else:
            check_tags(lists, file.words, settings)
    train = read_files[0][0].each
    if settings.problem is None:
        refuse_doubtful(train, problem)
    names_in_train = {one.name for one in train.labels}
    class_names = names or sort_names(
        complete_tags(names_in_train) if problem == TAGS else names_in_train
    )
    if len(class_names) < (2 if problem == TAGS else 1):
        problem_text = f"every tag is {class_names[0]!r}" if class_names else "no row has a label"
        raise InputError(f"{train_path}: {problem_text}; train needs rows of every label to learn")
    names_source = "label_names" if names else train_path
    return tuple(
        split_of_lists(
            file,
            lists,
            left_out,
            class_names,
            class_indices(lists.each, class_names, names_source),
            settings.threshold,
        )
        for file, (lists, left_out) in zip(files, read_files, strict=True)
    )


def split_of_lists(
    file: TaskFile,
    lists: Lists,
    dropped: Counter[str],
    names: tuple[str, ...],
    numbers: Sequence[int],
    threshold: float,
) -> TaskData:
    """Return the rows of a file that has several labels for each, or tags; ``numbers`` in ``names``
    are those of all rows, one after another.
    """
    labels = np.array(numbers, dtype=np.int64)
    if file.words is None:
        holds = np.zeros((len(lists.numbers), len(names)), bool)
        holds[np.repeat(np.arange(len(holds)), lists.lengths), labels] = True
        labels = holds
    return split_of(file, lists.numbers, dropped, labels, names, threshold=threshold)


def _split(
    file: TaskFile,
    rows: Rows,
    dropped: Counter[str],
    meaning: Meaning,
    positive: str | None,
    train_path: str,
) -> TaskData:
    if meaning.names:
        labels = np.array(class_indices(rows, meaning.names, train_path), dtype=np.int64)
    else:
        check_scores(rows, meaning.outputs)
        labels = np.array([label.value for label in rows.labels], dtype=np.float32)
    return split_of(file, rows.numbers, dropped, labels, meaning.names, positive)


def split_of(
    file: TaskFile,
    rows: Sequence[int],
    dropped: Counter[str],
    labels: np.ndarray,
    names: tuple[str, ...],
    positive: str | None = None,
    threshold: float = 0.5,
) -> TaskData:
    """Return the ``rows`` of a file, counted from 1, with their ``labels``; ``dropped``: how many
    rows are left out, by label.
    """
    texts = [file.texts[number - 1] for number in rows]
    pairs = file.pairs and [file.pairs[number - 1] for number in rows]
    words = file.words and [file.words[number - 1] for number in rows]
    details = (positive, rows, dict(dropped), words, threshold, file.path)
    return TaskData(texts, pairs, labels, names, *details)
