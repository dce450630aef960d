"""Rank sequences and positions by how useful they are for training, from stored scalars only.

SALT ("small-LM guided training", 2024) takes the sequences a small LM finds hardest among those it
can predict at all; self-evolution (Vega v2, 2022) masks the tokens a model finds hard. Targets are
not read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from rekindle.data.errors import InputError
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.scalars import PositionScalars

Score = Literal["median_loss", "mean_loss", "mean_entropy", "hard_share"]
HARD = 0.1  # nats of −log p of the true token above which a position is hard (Vega v2)
PREDICTABLE = 10  # SALT's median is over tokens whose rank is below this


class ScoreSettings(TypedDict, total=False):
    """Further settings of a score, see ``sequence_scores``."""

    predictable: int
    threshold: float


@dataclass(frozen=True)
class HardPositions:
    """Positions of one sequence at which the teacher finds the true token hard."""

    index: int  # of the sequence
    positions: NDArray[np.int64]  # [P]; for a causal teacher, t stands for the prediction of t + 1
    losses: NDArray[np.float32]  # [P] −log p of the true token, nats


def sequence_scores(
    teacher: TeacherReader,
    score: Score = "median_loss",
    replica: int | None = None,
    *,
    predictable: int = PREDICTABLE,
    threshold: float = HARD,
) -> NDArray[np.float64]:
    """Return a score [N] for every sequence; NaN if the teacher has no position that counts.

    ``median_loss``: median of −log p of the true token over positions where its rank is below
    ``predictable`` (SALT); ``mean_loss``: its mean over all positions; ``mean_entropy``: mean
    entropy of the teacher; ``hard_share``: share of positions with a loss above ``threshold``.
    Masked teachers are scored in ``replica``; None: averaged over all replicas. Raise InputError
    for a teacher without scalars or an unknown score, CacheMismatchError for an incomplete teacher.
    """
    if score not in Score.__args__:  # type: ignore[attr-defined]
        raise InputError(f"no score {score!r}; there are {', '.join(Score.__args__)}")  # type: ignore[attr-defined]
    if score == "mean_entropy" and "entropy" in teacher.info.lacks:
        cause = "was imported without entropies; mean_entropy needs the field entropy in its rows"
        if teacher.info.served:
            cause = "runs on a server, which gives no entropies; mean_entropy needs another teacher"
        raise InputError(f"teacher {teacher.info.name!r} {cause}, or choose another score")
    replicas = teacher.info.view_class.numbers(teacher.replicas) if replica is None else [replica]
    size = len(teacher.corpus)
    total, count = np.zeros(size), np.zeros(size)
    for number in replicas:
        scores = np.full(size, np.nan)
        for first, scalars in _blocks(teacher, number):
            values = _scores(scalars, score, predictable, threshold)
            scores[first : first + len(values)] = values
        is_scored = ~np.isnan(scores)
        total[is_scored] += scores[is_scored]
        count += is_scored
    return np.divide(total, count, out=np.full(size, np.nan), where=count > 0)


def hard_positions(
    teacher: TeacherReader, threshold: float = HARD, replica: int | None = None
) -> Iterator[HardPositions]:
    """Yield, for every sequence in order, the positions with −log p of the true token >
    ``threshold``.

    Masked teachers: in one ``replica`` (None: the first). Raise as ``sequence_scores`` does.
    """
    number = (replica or 0) if teacher.masked else None
    for first, scalars in _blocks(teacher, number):
        for index, (positions, losses) in enumerate(scalars.losses(), first):
            hard = losses > threshold
            yield HardPositions(index, positions[hard], losses[hard])


def _blocks(teacher: TeacherReader, replica: int | None) -> Iterator[tuple[int, PositionScalars]]:
    """Yield the number of the first sequence of each record batch, and its scalars."""
    for shard in range(len(teacher.corpus.commits)):
        first = teacher.corpus.first(shard)
        for scalars in teacher.scalars(shard, replica):
            yield first, scalars
            first += len(scalars.offsets) - 1


def _scores(
    scalars: PositionScalars, score: Score, predictable: int, threshold: float
) -> NDArray[np.float64]:
    rows = np.repeat(np.arange(len(scalars.offsets) - 1), np.diff(scalars.offsets))
    losses = -scalars.gold_log_prob.astype(np.float64)
    size = len(scalars.offsets) - 1
    if score == "median_loss":
        counted = scalars.gold_rank < predictable
        return _medians(losses[counted], rows[counted], size)
    values = {
        "mean_loss": losses,
        "mean_entropy": scalars.entropy.astype(np.float64),
        "hard_share": (losses > threshold).astype(np.float64),
    }[score]
    counts = np.bincount(rows, minlength=size)
    sums = np.bincount(rows, values, minlength=size)
    return np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0)


def _medians(
    values: NDArray[np.float64], rows: NDArray[np.int64], size: int
) -> NDArray[np.float64]:
    """Return the median of each row's values; NaN for an empty row."""
    order = np.lexsort((values, rows))
    ordered = values[order]
    counts = np.bincount(rows, minlength=size)
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
    low, high = starts + np.maximum(counts - 1, 0) // 2, starts + counts // 2
    out = np.full(size, np.nan)
    has_values = counts > 0
    out[has_values] = (ordered[low[has_values]] + ordered[high[has_values]]) / 2
    return out
