"""Does a result say more than the same answer to every text would? Knows no model.

It is weak if guesses shuffled among the rows would do about as well, or if it is within a tenth of
the way from the best constant answer to a perfect score.

The former is a permutation test near 5 %, one-sided, with a normal distribution in place of that of
all permutations, which is coarse on a few rows. If dev has chosen the epoch that is judged, more
than 5 % of useless models pass.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rekindle.train.finetune.label_lists import SEVERAL
from rekindle.train.finetune.metrics import predictions_of, scores_of
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.ranking.scores import beyond_chance

_NEAR = 0.1  # of the way from the constant answer to a perfect score
_BEYOND = 1.645  # standard deviations of shuffled guesses: near 5 % of them do better
_MOST_LABELS = 10  # that a constant answer may name together


class Constant(NamedTuple):
    """The score of one answer to every text; ``answer`` is None if labels are scores."""

    answer: str | None
    score: float

    def __str__(self) -> str:
        if self.answer is None:
            return f"{self.score:.4g}, that of guessing"
        return f"{self.score:.4f}, that of always saying {self.answer!r}"


class Weak(NamedTuple):
    """A score that says little: ``near`` that of a constant answer, or not ``beyond_chance``."""

    constant: Constant
    near: bool
    beyond_chance: bool

    def __str__(self) -> str:
        if not self.near:
            return f"may be chance on so few rows (beside {self.constant})"
        if self.beyond_chance:
            return f"is little better than {self.constant}; little was learned"
        return f"is no better than {self.constant}; next to nothing was learned"


def find_weakness(metric: str, score: float, logits: np.ndarray, data: TaskData) -> Weak | None:
    """Return the constant answer that ``logits`` [N,C] with the score ``score`` hardly beat, and in
    which way; None if they do.

    The answer is the best of: the most common class or tag, the one for F1, or the most common
    labels together. For scores it is a correlation of 0, for documents in groups a random order.
    """
    if data.groups is not None:
        chance = scores_of(data, np.zeros_like(logits))[metric]
        is_near = score - chance < _NEAR * (1 - chance)
        is_beyond = beyond_chance(logits[:, 0], data.labels, data.groups) >= _BEYOND
        return (
            Weak(Constant(None, chance), is_near, is_beyond) if is_near or not is_beyond else None
        )
    if data.problem not in ("regression", SEVERAL) and len(np.unique(data.labels)) < 2:
        return None  # with one class every answer is right, and tells nothing
    constant = max(_constants(metric, data), key=lambda one: one.score)
    is_near = score - constant.score < _NEAR * (1 - constant.score)
    guesses = predictions_of(data.problem, logits, data.threshold)
    columns = (_columns(one, data) for one in (guesses, data.labels))
    is_beyond = beyond_shuffled(*columns) >= _BEYOND
    return Weak(constant, is_near, is_beyond) if is_near or not is_beyond else None


def beyond_shuffled(guesses: np.ndarray, labels: np.ndarray) -> float:
    """Return by how many standard deviations the rows of ``guesses`` fit those of ``labels`` ([N,C]
    both, by the sum of their products) better than if shuffled; mean and deviation are exactly
    those of all permutations.
    """
    a, b = (side - side.mean(axis=0) for side in (guesses, labels))
    variance = float(((a.T @ a) * (b.T @ b)).sum()) / max(len(a) - 1, 1)
    if variance < 1e-12:
        return 0.0  # one answer to all
    return float((a * b).sum()) / math.sqrt(variance)


def _constants(metric: str, data: TaskData) -> Iterator[Constant]:
    if data.problem == "regression":
        yield Constant(None, 0.0)
        return
    order = np.argsort([-count for count in data.counts.values()], kind="stable")
    answers = [order[:1]]
    if data.problem == SEVERAL:
        answers = [order[:count] for count in range(min(len(order), _MOST_LABELS) + 1)]
    elif data.positive_index is not None:
        answers.append(np.array([data.positive_index]))
    for indices in answers:
        logits = np.full((len(data.labels), data.outputs), -30.0, np.float32)
        logits[:, indices] = 30.0
        names = " and ".join(data.label_names[index] for index in indices)
        yield Constant(names or "none", scores_of(data, logits)[metric])


def _columns(values: np.ndarray, data: TaskData) -> np.ndarray:
    """Return classes as one column each, of 0 and 1 (all 0 for a word that was not read), other
    labels as they are: float64 [N,C].
    """
    if data.problem in ("regression", SEVERAL):
        return values.reshape(len(values), -1).astype(np.float64)
    return (values[:, None] == np.arange(data.outputs)).astype(np.float64)
