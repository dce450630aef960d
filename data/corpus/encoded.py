"""What a tokenizer makes of texts, as arrays: of a batch of texts at a time, since a corpus may be
of very many short ones.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise, starmap
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Encoding

_HIGHEST_SPACE = 0x3000  # no character above it is white space
_NOWHERE = np.iinfo(np.int32).max  # past the last character of any text
_BETWEEN = "|"  # no white space


class Encoded(NamedTuple):
    """One text's L tokens, without special tokens.

    ids [L] int32; starts, ends [L] int32: the characters text[start:end] that a token stands for,
    as the tokenizer counts them (byte-level ones include the space before a word, and the tokens of
    one emoji all span that emoji); neither ever decreases. word_starts [L] bool: the token begins
    a new word.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]
    word_starts: NDArray[np.bool_]

    @staticmethod
    def joined(parts: "Sequence[Encoded]") -> "Encoded":
        """Those of several, one after the other."""
        return Encoded(*map(np.concatenate, zip(*parts, strict=True)))

    def part(self, where: slice | NDArray[np.bool_]) -> "Encoded":
        """Some of the tokens."""
        ids, starts, ends, words = self
        return Encoded(ids[where], starts[where], ends[where], words[where])

    def tokens_at(self, characters: NDArray[np.int64], room: int) -> NDArray[np.int64]:
        """The first token that stands for each of some characters of the text; -1 where none of the
        first ``room`` tokens does.
        """
        token = np.searchsorted(self.ends[:room], characters, side="right")
        begins = np.append(self.starts[:room], _NOWHERE)  # none covers what was cut off
        return np.where(begins[token] <= characters, token, -1)


class EncodedTexts(NamedTuple):
    """The tokens of some texts, one after the other, and how many each has."""

    tokens: Encoded
    lengths: NDArray[np.int64]

    def each(self) -> list[Encoded]:
        """The tokens of each text."""
        ends = accumulate(self.lengths.tolist(), initial=0)
        return [self.tokens.part(where) for where in starmap(slice, pairwise(ends))]


class EncodedPairs(NamedTuple):
    """Some pairs of texts as the tokenizer joins them, with the special tokens.

    ids, types (segments) [all of their tokens] int32; lengths [pairs]: how many each has. of: 0 for
    a token of the first text, 1 of the second, -1 for special tokens. texts: what is kept of their
    texts, two of each; lost [pairs]: how many tokens are not.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    of: NDArray[np.int32]
    lengths: NDArray[np.int64]
    texts: EncodedTexts
    lost: NDArray[np.int64]


def encoded_texts(texts: Sequence[str], encodings: "Sequence[Encoding]") -> EncodedTexts:
    """The tokens of ``texts``, of each of which there is an encoding without special tokens."""
    lengths = lengths_of(encodings)
    firsts = np.append(0, np.cumsum(lengths))
    ids = _flat((e.ids for e in encodings), firsts[-1])
    spans = _flat((chain.from_iterable(e.offsets) for e in encodings), 2 * firsts[-1])
    # The texts one after the other, so that nothing goes over from one to the next.
    begins = np.cumsum([0, *(len(text) + len(_BETWEEN) for text in texts)])
    before = np.repeat(begins[:-1], np.diff(firsts))[:, None]
    # Tokenizers that trim white space off the spans move some of them back (a lone "▁", say).
    places = np.maximum.accumulate(spans.reshape(-1, 2) + before)
    starts, ends = np.ascontiguousarray((places - before).T.astype(np.int32))
    word_ids = _flat((e.word_ids for e in encodings), firsts[-1])
    words = _words(_BETWEEN.join(texts))[places[:, 0]]
    return EncodedTexts(Encoded(ids, starts, ends, _word_starts(word_ids, words, firsts)), lengths)


def encoded_pairs(
    whole: EncodedTexts, kept: NDArray[np.int64], joined: "Sequence[Encoding]"
) -> EncodedPairs:
    """Pairs of the texts that ``whole`` has, two by two: of each text so many tokens are ``kept``
    in the encoding of its pair.
    """
    lengths = lengths_of(joined)
    count = int(lengths.sum())
    ids = _flat((e.ids for e in joined), count)
    types = _flat((e.type_ids for e in joined), count)
    special = _flat((e.special_tokens_mask for e in joined), count)
    of = np.full(count, -1, np.int32)
    of[special == 0] = np.repeat(np.arange(len(kept), dtype=np.int32) % 2, kept)
    firsts = np.cumsum(whole.lengths) - whole.lengths
    at = np.arange(whole.lengths.sum()) - np.repeat(firsts, whole.lengths)
    stays = at < np.repeat(kept, whole.lengths)
    lost = (whole.lengths - kept).reshape(-1, 2).sum(axis=1)
    texts = EncodedTexts(whole.tokens.part(stays), kept)
    return EncodedPairs(ids, types, of, lengths, texts, lost)


def lengths_of(encodings: "Sequence[Encoding]") -> NDArray[np.int64]:
    """How many tokens each has."""
    return np.fromiter(map(len, encodings), np.int64, len(encodings))


def _flat(parts: Iterable[Iterable[int | None]], count: int) -> NDArray[np.int32]:
    return np.fromiter(chain.from_iterable(parts), np.int32, count)


def _word_starts(
    word_ids: NDArray[np.int32], words: NDArray[np.int32], firsts: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """[L]: a text begins, the pre-tokenizer's word changes, or white space lies between.

    The last rule alone decides for tokenizers that take the whole text for one word (Llama's
    Metaspace), and sees line breaks inside a word of those that split at "▁" only.
    """
    starts = np.ones(len(word_ids) + 1, np.bool_)
    starts[1:-1] = (word_ids[1:] != word_ids[:-1]) | (words[1:] != words[:-1])
    starts[firsts] = True
    return starts[:-1]


def _words(text: str) -> NDArray[np.int32]:
    """[characters + 1]: the number of a character's word; white space belongs to the word after."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    space = _space_table()[np.minimum(codes, _HIGHEST_SPACE + 1)]
    begins = np.zeros(len(codes) + 1, np.bool_)
    begins[1:-1] = space[1:] & ~space[:-1]
    return np.cumsum(begins, dtype=np.int32)


@lru_cache(maxsize=1)
def _space_table() -> NDArray[np.bool_]:
    return np.array([chr(code).isspace() for code in range(_HIGHEST_SPACE + 2)])
