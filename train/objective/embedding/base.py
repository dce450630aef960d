"""What a loss of vectors is: one class in a file of its own, ``losses/NAME.py``.

Reading a run file imports these files to know their settings, so they import no torch: tensors
bring the methods that are needed. R rows (sequences with a target), D numbers of a vector.
"""

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from rekindle.data.settings import Settings
from rekindle.train.schedules import Amount

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-12  # a length that is taken for 0


class LossSettings(Settings):
    """A loss of vectors, and what it weighs in the sum."""

    weight: Amount = Field(1.0, description="its weight in the term's sum; 0: not used")


class VectorLoss:
    """A loss of a student's vectors: subclass it once in ``losses/NAME.py``."""

    Settings: ClassVar[type[LossSettings]] = LossSettings  # a subclass, of a loss that has more
    # Whether the loss of a row depends on the other rows of the step. Those of other micro-batches
    # and processes are then there, too, as a pass without gradient has found them.
    compares_rows: ClassVar[bool] = False
    # Whether the student's vectors must be as long as the teacher's.
    needs_equal_sizes: ClassVar[bool] = True

    def __init__(self, settings: LossSettings):
        self.settings = settings

    def rows(self, own: "Tensor", wanted: "Tensor") -> "Tensor":
        """Return the loss [R] of each row: of the student's vectors ``own`` [R,D], which carry the
        gradient, beside the teacher's ``wanted``.
        """
        raise NotImplementedError


def unit(vectors: "Tensor") -> "Tensor":
    """Return vectors [R,D] of length 1; one of length 0 stays."""
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(SMALLEST)
