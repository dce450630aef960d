"""Find the tokens that an assistant says: arithmetic on characters."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rekindle.data.source.content import Span

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
    offsets = np.cumsum([0, *(count + 1 for count in characters)])
    spans_by_text = zip(offsets[:-1], spans, strict=True)
    shifted_spans = [
        (a + first, b + first) for first, text_spans in spans_by_text for a, b in text_spans
    ]
    if not shifted_spans:
        return np.zeros(len(starts), np.bool_)
    span_starts, span_ends = np.array(shifted_spans, np.int64).T
    text_starts = np.repeat(offsets[:-1], lengths)
    # The first span that ends after the token begins.
    span = np.searchsorted(span_ends, starts + text_starts, side="right")
    span_start = np.append(span_starts, np.iinfo(np.int64).max)[span]
    return np.asarray(span_start < ends + text_starts)
