"""Find the tokens that an assistant says: arithmetic on characters."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rekindle.data.source.given import Span

Numbers = NDArray[np.int64]


def tokens_in(
    spans: Sequence[Sequence[Span]],
    characters: Sequence[int],
    starts: NDArray[np.int32],
    ends: NDArray[np.int32],
    lengths: Numbers,
) -> NDArray[np.bool_]:
    """Return [L]: whether a token has a character of one of its text's ``spans``, which ascend.

    ``characters``, ``lengths`` [texts]: how many characters and tokens each text has; ``starts``,
    ``ends`` [L]: the characters text[start:end] of each token. A token across the edge of a span is
    in it, as in transformers.
    """
    # Concatenate the texts, with one unused character between them.
    begins = np.cumsum([0, *(count + 1 for count in characters)])
    shifted = zip(begins[:-1], spans, strict=True)
    flat = [(a + first, b + first) for first, each in shifted for a, b in each]
    if not flat:
        return np.zeros(len(starts), np.bool_)
    froms, tos = np.array(flat, np.int64).T
    before = np.repeat(begins[:-1], lengths)
    # The first span that ends after the token begins.
    span = np.searchsorted(tos, starts + before, side="right")
    begin_of = np.append(froms, np.iinfo(np.int64).max)[span]
    return np.asarray(begin_of < ends + before)
