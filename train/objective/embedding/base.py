"""The base of losses of vectors: each is one class in a file of its own, ``losses/NAME.py``.

Reading a run file imports these files for their settings, so they import no torch: the methods of
tensors suffice. R rows (sequences with a target), D numbers of a vector.
"""

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from rekindle.data.settings import Settings
from rekindle.train.schedules import Amount

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-12  # a length taken as 0


class LossSettings(Settings):
    """The settings of a loss of vectors: its weight in the sum."""

    weight: Amount = Field(1.0, description="its weight in the term's sum; 0: not used")


class VectorLoss:
    """A loss of a student's vectors: subclass it once in ``losses/NAME.py``."""

    # a subclass, for a loss with more settings
    Settings: ClassVar[type[LossSettings]] = LossSettings
    # Whether the loss of a row depends on the other rows of the step. Then those of other
    # micro-batches and processes are included, from a pass without gradient.
    compares_rows: ClassVar[bool] = False
    # Whether the student's vectors must have the length of the teacher's.
    needs_equal_sizes: ClassVar[bool] = True

    def __init__(self, settings: LossSettings):
        self.settings = settings

    def rows(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """Return the loss [R] of each row, of the student's vectors [R,D], which carry the
        gradient, against the teacher's.
        """
        raise NotImplementedError


def unit(vectors: "Tensor") -> "Tensor":
    """Return the vectors [R,D] scaled to length 1; one of length 0 stays."""
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(SMALLEST)
