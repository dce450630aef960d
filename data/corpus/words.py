"""Where words begin in a sequence of the corpus."""

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]


def word_characters(
    text: str, starts: NDArray[np.int32], words: NDArray[np.bool_]
) -> tuple[Places, Places]:
    """Return the positions that begin a word, and the first character of each that is no white
    space. ``starts`` and ``words`` [S] are the sequence's ``char_starts`` and ``word_starts``.

    Byte-level tokens start at the space before their word, where another tokenizer's token ends.
    """
    blank = np.array([*map(str.isspace, text), False])
    solid = np.where(blank, len(text), np.arange(len(text) + 1))
    solid = np.minimum.accumulate(solid[::-1])[::-1]
    places = np.flatnonzero(words & (starts >= 0))
    characters = solid[starts[places]]
    following = np.append(starts[places], len(text))[1:]
    inside = characters < np.maximum(following, starts[places] + 1)  # else it is all white space
    return places[inside], characters[inside]
