"""NDCG@10, MRR and MAP of scores within groups. Knows no model and no file.

The gain of a document is its grade, as in scikit-learn and trec_eval (not 2^grade − 1). For MRR and
MAP a document is relevant if its grade is above 0. All documents of a group are ranked, and MRR and
MAP look at all of them. Equal scores have no order: the value is the mean over all orders of tied
documents, in closed form (McSherry and Najork, ECIR 2008), so that equal scores throughout get what
a random order gets on average. A group with equal grades throughout is no better in one order than
in another: it has no score, and the means are over the others.
"""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CUT = 10  # the last rank that NDCG looks at
NAMES = ("ndcg@10", "mrr", "map")  # the first is the default


def parts_of(groups: Ints) -> list[Ints]:
    """Return the rows of each group, by ascending number: G arrays of rows of ``groups`` [N]."""
    order = np.argsort(groups, kind="stable")
    edges = np.flatnonzero(np.diff(groups[order])) + 1
    return np.split(order, edges) if len(order) else []


def groups_with_order(grades: NDArray[np.floating], parts: list[Ints]) -> list[Ints]:
    """Return the groups that have documents of different grades, so that an order matters."""
    return [rows for rows in parts if (grades[rows] != grades[rows[0]]).any()]


def ranking_scores(
    scores: NDArray[np.floating], grades: NDArray[np.floating], groups: Ints
) -> dict[str, float]:
    """Return the mean of each measure over the groups: ``scores``, ``grades`` (≥ 0), ``groups`` all
    [N].

    Raises ValueError if no group has documents of different grades.
    """
    each = scores_by_group(scores, grades, groups)
    return {name: float(values.mean()) for name, values in each.items()}


def scores_by_group(
    scores: NDArray[np.floating], grades: NDArray[np.floating], groups: Ints
) -> dict[str, Floats]:
    """Return each measure of each group that has an order, by ascending number of the group [G]."""
    scores_of_groups = [
        group_scores(scores[rows], grades[rows])
        for rows in groups_with_order(grades, parts_of(groups))
    ]
    if not scores_of_groups:
        raise ValueError("no group has documents of different grades")
    return dict(zip(NAMES, np.array(scores_of_groups).T, strict=True))


def group_scores(
    scores: NDArray[np.floating], grades: NDArray[np.floating]
) -> tuple[float, float, float]:
    """Return NDCG@10, reciprocal rank and average precision of one group [n], with at least one
    grade above 0.
    """
    order = np.argsort(-scores, kind="stable")
    firsts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)  # of each tie
    sizes = np.diff(np.append(firsts, len(order)))
    gains = grades[order].astype(np.float64)
    relevant = (gains > 0).astype(np.int64)
    discounts = 1 / np.log2(np.arange(2, len(order) + 2))
    discounts[CUT:] = 0
    ideal = float(np.sort(gains)[::-1] @ discounts)
    tie_sums = [np.add.reduceat(values, firsts) for values in (gains, discounts)]
    dcg = float((tie_sums[0] / sizes) @ tie_sums[1])
    hits = np.add.reduceat(relevant, firsts)
    return dcg / ideal, _reciprocal(firsts, sizes, hits), _precision(firsts, sizes, hits)


def _reciprocal(firsts: Ints, sizes: Ints, hits: Ints) -> float:
    """Return the mean of 1 / rank of the first relevant document: it is in the first tie
    with one.
    """
    tie = int(np.argmax(hits > 0))
    ranks_before, size, relevant = int(firsts[tie]), int(sizes[tie]), int(hits[tie])
    value, chance = 0.0, 1.0  # probability that no document before it in the tie is relevant
    for place in range(size - relevant + 1):
        probability = chance * relevant / (size - place)
        value += probability / (ranks_before + place + 1)
        chance -= probability
    return value


def _precision(firsts: Ints, sizes: Ints, hits: Ints) -> float:
    """Return the mean of the average precision: at each place of a tie a document is as likely
    relevant as at any other, and so are the others of the tie before it.
    """
    total, relevant_before = 0.0, 0
    for first, size, relevant in zip(firsts.tolist(), sizes.tolist(), hits.tolist(), strict=True):
        place = np.arange(size)
        relevant_in_tie = place * (relevant - 1) / max(size - 1, 1)
        total += (
            relevant
            / size
            * float(((relevant_before + 1 + relevant_in_tie) / (first + 1 + place)).sum())
        )
        relevant_before += relevant
    return total / relevant_before


def beyond_chance(
    scores: NDArray[np.floating], grades: NDArray[np.floating], groups: Ints
) -> float:
    """Return by how many standard deviations the scores fit the grades (by the sum of the products
    of both, each centred in its group) better than if shuffled within each group.
    """
    fit = variance = 0.0
    for rows in groups_with_order(grades, parts_of(groups)):
        a, b = (
            side[rows].astype(np.float64) - side[rows].mean(dtype=np.float64)
            for side in (scores, grades)
        )
        fit += float(a @ b)
        variance += float(a @ a) * float(b @ b) / (len(rows) - 1)
    return fit / math.sqrt(variance) if variance > 1e-12 else 0.0
