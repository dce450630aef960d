"""A corpus's marks of single tokens: segments, trained tokens and documents.

B sequences, S positions of the longest.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.columns import DOCUMENTS, TOKEN_TYPES, TRAINED
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.storage.cuts import Place, cut_lengths, pad_cuts

Tokens = NDArray[np.int32]


def read_types(corpus: Corpus, places: Sequence[Place]) -> Tokens | None:
    """Read the segments of the sequences ``places`` [B,S], 0 at padding; None if the corpus has no
    pairs.
    """
    if not corpus.has_pairs:
        return None
    cuts = [corpus.cut(place) for place in places]
    return pad_cuts(cuts, cut_lengths(cuts), TOKEN_TYPES, 0)


def read_trained(corpus: Corpus, places: Sequence[Place]) -> NDArray[np.bool_] | None:
    """Read which tokens of the sequences ``places`` are trained [B,S]; None if all are."""
    if not corpus.has_trained:
        return None
    cuts = [corpus.cut(place) for place in places]
    return pad_cuts(cuts, cut_lengths(cuts), TRAINED, 0).astype(np.bool_)


def read_documents(corpus: Corpus, places: Sequence[Place]) -> Tokens | None:
    """Read the document of its sequence that each token belongs to [B,S], from 0, −1 at padding;
    None if each of the sequences ``places`` has one document.
    """
    if not corpus.is_packed:
        return None
    cuts = [corpus.cut(place) for place in places]
    numbers = pad_cuts(cuts, cut_lengths(cuts), DOCUMENTS, -1)
    return numbers if (numbers > 0).any() else None


class Marks(TypedDict):
    """A batch's marks of single tokens, where there are any; see ``Batch``."""

    token_types: Tokens | None
    trained: NDArray[np.bool_] | None
    document_numbers: Tokens | None


def read_marks(corpus: Corpus, places: Sequence[Place]) -> Marks:
    """Read the marks that the sequences ``places`` [B] have."""
    return {
        "token_types": read_types(corpus, places),
        "trained": read_trained(corpus, places),
        "document_numbers": read_documents(corpus, places),
    }
