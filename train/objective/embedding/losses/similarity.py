"""Similarity: each text is as near to the other texts of its step as for the teacher.

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

    def rows(self, own: "Tensor", wanted: "Tensor") -> "Tensor":
        """Return KL(teacher's row ‖ student's row) [R], in nats."""
        if len(own) < 2:
            return own.sum(dim=1) * 0.0
        ours, theirs = self._log_probs(own), self._log_probs(wanted)
        itself = own.new_ones(len(own)).diag().bool()
        apart = (theirs - ours).masked_fill(itself, 0.0)
        return (theirs.exp() * apart).sum(dim=1)

    def _log_probs(self, vectors: "Tensor") -> "Tensor":
        """Return the log-probabilities [R,R] of the other rows; −∞ on the diagonal."""
        temperature = cast(SimilaritySettings, self.settings).temperature
        near = unit(vectors)
        itself = near.new_ones(len(near)).diag().bool()
        scores = (near @ near.T / temperature).masked_fill(itself, float("-inf"))
        return scores.log_softmax(dim=1)
