"""Marks of the tokens of documents that are only partly trained."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Marks(NamedTuple):
    """Which of some documents' tokens [L] are ``trained``, and which are ``special`` ones without
    text. [documents]: ``trained_beside``, whether what is put beside each is trained;
    ``lost``, how many of its tokens were cut.
    """

    trained: NDArray[np.bool_]
    special: NDArray[np.bool_]
    trained_beside: NDArray[np.bool_]
    lost: NDArray[np.int64]

    @classmethod
    def of_texts(cls, documents: int, tokens: int) -> "Marks":
        """Return the marks of plain texts: everything is trained."""
        defaults = np.zeros(tokens, np.bool_), np.ones(documents, np.bool_)
        return cls(np.ones(tokens, np.bool_), *defaults, np.zeros(documents, np.int64))

    def followed_by(self, other: "Marks") -> "Marks":
        """Return these, followed by those of others."""
        return Marks(
            np.concatenate([self.trained, other.trained]),
            np.concatenate([self.special, other.special]),
            np.concatenate([self.trained_beside, other.trained_beside]),
            np.concatenate([self.lost, other.lost]),
        )

    def without_first(self, documents: int, tokens: int) -> "Marks":
        """Return these without the first documents and tokens."""
        trained, special, trained_beside, lost = self
        return Marks(
            trained[tokens:], special[tokens:], trained_beside[documents:], lost[documents:]
        )
