"""Cosine: 1 − cos of the angle between the student's vector and the teacher's."""

from typing import TYPE_CHECKING

from rekindle.train.objective.embedding.base import VectorLoss, unit

if TYPE_CHECKING:
    from torch import Tensor


class Cosine(VectorLoss):
    """1 − cos, whatever the vectors' lengths."""

    def rows(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """Return 1 − cos [R], between 0 and 2."""
        return 1 - (unit(student) * unit(teacher)).sum(dim=1)
