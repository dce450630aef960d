"""A labelled task: texts or pairs of texts, each with a class or scores. Knows no model.

``task_files`` reads the files, ``labels`` says what their labels mean.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.finetune.labels import (
    SHOWN,
    Meaning,
    Rows,
    check_dropped,
    check_scores,
    class_indices,
    dropped_names,
    kept_rows,
    meaning_of,
    read_alike,
)
from rekindle.train.finetune.positive import positive_class
from rekindle.train.finetune.task_files import TaskFile, read_file


@dataclass(frozen=True)
class TaskData:
    """One split of a task, in the file's order.

    ``labels`` is int64 [N], class indices into ``label_names``, or float32 scores [N], or [N,C] of
    C outputs, with no names. ``rows`` counts from 1 in the file, of which ``dropped`` were left
    out, by label. ``positive`` is the class whose F1 counts, if that is known.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray
    label_names: tuple[str, ...]
    positive: str | None = None
    rows: Sequence[int] | None = None  # None: all
    dropped: dict[str, int] = field(default_factory=dict)
    path: str = ""  # of the file

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def problem(self) -> str:
        """The name transformers gives the problem: classes where there are names, else scores."""
        return "single_label_classification" if self.label_names else "regression"

    @property
    def outputs(self) -> int:
        """Numbers that a model gives for a text: one for each class, or score."""
        return len(self.label_names) or (self.labels.shape[1] if self.labels.ndim > 1 else 1)

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each class, in the order of the classes; empty for scores."""
        counts = np.bincount(self.labels, minlength=self.outputs) if self.label_names else ()
        return dict(zip(self.label_names, map(int, counts), strict=True))

    @property
    def positive_index(self) -> int | None:
        """The number of the class whose F1 counts."""
        return None if self.positive is None else self.label_names.index(self.positive)

    def part(self, begin: int, end: int) -> "TaskData":
        """The texts of some rows, without labels."""
        pairs = self.pairs and self.pairs[begin:end]
        return TaskData(self.texts[begin:end], pairs, self.labels[:0], self.label_names)

    def described(self) -> str:
        """What was understood of it, in a line."""
        rows = counted(len(self), "row")
        if self.dropped:
            gone = (f"{number:,} of {name!r}" for name, number in self.dropped.items())
            rows += f" ({', '.join(gone)} left out)"
        if empty := sum(not text.strip() for text in self._whole()):
            rows += f", {empty:,} of them without text"
        if not self.label_names:
            several = f"{self.outputs} scores each, " if self.outputs > 1 else ""
            span = f"{several}{self.labels.min():.4g} to {self.labels.max():.4g}"
            return f"regression: {rows}, {span}"
        each = [f"{name} {count:,}" for name, count in self.counts.items()]
        shown = ", ".join(each[:SHOWN]) + (" …" if len(each) > SHOWN else "")
        told = f"classification: {rows}, {len(each)} classes: {shown}"
        if len(each) != 2:
            return told
        named = f"F1 is that of {self.positive!r}" if self.positive is not None else _NO_F1
        return f"{told}; {named}"

    def _whole(self) -> Iterator[str]:
        return map(" ".join, zip(self.texts, self.pairs or self.texts, strict=True))

    def check_known(self, names: Sequence[str], who: str) -> None:
        """Raise InputError for scores, and for labels that are none of the ``names`` that ``who``
        knows.
        """
        unknown = [name for name in self.label_names if name not in names]
        if unknown or not self.label_names:
            wrong = f"the labels {', '.join(unknown[:5])}" if unknown else "scores, not classes"
            other = "" if unknown else ", or a model that was fine-tuned on scores"
            raise InputError(
                f"the task has {wrong}; {who} know {', '.join(list(dict.fromkeys(names))[:20])}: "
                f"give a task whose labels they know{other}"
            )


_NO_F1 = "no F1, for none of them is called positive (the setting positive)"
_AS_IT_IS = TaskSettings()


def read_task(
    train_path: str, *others: str, settings: TaskSettings = _AS_IT_IS
) -> tuple[TaskData, ...]:
    """Read the splits of one task; ``train_path`` and ``settings`` decide what the labels mean.

    Whole numbers, words and booleans are classes: numbers sorted numerically (0..C-1 keep their
    number), the rest alphabetically. Other numbers, and lists of them, are scores.

    Raises InputError for a file that cannot be read or lacks a column, a text that is no string, a
    missing, mixed or doubtful label, a label that train does not have, or a single class.
    """
    files = [read_file(path, settings) for path in (train_path, *others)]
    _check_pairs(files)
    as_written = settings.problem == "classification"
    dropped = dropped_names(settings.drop_labels, as_written)
    found = [kept_rows(file.path, file.labels, dropped, as_written) for file in files]
    for rows, gone in found:
        if not rows.labels:
            raise InputError(f"{rows.path}: drop_labels leaves none of its {gone.total()} rows")
    check_dropped(dropped, found)
    splits = read_alike([rows for rows, _ in found], as_written)
    meaning = meaning_of(splits[0], settings.problem)
    positive = positive_class(meaning.names, settings.positive)
    return tuple(
        _split(file, rows, gone, meaning, positive, train_path)
        for file, rows, (_, gone) in zip(files, splits, found, strict=True)
    )


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
    texts = [file.texts[number - 1] for number in rows.numbers]
    pairs = file.pairs and [file.pairs[number - 1] for number in rows.numbers]
    about = (rows.numbers, dict(gone), file.path)
    return TaskData(texts, pairs, labels, meaning.names, positive, *about)


def _check_pairs(files: Sequence[TaskFile]) -> None:
    train = files[0]
    for other in files[1:]:
        if (train.pairs is None) != (other.pairs is None):
            has, lacks = (train, other) if other.pairs is None else (other, train)
            raise InputError(
                f"{has.path} has sentence2 (or a second text field) and {lacks.path} has not; the "
                "splits of one task are all pairs or all single texts: add it or take it away"
            )
