"""Does a result say more than one and the same answer to every text would? Knows no model.

A result is weak where guesses that are shuffled among the rows would do as well (a permutation
test, one-sided at 5 %), or where it is within a tenth of what lies between always giving the best
single answer and a perfect score.
"""

import math
from typing import NamedTuple

import numpy as np

from rekindle.train.finetune.metrics import score
from rekindle.train.finetune.task_data import TaskData

_NEAR = 0.1  # of the way from the constant answer to a perfect score
_BEYOND = 1.645  # standard deviations of shuffled guesses: 5 % of them do better


class Constant(NamedTuple):
    """What one answer to every text gets; ``answer`` is a class, None where labels are scores."""

    answer: str | None
    score: float

    def __str__(self) -> str:
        if self.answer is None:
            return f"{self.score:g}, that of guessing"
        return f"{self.score:.4f}, that of always saying {self.answer!r}"


def weak_beside(metric: str, predictions: np.ndarray, data: TaskData) -> Constant | None:
    """The constant answer that ``predictions`` are hardly better than; None where they are.

    ``predictions`` [N] are class indices of the task, or scores ([N] or [N,C]). For accuracy and
    the mean F1 the answer is the commonest class of ``data``, for the F1 of one class that class.
    """
    labels = data.labels
    if data.problem == "regression":
        found = score(metric, predictions, labels)
        return _weak(found, found * math.sqrt(max(len(data) - 1, 0)), Constant(None, 0.0))
    counts = np.bincount(labels, minlength=len(data.label_names))
    if (counts > 0).sum() < 2:
        return None  # of one class every answer is right, and tells nothing
    positive = data.positive_index or 0
    alone = metric == "f1" and len(counts) == 2
    index = positive if alone else int(counts.argmax())
    how = {"num_classes": len(counts), "positive": positive}
    constant = score(metric, np.full_like(labels, index), labels, **how)
    found = score(metric, predictions, labels, **how)
    beyond = _beyond_shuffled(predictions, labels, len(counts))
    return _weak(found, beyond, Constant(data.label_names[index], constant))


def _weak(found: float, beyond: float, constant: Constant) -> Constant | None:
    near = found - constant.score < _NEAR * (1 - constant.score)
    return constant if near or beyond < _BEYOND else None


def _beyond_shuffled(guesses: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """By how many standard deviations more guesses are right than if they were shuffled: the mean
    and the variance of the hits over all permutations.
    """
    said, true = (np.bincount(of, minlength=classes).astype(float) for of in (guesses, labels))
    rows, both = len(labels), said * true
    mean = both.sum() / rows
    spread = both.sum() ** 2 + rows**2 * both.sum() - rows * (both * (said + true)).sum()
    variance = spread / (rows**2 * max(rows - 1, 1))
    if variance <= 0:
        return 0.0  # one answer to all
    return float(((guesses == labels).sum() - mean) / math.sqrt(variance))
