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

CHECKED_SEQUENCES = 64  # sequences, before a teacher is run

Ids = NDArray[np.int64]


class MappedRows(NamedTuple):
    """What a teacher is shown of some sequences, and where tokens of both tokenizers begin at the
    same byte: ``positions`` [P] of the corpus's row (each the one before such a token), and
    ``token_indices`` [P] of ``shown_ids``, which predict it.
    """

    shown_ids: list[Ids]
    token_indices: list[Ids]
    positions: list[Ids]
    expected: Ids  # [rows] how many positions there are in all


@dataclass(frozen=True)
class VocabularyMap:
    """The map between the tokenizer of a corpus and a teacher's. ``rows`` [V]: the teacher's id of
    each id of the corpus, −1 for none; ``others``: its tokens that are none of the corpus's.
    """

    tokenizer: Tokenizer
    corpus_bytes: list[bytes | None]
    teacher_bytes: list[bytes | None]
    rows: Ids
    others: Ids

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: Tokenizer, rows: int) -> "VocabularyMap":
        """Return the map of a teacher with ``rows`` rows in its output matrix. Raises InputError if
        the bytes of tokens are unknown.
        """
        corpus_bytes, teacher_bytes = bytes_of_tokens(corpus.tokenizer), bytes_of_tokens(tokenizer)
        teacher_ids = common_tokens(corpus_bytes, teacher_bytes[:rows])
        teacher_tokens = {id for id, _ in tokenizer.tokens() if id < rows}
        others = sorted(teacher_tokens - {*teacher_ids.tolist()})
        return cls(tokenizer, corpus_bytes, teacher_bytes, teacher_ids, np.array(others, np.int64))

    @property
    def count(self) -> int:
        """How many tokens both have."""
        return int((self.rows >= 0).sum())

    def map_rows(self, table: pa.Table, longest: int) -> MappedRows:
        """Map the sequences of a shard's table; the teacher takes ``longest`` tokens."""
        texts = table["text"].to_pylist()
        prefix = np.array(self.tokenizer.prefix, np.int64)
        column_names = ("input_ids", "char_starts", "document_starts")
        lists = zip(*(split_lists(table.to_batches(), name) for name in column_names), strict=True)
        all_shown, token_indices, positions, expected = [], [], [], []
        for text, encoded, (ids, chars, documents) in zip(
            texts, self.tokenizer.encode(texts), lists, strict=True
        ):
            shown_ids = encoded.ids[: longest - len(prefix)].astype(np.int64)
            all_shown.append(np.concatenate([prefix, shown_ids]))
            expected.append(max(0, len(ids) - 1))
            corpus_tokens, teacher_tokens = self._common_starts(
                text, ids, chars, documents, encoded.ids, len(prefix) > 0
            )
            teacher_tokens += len(prefix) - 1  # what predicts the token
            fits = teacher_tokens < len(all_shown[-1])
            token_indices.append(teacher_tokens[fits])
            positions.append(corpus_tokens[fits] - 1)
        return MappedRows(all_shown, token_indices, positions, np.array(expected, np.int64))

    def _common_starts(
        self,
        text: str,
        ids: Ids,
        chars: Ids,
        documents: Ids,
        encoded: NDArray[np.int32],
        has_prefix: bool,
    ) -> tuple[Ids, Ids]:
        """Return the tokens of a sequence, and of the teacher's reading of it, that begin at the
        same byte and have a token before them; ``has_prefix``: the teacher's first token has one.
        """
        empty = np.zeros(0, np.int64), np.zeros(0, np.int64)
        teacher_starts = starts_of_tokens(encoded, self.teacher_bytes, _encoded(text))
        if teacher_starts is None:
            return empty
        content = np.flatnonzero(chars >= 0)
        if not len(content):
            return empty
        piece = np.searchsorted(documents, content, side="right")
        corpus_tokens: list[Ids] = []
        corpus_starts: list[Ids] = []
        piece_starts = [int(chars[content[piece == number][0]]) for number in np.unique(piece)]
        piece_ends = [start - len(PIECE_SEPARATOR) for start in piece_starts[1:]] + [len(text)]
        for number, start, end in zip(np.unique(piece), piece_starts, piece_ends, strict=True):
            tokens = content[piece == number]
            token_starts = starts_of_tokens(
                ids[tokens], self.corpus_bytes, _encoded(text[start:end])
            )
            if token_starts is not None:
                corpus_tokens.append(tokens)
                corpus_starts.append(token_starts + len(_encoded(text[:start])))
        if not corpus_tokens:
            return empty
        joint, common_starts = np.concatenate(corpus_tokens), np.concatenate(corpus_starts)
        has_predecessor = joint > 0  # nothing predicts the first token of a sequence
        joint, common_starts = joint[has_predecessor], common_starts[has_predecessor]
        _, in_corpus, in_teacher = np.intersect1d(
            common_starts, teacher_starts, return_indices=True
        )
        predicted = in_teacher > 0 if not has_prefix else np.ones(len(in_teacher), np.bool_)
        return joint[in_corpus][predicted], in_teacher[predicted].astype(np.int64)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def check_positions(mapping: VocabularyMap, corpus: Corpus, name: str, min_share: float) -> None:
    """Log how many tokens and positions of a corpus's first sequences a teacher's map keeps.

    Raises InputError if that is less than the share ``min_share`` of the positions.
    """
    if corpus.has_trained or corpus.has_pairs:
        raise InputError(
            f"teacher {name!r}: vocabulary: map reads the text of a sequence, but this corpus has "
            "dialogues, rows of tokens or pairs. Use a teacher of corpus.tokenizer"
        )
    table = corpus.shard(0).table().slice(0, CHECKED_SEQUENCES)
    rows = mapping.map_rows(table, 2**31)
    mapped_count, position_count = sum(map(len, rows.positions)), int(rows.expected.sum())
    share = mapped_count / position_count if position_count else 0.0
    summary = (
        f"{mapping.count:,} of {len(mapping.rows):,} tokens of the corpus's vocabulary are in "
        f"its own; tokens of both begin together at {share:.1%} of the positions of the first "
        f"{len(rows.shown_ids)} sequences"
    )
    if share < min_share:
        raise InputError(
            f"teacher {name!r} (vocabulary: map): {summary}, which is less than map_coverage "
            f"({min_share:g}). Use a teacher with a tokenizer closer to corpus.tokenizer, or set "
            "map_coverage lower; the other positions are then trained without it"
        )
    log.info("teacher %s, vocabulary: map: %s", name, summary)


def check_mass(mass: NDArray[np.float32], name: str, min_share: float) -> None:
    """Raise InputError if the tokens that both have hold, on average, less than ``min_share`` of
    the probability.
    """
    mean = float(np.mean(mass)) if len(mass) else 1.0
    if mean < min_share:
        raise InputError(
            f"teacher {name!r} (vocabulary: map): the tokens of the corpus's vocabulary hold "
            f"{mean:.1%} of its probability, which is less than map_coverage ({min_share:g}); the "
            "rest would be tail. Use a teacher with a tokenizer closer to corpus.tokenizer, or set "
            "map_coverage lower"
        )
