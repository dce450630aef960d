"""Texts given as words, as a model reads them: which of its tokens stands for a word.

The words are read with a blank between them, and the first token of a word stands for it, as when
stage 1 reads the answers of token classifiers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.tokenizer import Tokenizer


class EncodedWords(NamedTuple):
    """The model's tokens of each text, with special ones around them, and the position of each
    word's first token among them: -1 for a word that is cut off, or that has no token.
    """

    ids: list[NDArray[np.int32]]
    positions: list[NDArray[np.int64]]
    lengths: NDArray[np.int64]  # [N] tokens before anything is cut
    cut: int  # words
    empty: int  # words without a token


def encode_words(
    tokenizer: Tokenizer, texts: Sequence[Sequence[str]], max_length: int
) -> EncodedWords:
    """Tokenize texts that are lists of words, each cut to ``max_length`` tokens."""
    prefix, suffix = tokenizer.prefix, tokenizer.suffix
    room = max_length - len(prefix) - len(suffix)
    encoded = EncodedWords([], [], np.zeros(len(texts), np.int64), 0, 0)
    cut = empty = 0
    for row, tokens in enumerate(tokenizer.encode([" ".join(words) for words in texts])):
        characters = first_characters(texts[row])
        all_positions = tokens.tokens_at(characters, len(tokens.ids))
        kept_positions = tokens.tokens_at(characters, room)
        all_positions[characters < 0] = kept_positions[characters < 0] = -1
        cut += int((all_positions != kept_positions).sum())
        empty += int((all_positions < 0).sum())
        encoded.ids.append(np.concatenate([prefix, tokens.ids[:room], suffix]).astype(np.int32))
        encoded.positions.append(np.where(kept_positions < 0, -1, kept_positions + len(prefix)))
        encoded.lengths[row] = len(tokens.ids) + len(prefix) + len(suffix)
    return encoded._replace(cut=cut, empty=empty)


def first_characters(words: Sequence[str]) -> NDArray[np.int64]:
    """Return the position of each word's first character that is not white space, in the text of
    all words with a blank between; -1 for a word of only white space.
    """
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])[:-1]
    blank = np.array([len(word) - len(word.lstrip()) for word in words], np.int64)
    solid = np.array([bool(word.strip()) for word in words], bool)
    return np.where(solid, starts + blank, -1)
