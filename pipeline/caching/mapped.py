"""A causal teacher with its own tokenizer (``vocabulary: map``): at which corpus positions it has
targets, and which of its tokens are which of the corpus's.

The teacher reads the text of each sequence as its own tokenizer cuts it. Its prediction at a byte
of the text is a target where a token of the corpus begins at that byte, too. Each of its tokens
maps to the corpus token that stands for the same bytes; the rest of its probability lies outside
the corpus's tokens.
"""

import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.rows import PIECE_SEPARATOR
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import InputError
from rekindle.data.storage.columns import split_lists
from rekindle.data.tokens.token_bytes import bytes_of_tokens, common_tokens, starts_of_tokens

log = logging.getLogger("rekindle")

LOOKED_AT = 64  # sequences, before a teacher is run

Ids = NDArray[np.int64]


class MappedRows(NamedTuple):
    """What a teacher is shown of some sequences, and where the two tokenizations meet: at the
    corpus's ``positions`` [P] of a row, each the one before a token, and at the ``places`` [P] of
    ``seen``, which predict the token that begins at the same byte.
    """

    seen: list[Ids]
    places: list[Ids]
    positions: list[Ids]
    expected: Ids  # [rows] how many positions there are in all


@dataclass(frozen=True)
class VocabularyMap:
    """The map between the tokenizer of a corpus and a teacher's. ``rows`` [V]: the teacher's id of
    each id of the corpus, −1 for none; ``others``: its tokens that are none of the corpus's.
    """

    tokenizer: Tokenizer
    ours: list[bytes | None]
    theirs: list[bytes | None]
    rows: Ids
    others: Ids

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: Tokenizer, rows: int) -> "VocabularyMap":
        """Return the map of a teacher with ``rows`` rows in its output matrix. Raises InputError if
        the bytes of tokens are unknown.
        """
        ours, theirs = bytes_of_tokens(corpus.tokenizer), bytes_of_tokens(tokenizer)
        found = common_tokens(ours, theirs[:rows])
        known = {id for id, _ in tokenizer.tokens() if id < rows}
        others = sorted(known - {*found.tolist()})
        return cls(tokenizer, ours, theirs, found, np.array(others, np.int64))

    @property
    def count(self) -> int:
        """How many tokens both have."""
        return int((self.rows >= 0).sum())

    def of_rows(self, table: pa.Table, longest: int) -> MappedRows:
        """Map the sequences of a shard's table; the teacher takes ``longest`` tokens."""
        texts = table["text"].to_pylist()
        prefix = np.array(self.tokenizer.prefix, np.int64)
        names = ("input_ids", "char_starts", "document_starts")
        lists = zip(*(split_lists(table.to_batches(), name) for name in names), strict=True)
        seen, places, positions, expected = [], [], [], []
        for text, own, (ids, chars, documents) in zip(
            texts, self.tokenizer.encode(texts), lists, strict=True
        ):
            shown = own.ids[: longest - len(prefix)].astype(np.int64)
            seen.append(np.concatenate([prefix, shown]))
            expected.append(max(0, len(ids) - 1))
            at, there = self._meeting(text, ids, chars, documents, own.ids, len(prefix) > 0)
            there += len(prefix) - 1  # what predicts the token
            fits = there < len(seen[-1])
            places.append(there[fits])
            positions.append(at[fits] - 1)
        return MappedRows(seen, places, positions, np.array(expected, np.int64))

    def _meeting(
        self, text: str, ids: Ids, chars: Ids, documents: Ids, own: NDArray[np.int32], begun: bool
    ) -> tuple[Ids, Ids]:
        """Return the tokens of a sequence, and of the teacher's reading of it, that begin at the
        same byte and have a token before them; ``begun``: something stands before the teacher's
        first.
        """
        nothing = np.zeros(0, np.int64), np.zeros(0, np.int64)
        theirs = starts_of_tokens(own, self.theirs, _encoded(text))
        if theirs is None:
            return nothing
        content = np.flatnonzero(chars >= 0)
        if not len(content):
            return nothing
        piece = np.searchsorted(documents, content, side="right")
        at: list[Ids] = []
        starts: list[Ids] = []
        first = [int(chars[content[piece == number][0]]) for number in np.unique(piece)]
        past = [begin - len(PIECE_SEPARATOR) for begin in first[1:]] + [len(text)]
        for number, begin, end in zip(np.unique(piece), first, past, strict=True):
            tokens = content[piece == number]
            found = starts_of_tokens(ids[tokens], self.ours, _encoded(text[begin:end]))
            if found is not None:
                at.append(tokens)
                starts.append(found + len(_encoded(text[:begin])))
        if not at:
            return nothing
        joint, joint_starts = np.concatenate(at), np.concatenate(starts)
        kept = joint > 0  # nothing predicts the first token of a sequence
        joint, joint_starts = joint[kept], joint_starts[kept]
        _, mine, other = np.intersect1d(joint_starts, theirs, return_indices=True)
        predicted = other > 0 if not begun else np.ones(len(other), np.bool_)
        return joint[mine][predicted], other[predicted].astype(np.int64)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def check_positions(found: VocabularyMap, corpus: Corpus, name: str, least: float) -> None:
    """Log how many tokens and positions of a corpus's first sequences a teacher's map keeps.

    Raises InputError if that is less than the share ``least`` of the positions.
    """
    if corpus.has_trained or corpus.has_pairs:
        raise InputError(
            f"teacher {name!r}: vocabulary: map reads the text of a sequence, but this corpus has "
            "dialogues, rows of tokens or pairs. Use a teacher of corpus.tokenizer"
        )
    table = corpus.shard(0).table().slice(0, LOOKED_AT)
    rows = found.of_rows(table, 2**31)
    kept, whole = sum(map(len, rows.positions)), int(rows.expected.sum())
    share = kept / whole if whole else 0.0
    told = (
        f"{found.count:,} of {len(found.rows):,} tokens of the corpus's vocabulary are in "
        f"its own; tokens of both begin together at {share:.1%} of the positions of the first "
        f"{len(rows.seen)} sequences"
    )
    if share < least:
        raise InputError(
            f"teacher {name!r} (vocabulary: map): {told}, which is less than map_coverage "
            f"({least:g}). Use a teacher with a tokenizer closer to corpus.tokenizer, or set "
            "map_coverage lower; the other positions are then trained without it"
        )
    log.info("teacher %s, vocabulary: map: %s", name, told)


def check_mass(mass: NDArray[np.float32], name: str, least: float) -> None:
    """Raise InputError if the tokens that both have hold less than ``least`` of the probability on
    average.
    """
    mean = float(np.mean(mass)) if len(mass) else 1.0
    if mean < least:
        raise InputError(
            f"teacher {name!r} (vocabulary: map): the tokens of the corpus's vocabulary hold "
            f"{mean:.1%} of its probability, which is less than map_coverage ({least:g}); the rest "
            "would be tail. Use a teacher with a tokenizer closer to corpus.tokenizer, or set "
            "map_coverage lower"
        )
