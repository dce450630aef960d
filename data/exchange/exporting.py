"""Export a teacher's targets as rows with their text, for people and other programs.

Rows have the fields that an import needs, under the same names, so an export can be imported again.
P positions, K candidates, C labels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from rekindle.data.batch import (
    EmbeddingBatch,
    SequenceTargetBatch,
    TokenLabelBatch,
    TokenTargetBatch,
    read_clean,
    read_masked,
    read_targets,
)
from rekindle.data.corpus.columns import GROUP
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.pieces import PieceTexts
from rekindle.data.errors import InputError
from rekindle.data.targets.codec import STEP, Floats
from rekindle.data.targets.kinds.base import VocabularyKind
from rekindle.data.targets.kinds.embedding import Embedding
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.reader import ViewReader

Values = dict[str, object]
ROWS_AT_A_TIME = 32
TEXT_FIELDS = ("digest", "document", "domain", "text")
_TEXTS, _INTS, _FLOATS = pa.list_(pa.string()), pa.list_(pa.int32()), pa.list_(pa.float32())
TYPES = {
    "index": pa.int64(),
    **dict.fromkeys((*TEXT_FIELDS, GROUP), pa.string()),
    "input_ids": _INTS,
    "tokens": _TEXTS,
    "replica": pa.int32(),
    "shown_ids": _INTS,
    "positions": _INTS,
    "ids": pa.list_(_INTS),
    "candidates": pa.list_(_TEXTS),
    "log_probs": pa.list_(_FLOATS),
    "temperature": pa.float64(),
    "log_tail": _FLOATS,
    "sampled_ids": pa.list_(_INTS),
    "sampled_log_probs": pa.list_(_FLOATS),
    "gold_tokens": _TEXTS,
    "gold_log_probs": _FLOATS,
    "gold_ranks": _INTS,
    "entropy": _FLOATS,
    "label": pa.string(),
    "labels": _TEXTS,
    "logits": _FLOATS,
    "probabilities": _FLOATS,
    "vector": _FLOATS,
}
# An expert on words has a label and a list of logits for each position.
WORD_TYPES = {"label": _TEXTS, "logits": pa.list_(_FLOATS), "probabilities": pa.list_(_FLOATS)}


@dataclass
class Export:
    """Rows of one teacher of a cache, or, without a teacher, of the text alone.

    ``view``: masked text without targets, for a model that is run elsewhere. ``k``: only this many
    candidates of each position; required for teachers that store whole distributions. Raises
    InputError for a ``k`` that is not stored.
    """

    corpus: Corpus
    teacher: TeacherReader | None = None
    view: ViewReader | None = None
    k: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        self._texts = _Texts(PieceTexts(self.corpus.tokenizer.hf))
        if self.teacher is not None:
            self.view = self.teacher.view
            self._check_k(self.teacher)
        self.names = self._names()

    def _check_k(self, teacher: TeacherReader) -> None:
        kind, name = teacher.kind, teacher.info.name
        if not isinstance(kind, VocabularyKind):
            if self.k is not None:
                raise InputError(f"k is for language models; {name!r} is a {teacher.info.task}")
        elif kind.has_all_probabilities and self.k is None:
            raise InputError(
                f"teacher {name!r} keeps whole distributions, {kind.size:,} values per position; "
                "give how many of the likeliest you want (k, --k)"
            )
        elif self.k is not None and not 1 <= self.k <= kind.k:
            raise InputError(f"k is {self.k}, but teacher {name!r} has 1 to {kind.k} candidates")
        elif self.k is not None and kind.is_sample:
            raise InputError(
                f"teacher {name!r} keeps samples, part of which is meaningless. Leave k out"
            )

    def _names(self) -> list[str]:
        fields = ["index", *self._text_fields, "input_ids", "tokens"]
        if self.view is not None and self.view.kind.masked:
            fields += ["replica", "shown_ids"]
            fields += [] if self.teacher else ["positions"]
        if self.teacher is None:
            return fields
        info, kind = self.teacher.info, self.teacher.kind
        if isinstance(kind, Embedding):
            return [*fields, "vector"]
        if not isinstance(kind, VocabularyKind):
            place_fields = [] if kind.per_sequence else ["positions"]
            return [*fields, *place_fields, "label", "labels", "logits", "probabilities"]
        value_fields = ["temperature"] if kind.readable_temperature != 1 else []
        value_fields += ["ids", "candidates", "log_probs", "log_tail"]
        value_fields += ["log_tails"] if self._further_temperatures else []
        if kind.is_sample:
            value_fields = ["sampled_ids", "candidates", "sampled_log_probs"]
        lacks = info.lacks
        gold = [] if "gold_rank" in lacks else ["gold_log_probs", "gold_ranks"]
        entropy = [] if "entropy" in lacks else ["entropy"]
        return [*fields, "positions", *value_fields, "gold_tokens", *gold, *entropy]

    @property
    def _text_fields(self) -> tuple[str, ...]:
        """Return the fields about a sequence's text."""
        return (*TEXT_FIELDS, GROUP) if self.corpus.has_groups else TEXT_FIELDS

    @property
    def _further_temperatures(self) -> list[float]:
        """Return the temperatures of further tails."""
        if self.teacher is None or not isinstance(kind := self.teacher.kind, VocabularyKind):
            return []
        return [
            at
            for at in self.teacher.info.temperatures
            if kind.has_tail and at != kind.readable_temperature
        ]

    @property
    def schema(self) -> pa.Schema:
        """Return the Arrow schema of the rows."""
        is_per_word = self.teacher is not None and self.teacher.info.kind == "token"
        types = TYPES | (WORD_TYPES if is_per_word else {})
        further_fields = [pa.field(_name(at), _FLOATS) for at in self._further_temperatures]
        types |= {"log_tails": pa.struct(further_fields)}
        return pa.schema([pa.field(name, types[name]) for name in self.names])

    def batches(
        self, progress: Callable[[int], None] = lambda rows: None
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows as record batches, a few at a time."""
        schema, rows = self.schema, []
        for row in self.rows():
            rows.append(row)
            if len(rows) == ROWS_AT_A_TIME:
                progress(len(rows))
                yield pa.RecordBatch.from_pylist(rows, schema)
                rows = []
        if rows:
            progress(len(rows))
            yield pa.RecordBatch.from_pylist(rows, schema)

    def rows(self) -> Iterator[Values]:
        """Yield each row by its fields' names, in the order of the corpus, replica after replica.

        Sequences without cached targets have no row.
        """
        masked = self.view is not None and self.view.kind.masked
        replicas = [*range(self.view.replicas)] if masked and self.view else [None]
        for replica in replicas:
            for index in range(min(len(self.corpus), self.limit or len(self.corpus))):
                row = self._row(index, replica)
                if row is not None:
                    yield {name: row.get(name) for name in self.names}

    @property
    def digest(self) -> str:
        """Return a fingerprint of what decides the rows: the bytes they are read from, and how."""
        settings = (self.k, self.limit, self.view and self.view.name)
        state = xxhash.xxh3_64(repr((self.corpus.fingerprint, *settings)).encode())
        for part in self.teacher.parts if self.teacher is not None else ():
            for unit, sha256 in sorted(zip(part.commits, part.commits.sha256s, strict=True)):
                state.update(f"{part.info.folder} {unit} {sha256}".encode())
        return str(state.hexdigest())

    @property
    def count(self) -> int:
        """Return the number of rows, at most."""
        masked = self.view is not None and self.view.kind.masked
        replicas = self.view.replicas if masked and self.view else 1
        return replicas * min(len(self.corpus), self.limit or len(self.corpus))

    def _row(self, index: int, replica: int | None) -> Values | None:
        shards, rows = self.corpus.locate(np.array([index]))
        place = (int(shards[0]), int(rows[0]))
        if self.teacher is not None and not self.teacher.has(place[0], replica):
            return None
        ids, _ = read_clean(self.corpus, [place])
        fields: Values = {"index": index, "input_ids": ids[0], "tokens": self._texts.of(ids[0])}
        fields |= {name: self.corpus.text(name, place) for name in self._text_fields}
        if replica is not None and self.view is not None:
            masked = read_masked(self.view, [place], ids, replica)
            fields |= {"replica": replica, "shown_ids": masked.input_ids[0]}
            fields["positions"] = masked.positions.astype(np.int32)
        if self.teacher is None:
            return fields
        target = read_targets(self.teacher, [place], replica)
        if isinstance(target, TokenTargetBatch):
            return fields | self._tokens(target, ids[0])
        if isinstance(target, EmbeddingBatch):
            return fields | {"vector": target.vectors[0]} if len(target.rows) else None
        assert isinstance(target, SequenceTargetBatch | TokenLabelBatch)
        if isinstance(target, SequenceTargetBatch) and not target.present[0]:
            return None
        return fields | _labels(target)

    def _tokens(self, target: TokenTargetBatch, ids: NDArray[np.int32]) -> Values:
        """Return a language model's values at its positions."""
        assert self.teacher is not None
        columns, kind = target.columns, target.kind
        candidate_ids, log_probs, log_tail = target.decode(kind.readable_temperature, self.k)
        gold = ids[target.positions + (target.info.task == "causal_lm")]
        prefix = "sampled_" if kind.is_sample else ""
        values: Values = {
            "positions": target.positions.astype(np.int32),
            f"{prefix}ids": [*candidate_ids.astype(np.int32)],
            "candidates": [self._texts.of(row) for row in candidate_ids],
            f"{prefix}log_probs": [*log_probs.astype(np.float32)],
            "temperature": kind.readable_temperature,
            "log_tail": _masses(log_tail),
            "log_tails": {
                _name(at): _masses(target.decode(at, self.k)[2])
                for at in self._further_temperatures
            },
            "gold_tokens": self._texts.of(gold),
        }
        if "gold_rank" in columns:
            values["gold_ranks"] = columns["gold_rank"].astype(np.int32)
            values["gold_log_probs"] = -columns["gold_log_prob"].astype(np.float32) / STEP
        if "entropy" in columns:
            values["entropy"] = columns["entropy"].astype(np.float32) / STEP
        return values


def _name(temperature: float) -> str:
    return repr(temperature).removesuffix(".0")


def _masses(log_tail: Floats) -> list[float | None]:
    """Return logarithms of masses, null for zero mass."""
    return [None if tail == -np.inf else tail for tail in log_tail.tolist()]


class _Texts:
    """The texts of tokens, each looked up once."""

    def __init__(self, pieces: PieceTexts):
        self._pieces, self._known = pieces, {-1: ""}

    def of(self, ids: NDArray[np.integer]) -> list[str]:
        """Return the texts of ``ids``; "" for −1, which pads samples with fewer ids."""
        texts = []
        for one in ids.tolist():
            if one not in self._known:
                self._known[one] = self._pieces[one]
            texts.append(self._known[one])
        return texts


def _labels(target: SequenceTargetBatch | TokenLabelBatch) -> Values:
    """Return an expert's answer for a sequence, or for its words."""
    names, probs = [*target.info.label_names], probabilities(target.info, target.logits)
    best = [names[at] for at in target.logits.argmax(axis=1)]
    if isinstance(target, TokenLabelBatch):
        return {
            "positions": target.positions.astype(np.int32),
            "label": best,
            "labels": names,
            "logits": [*target.logits],
            "probabilities": [*probs],
        }
    label = None if target.info.problem == "regression" else best[0]
    probabilities_shown = None if target.info.problem == "regression" else probs[0]
    return {
        "label": label,
        "labels": names,
        "logits": target.logits[0],
        "probabilities": probabilities_shown,
    }


def probabilities(info: TeacherInfo, logits: Floats) -> Floats:
    """Return the probabilities of the labels [N,C], of which one, or (multi_label) any number,
    holds.
    """
    if info.problem == "multi_label_classification":
        both = np.stack([np.zeros_like(logits), logits])
        return np.exp(logits - np.logaddexp.reduce(both, axis=0))
    return np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
