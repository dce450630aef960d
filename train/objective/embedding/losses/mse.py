"""Mean squared error between the student's vector and the teacher's.

The mean over the numbers of a vector, as in sentence-transformers' MSELoss (Reimers and Gurevych,
"Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation", EMNLP 2020): for
vectors of length 1 it is at most 4/D.
"""

from typing import TYPE_CHECKING

from rekindle.train.objective.embedding.base import VectorLoss

if TYPE_CHECKING:
    from torch import Tensor


class MeanSquaredError(VectorLoss):
    """The squared error, mean over the numbers of a vector."""

    def rows(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """Return the mean over D of (student − teacher)² [R]."""
        return (student - teacher).square().mean(dim=1)
