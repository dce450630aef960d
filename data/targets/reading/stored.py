"""The error of storing a sentence encoder's vectors, from the commit records of its units."""

from dataclasses import dataclass

import numpy as np

from rekindle.data.storage.commits import Commits
from rekindle.data.targets.kinds.embedding import LARGEST_ERROR, MEAN_ERROR
from rekindle.data.targets.schema import TeacherInfo


@dataclass(frozen=True)
class StoredError:
    """1 − cosine between vectors and their stored form."""

    mean: float
    largest: float

    def as_text(self, info: TeacherInfo) -> str:
        """Return a sentence about the error of one teacher's vectors."""
        return (
            f"teacher {info.name}: vectors of {info.dimensions:,} values in {info.vectors}, which "
            f"turns them by 1 − cosine {self.mean:.1e} on average, {self.largest:.1e} at most"
        )


def stored_error(commits: Commits) -> StoredError | None:
    """Return the error over all units; None if their records lack it."""
    if not commits.has_fact(MEAN_ERROR):
        return None
    mean, largest = (commits.number_facts(name) for name in (MEAN_ERROR, LARGEST_ERROR))
    known, rows = ~np.isnan(mean), commits.count_facts("positions")
    average = float((mean[known] * rows[known]).sum() / max(int(rows[known].sum()), 1))
    return StoredError(average, float(largest[known].max()))
