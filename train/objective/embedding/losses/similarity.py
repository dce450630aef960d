"""Similarity: each text is as similar to the other texts of its step as for the teacher.

Row i of a step is a distribution over its other rows j: softmax over j ≠ i of cos(vᵢ, vⱼ)/τ. The
loss of the row is KL(teacher's ‖ student's). The student's vectors need not have the teacher's
length. Source: relational distillation by the similarity of the examples of a batch (Passalis and
Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018), with a
temperature as in contrastive losses.
"""

from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import Field

from rekindle.train.objective.embedding.base import LossSettings, VectorLoss, unit
from rekindle.train.schedules import Positive

if TYPE_CHECKING:
    from torch import Tensor


class SimilaritySettings(LossSettings):
    """Of the loss that compares the rows of a step."""

    temperature: Positive = Field(
        0.05,
        description="τ of teacher and student: a smaller one looks at the nearest texts alone. The "
        "loss carries no τ²",
    )


class Similarity(VectorLoss):
    """KL between the similarity rows of teacher and student; 0 where a row has no other."""

    Settings: ClassVar[type[LossSettings]] = SimilaritySettings
    compares_rows: ClassVar[bool] = True
    needs_equal_sizes: ClassVar[bool] = False

    def rows(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """Return KL(teacher's row ‖ student's row) [R], in nats."""
        if len(student) < 2:
            return student.sum(dim=1) * 0.0
        log_p, log_q = self._log_probs(student), self._log_probs(teacher)
        diagonal = student.new_ones(len(student)).diag().bool()
        difference = (log_q - log_p).masked_fill(diagonal, 0.0)
        return (log_q.exp() * difference).sum(dim=1)

    def _log_probs(self, vectors: "Tensor") -> "Tensor":
        """Return the log-probabilities [R,R] of the other rows; −∞ on the diagonal."""
        temperature = cast(SimilaritySettings, self.settings).temperature
        units = unit(vectors)
        diagonal = units.new_ones(len(units)).diag().bool()
        scores = (units @ units.T / temperature).masked_fill(diagonal, float("-inf"))
        return scores.log_softmax(dim=1)
