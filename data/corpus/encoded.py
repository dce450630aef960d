"""A tokenizer's output as arrays, for a batch of texts at a time, because a corpus may have very
many short ones.
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
_PAST_END = np.iinfo(np.int32).max  # past the last character of any text
_TEXT_SEPARATOR = "|"  # not white space


class Encoded(NamedTuple):
    """One text's L tokens, without special tokens.

    ids [L] int32; starts, ends [L] int32: the characters text[start:end] that a token stands for,
    as the tokenizer counts them (byte-level tokens include the space before a word, and all tokens
    of one emoji span that emoji); neither ever decreases. word_starts [L] bool: the token begins a
    new word.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]
    word_starts: NDArray[np.bool_]

    @staticmethod
    def concatenate(parts: "Sequence[Encoded]") -> "Encoded":
        """Return those of several, concatenated."""
        return Encoded(*map(np.concatenate, zip(*parts, strict=True)))

    def part(self, selection: slice | NDArray[np.bool_]) -> "Encoded":
        """Return some of the tokens."""
        ids, starts, ends, word_numbers = self
        return Encoded(ids[selection], starts[selection], ends[selection], word_numbers[selection])

    def tokens_at(self, characters: NDArray[np.int64], room: int) -> NDArray[np.int64]:
        """Return the first token that stands for each of some characters of the text; -1 if none of
        the first ``room`` tokens does.
        """
        token = np.searchsorted(self.ends[:room], characters, side="right")
        starts = np.append(self.starts[:room], _PAST_END)  # no token covers what was cut off
        return np.where(starts[token] <= characters, token, -1)


class EncodedTexts(NamedTuple):
    """The tokens of some texts, concatenated, and each one's number of tokens."""

    tokens: Encoded
    lengths: NDArray[np.int64]

    def each(self) -> list[Encoded]:
        """Return the tokens of each text."""
        ends = accumulate(self.lengths.tolist(), initial=0)
        return [self.tokens.part(selection) for selection in starmap(slice, pairwise(ends))]


class EncodedPairs(NamedTuple):
    """Some pairs of texts as the tokenizer joins them, with special tokens.

    ids, types (segments) [all of their tokens] int32; lengths [pairs]: tokens of each. text_of: 0
    for a token of the first text, 1 of the second, -1 for special tokens. texts: what is kept of
    their texts, two per pair; lost [pairs]: how many tokens are not.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    text_of: NDArray[np.int32]
    lengths: NDArray[np.int64]
    texts: EncodedTexts
    lost: NDArray[np.int64]


def encoded_texts(texts: Sequence[str], encodings: "Sequence[Encoding]") -> EncodedTexts:
    """Return the tokens of ``texts`` from their encodings without special tokens."""
    lengths = lengths_of(encodings)
    firsts = np.append(0, np.cumsum(lengths))
    ids = _flat((e.ids for e in encodings), firsts[-1])
    spans = _flat((chain.from_iterable(e.offsets) for e in encodings), 2 * firsts[-1])
    # Concatenate the texts so that no span crosses from one to the next.
    offsets = np.cumsum([0, *(len(text) + len(_TEXT_SEPARATOR) for text in texts)])
    text_starts = np.repeat(offsets[:-1], np.diff(firsts))[:, None]
    # Tokenizers that trim white space from spans move some of them back (such as a lone "▁").
    places = np.maximum.accumulate(spans.reshape(-1, 2) + text_starts)
    starts, ends = np.ascontiguousarray((places - text_starts).T.astype(np.int32))
    word_ids = _flat((e.word_ids for e in encodings), firsts[-1])
    word_at = _words(_TEXT_SEPARATOR.join(texts))[places[:, 0]]
    return EncodedTexts(
        Encoded(ids, starts, ends, _word_starts(word_ids, word_at, firsts)), lengths
    )


def encoded_pairs(
    uncut: EncodedTexts, kept_counts: NDArray[np.int64], joined: "Sequence[Encoding]"
) -> EncodedPairs:
    """Return pairs of the texts in ``uncut``, two by two; of each text that many tokens are
    ``kept_counts`` in the encoding of its pair.
    """
    lengths = lengths_of(joined)
    count = int(lengths.sum())
    ids = _flat((e.ids for e in joined), count)
    types = _flat((e.type_ids for e in joined), count)
    special = _flat((e.special_tokens_mask for e in joined), count)
    text_of = np.full(count, -1, np.int32)
    text_of[special == 0] = np.repeat(np.arange(len(kept_counts), dtype=np.int32) % 2, kept_counts)
    firsts = np.cumsum(uncut.lengths) - uncut.lengths
    token_numbers = np.arange(uncut.lengths.sum()) - np.repeat(firsts, uncut.lengths)
    is_kept = token_numbers < np.repeat(kept_counts, uncut.lengths)
    lost = (uncut.lengths - kept_counts).reshape(-1, 2).sum(axis=1)
    texts = EncodedTexts(uncut.tokens.part(is_kept), kept_counts)
    return EncodedPairs(ids, types, text_of, lengths, texts, lost)


def lengths_of(encodings: "Sequence[Encoding]") -> NDArray[np.int64]:
    """Return each one's number of tokens."""
    return np.fromiter(map(len, encodings), np.int64, len(encodings))


def _flat(parts: Iterable[Iterable[int | None]], count: int) -> NDArray[np.int32]:
    return np.fromiter(chain.from_iterable(parts), np.int32, count)


def _word_starts(
    word_ids: NDArray[np.int32], word_numbers: NDArray[np.int32], firsts: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return [L]: a text begins, the pre-tokenizer's word changes, or white space lies between.

    Only the last rule works for tokenizers that treat the whole text as one word (Llama's
    Metaspace), and it finds line breaks inside a word for those that split only at "▁".
    """
    starts = np.ones(len(word_ids) + 1, np.bool_)
    starts[1:-1] = (word_ids[1:] != word_ids[:-1]) | (word_numbers[1:] != word_numbers[:-1])
    starts[firsts] = True
    return starts[:-1]


def _words(text: str) -> NDArray[np.int32]:
    """Return [characters + 1]: a character's word number; white space belongs to the word
    after it.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    space = _space_table()[np.minimum(codes, _HIGHEST_SPACE + 1)]
    starts_word = np.zeros(len(codes) + 1, np.bool_)
    starts_word[1:-1] = space[1:] & ~space[:-1]
    return np.cumsum(starts_word, dtype=np.int32)


@lru_cache(maxsize=1)
def _space_table() -> NDArray[np.bool_]:
    return np.array([chr(code).isspace() for code in range(_HIGHEST_SPACE + 2)])
