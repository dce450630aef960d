"""What is known of the tokens of documents of which not all is trained."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Marks(NamedTuple):
    """Which of some documents' tokens [L] are ``trained``, and which are ``special`` ones that
    stand for nothing of a text. [documents]: ``after``, whether what is put beside each is trained;
    ``lost``, how many of its tokens were cut.
    """

    trained: NDArray[np.bool_]
    special: NDArray[np.bool_]
    after: NDArray[np.bool_]
    lost: NDArray[np.int64]

    @classmethod
    def of_texts(cls, documents: int, tokens: int) -> "Marks":
        """Those of plain texts: all is trained."""
        nothing = np.zeros(tokens, np.bool_), np.ones(documents, np.bool_)
        return cls(np.ones(tokens, np.bool_), *nothing, np.zeros(documents, np.int64))

    def then(self, other: "Marks") -> "Marks":
        """These, and those of others after them."""
        return Marks(
            np.concatenate([self.trained, other.trained]),
            np.concatenate([self.special, other.special]),
            np.concatenate([self.after, other.after]),
            np.concatenate([self.lost, other.lost]),
        )

    def rest(self, documents: int, tokens: int) -> "Marks":
        """These without those of so many first documents, of so many tokens."""
        trained, special, after, lost = self
        return Marks(trained[tokens:], special[tokens:], after[documents:], lost[documents:])
