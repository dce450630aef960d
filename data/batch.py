"""What a training step reads: sequences, views and targets, still in the cache's encoding.

B sequences, S positions of the longest, P positions with a target in the whole batch, K candidates,
C classes. ``rows`` [P] gives the sequence of the batch that a position belongs to.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.example import (
    SequenceTargets,
    Target,
    TokenLabelTargets,
    TokenTargets,
    VectorTargets,
)
from rekindle.data.storage.cuts import Place, cut_lengths, join_cuts, pad_cuts
from rekindle.data.targets.answers import entropies, probabilities
from rekindle.data.targets.codec import STEP, Columns
from rekindle.data.targets.head import StoredHead
from rekindle.data.targets.kinds.base import VocabularyKind
from rekindle.data.targets.kinds.embedding import Embedding
from rekindle.data.targets.kinds.registry import vocabulary_kind
from rekindle.data.targets.kinds.topk import TopK
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.reader import ViewReader

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]
RowChoice = NDArray[np.bool_] | slice  # of rows


@dataclass(frozen=True)
class MaskedInputs:
    """One masked replica of the batch's sequences."""

    replica: int
    input_ids: Tokens  # [B,S]
    rows: Ints  # [P]
    positions: Ints  # [P]
    labels: Ints  # [P] the true ids

    def take(self, part: slice, width: int) -> "MaskedInputs":
        """Return ``part`` of the sequences, none of which is longer than ``width``."""
        first, last = np.searchsorted(self.rows, [part.start, part.stop])
        return MaskedInputs(
            self.replica,
            self.input_ids[part, :width],
            self.rows[first:last] - part.start,
            self.positions[first:last],
            self.labels[first:last],
        )


@dataclass(frozen=True)
class PairInputs:
    """The batch's sentence pairs as the student sees them; a missing pair has length 0."""

    input_ids: Tokens  # [B,S']
    token_types: Tokens  # [B,S']
    lengths: Ints  # [B]

    def take(self, part: slice) -> "PairInputs":
        """Return ``part`` of the sequences, no wider than the longest of them."""
        lengths = self.lengths[part]
        inside = slice(int(lengths.max(initial=1)))  # models take no inputs of width 0
        return PairInputs(self.input_ids[part, inside], self.token_types[part, inside], lengths)


class TargetBatch(ABC):
    """One teacher's targets of a batch. R rows: its positions, or its sequences, with a target."""

    info: TeacherInfo
    rows: Ints  # [R] the sequence that each row belongs to, ascending

    def keep(self, chosen: RowChoice) -> Self:
        """Return the targets of the chosen rows among the R."""
        if not isinstance(chosen, slice) and chosen.all():
            return self
        return self._keep(chosen)

    @abstractmethod
    def _keep(self, chosen: RowChoice) -> Self: ...

    def take(self, part: slice) -> Self:
        """Return the targets of ``part`` of the batch's sequences."""
        first, last = np.searchsorted(self.rows, [part.start, part.stop])
        targets = self.keep(slice(first, last))
        return replace(targets, rows=targets.rows - part.start)  # type: ignore[type-var]

    @abstractmethod
    def example(self, ids: Tokens, seen: Tokens, replica: int | None) -> Target | None:
        """Return the batch's only sequence's target for people to read, None if it has none.

        ``ids`` [S] is the sequence itself, ``seen`` [S] what the teacher saw.
        """


@dataclass(frozen=True)
class TokenTargetBatch(TargetBatch):
    """One teacher's vocabulary targets of a batch, encoded."""

    info: TeacherInfo
    rows: Ints  # [P]
    positions: Ints  # [P]
    columns: Columns  # flat [P,…], see data/targets/kinds/
    head: StoredHead | None = None  # of a teacher with stored hidden states
    max_k: int | None = None  # candidates that the run uses; None: all that are stored
    between: bool = False  # whether temperatures between stored ones are interpolated

    @property
    def kind(self) -> VocabularyKind:
        """Return the kind of its columns."""
        return vocabulary_kind(self.info)

    def used_k(self, k: int | None) -> int | None:
        """Return the number of candidates read if ``k`` is asked for; None: all that are stored."""
        k = self.max_k if k is None else k
        return None if k == self.info.k else k

    def interpolating(self, allowed: bool = True) -> Self:
        """Return the same targets, also readable at temperatures between stored ones (``topk`` with
        three or more: ``data/targets/interpolation.py`` says how, and how accurately).
        """
        return replace(self, between=allowed)

    def _keep(self, chosen: RowChoice) -> Self:
        columns = {name: column[chosen] for name, column in self.columns.items()}
        rows, positions = self.rows[chosen], self.positions[chosen]
        return replace(self, rows=rows, positions=positions, columns=columns)

    def decode(self, temperature: float = 1.0, k: int | None = None) -> tuple[Ints, Floats, Floats]:
        """Return ids [P,k], log-probabilities [P,k] at ``temperature``, log tail mass [P].

        By falling probability; for a dense teacher, the whole vocabulary in the order of its ids.
        In ``random`` targets an id of −1 (with probability 0) fills places where fewer ids were
        drawn. Meant for inspection: dense targets and hidden states become [P,V] floats here, while
        a loss takes what ``train/to_device.py`` sends in stored form.

        Raises InputError at a temperature that is not stored (nor interpolated: ``interpolating``),
        or for a ``k`` below a sample's; ValueError for a k outside 1..K.
        """
        if k is not None and not 1 <= k <= self.kind.k:
            raise ValueError(f"k must lie in 1..{self.kind.k}, the number that is stored, got {k}")
        kind, columns = self.kind, self.columns
        if self.between and isinstance(kind, TopK) and kind.interpolates(temperature):
            kind, columns = kind.interpolated(columns, temperature)
        return kind.decode(columns, self.head, temperature, self.used_k(k))

    def example(self, ids: Tokens, seen: Tokens, replica: int | None) -> Target:
        """Return the only sequence's targets, decoded."""
        columns, temperature = self.columns, self.kind.readable_temperature
        unknown = np.full(len(self.positions), np.nan, np.float32)  # for imported targets

        def nats(name: str) -> Floats:
            return (
                columns[name].astype(np.float32) / np.float32(STEP) if name in columns else unknown
            )

        candidates, log_probs, log_tail = self.decode(temperature)
        tails = {tau: self.decode(tau)[2] for tau in self.info.temperatures}
        return TokenTargets(
            replica=replica,
            input_ids=seen,
            positions=self.positions,
            ids=candidates,
            log_probs=log_probs,
            log_tail=tails | {temperature: log_tail},
            gold_ids=ids[self.positions + (self.info.task == "causal_lm")].astype(np.int64),
            gold_log_prob=-nats("gold_log_prob"),
            gold_rank=columns.get("gold_rank", np.full(len(unknown), -1)).astype(np.int64),
            entropy=nats("entropy"),
        )


class ExpertBatch(TargetBatch):
    """An expert's logits of a batch: a row per position, or per sequence of the batch."""

    logits: Floats  # [R,C]

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the names [C] of its classes, labels or scores."""
        numbered = (f"LABEL_{number}" for number in range(self.info.num_labels or 0))
        return self.info.label_names or tuple(numbered)

    def probabilities(self, temperature: float = 1.0) -> Floats:
        """Return the probabilities of its classes, shaped as ``logits``; NaN without a target.

        For an expert on labels that may hold together: of each label. Raises InputError for scores.
        """
        return probabilities(self.info, self._known(), temperature)

    def entropy(self, temperature: float = 1.0) -> Floats:
        """Return the entropy in nats of each row of ``logits``: how uncertain the expert is."""
        return entropies(self.info, self.probabilities(temperature))

    def _known(self) -> Floats:
        return self.logits


@dataclass(frozen=True)
class TokenLabelBatch(ExpertBatch):
    """One token classifier's logits of a batch."""

    info: TeacherInfo
    rows: Ints  # [P]
    positions: Ints  # [P]
    logits: Floats  # [P,C]

    def _keep(self, chosen: RowChoice) -> Self:
        rows, positions = self.rows[chosen], self.positions[chosen]
        return replace(self, rows=rows, positions=positions, logits=self.logits[chosen])

    def example(self, ids: Tokens, seen: Tokens, replica: int | None) -> Target:
        """Return the only sequence's targets."""
        return TokenLabelTargets(self.positions, self.logits)


@dataclass(frozen=True)
class SequenceTargetBatch(ExpertBatch):
    """One sequence expert's logits of a batch."""

    info: TeacherInfo
    present: NDArray[np.bool_]  # [B]
    logits: Floats  # [B,C], zero where missing
    mc_probs: Floats | None  # [B,C]

    @property
    def rows(self) -> Ints:  # type: ignore[override]
        """Return the sequences [R] that have a target."""
        return np.flatnonzero(self.present)

    def _keep(self, chosen: RowChoice) -> Self:
        present = np.zeros_like(self.present)
        present[self.rows[chosen]] = True
        return replace(self, present=present)

    def _known(self) -> Floats:
        return np.where(self.present[:, None], self.logits, np.float32(np.nan))

    def take(self, part: slice) -> Self:
        """Return the targets of ``part`` of the batch's sequences."""
        mc = None if self.mc_probs is None else self.mc_probs[part]
        return replace(self, present=self.present[part], logits=self.logits[part], mc_probs=mc)

    def example(self, ids: Tokens, seen: Tokens, replica: int | None) -> Target | None:
        """Return the only sequence's logits."""
        mc = None if self.mc_probs is None else self.mc_probs[0]
        return SequenceTargets(self.logits[0], mc) if self.present[0] else None


@dataclass(frozen=True)
class EmbeddingBatch(TargetBatch):
    """One sentence encoder's vectors of a batch."""

    info: TeacherInfo
    rows: Ints  # [R]
    vectors: Floats  # [R,D]

    def _keep(self, chosen: RowChoice) -> Self:
        return replace(self, rows=self.rows[chosen], vectors=self.vectors[chosen])

    def example(self, ids: Tokens, seen: Tokens, replica: int | None) -> Target | None:
        """Return the only sequence's vector."""
        return VectorTargets(self.vectors[0]) if len(self.rows) else None


def read_clean(corpus: Corpus, places: Sequence[Place]) -> tuple[Tokens, Ints]:
    """Read the unmasked sequences ``places`` [B]: ids [B,S], padded, and their lengths [B]."""
    cuts = [corpus.cut(place) for place in places]
    lengths = cut_lengths(cuts)
    return pad_cuts(cuts, lengths, "input_ids", corpus.info["tokenizer"]["pad_id"]), lengths


def read_masked(
    view: ViewReader, places: Sequence[Place], clean: Tokens, replica: int
) -> MaskedInputs:
    """Read a masked ``replica`` of the sequences ``places`` [B], unmasked ``clean`` [B,S]."""
    cuts = [view.cut(place, replica) for place in places]
    columns = join_cuts(cuts)
    rows = np.repeat(np.arange(len(places)), cut_lengths(cuts))
    positions = columns["positions"].astype(np.int64)
    seen = clean.copy()
    seen[rows, positions] = columns["input_ids"]
    return MaskedInputs(replica, seen, rows, positions, clean[rows, positions].astype(np.int64))


def read_pairs(view: ViewReader, places: Sequence[Place]) -> PairInputs:
    """Read the pairs of the sequences ``places`` [B]."""
    cuts = [view.cut(place) for place in places]
    lengths = cut_lengths(cuts)
    ids = pad_cuts(cuts, lengths, "input_ids", view.corpus.info["tokenizer"]["pad_id"])
    return PairInputs(ids, pad_cuts(cuts, lengths, "token_types", 0), lengths)


def read_targets(
    teacher: TeacherReader,
    places: Sequence[Place],
    replica: int | None,
    may_be_missing: bool = False,
    scalars: bool = True,
) -> TargetBatch:
    """Read the targets of the sequences ``places`` [B], given as (shard of the corpus, row of it).

    Sequences of units that are not committed have none with ``may_be_missing``. Without
    ``scalars`` each position's scalars, which no loss needs, are left out.
    """
    counts, columns = teacher.gather(places, replica, may_be_missing, scalars)
    if isinstance(teacher.kind, Embedding):
        sequences = np.flatnonzero(counts)
        return EmbeddingBatch(teacher.info, sequences, teacher.kind.decode(columns))
    if teacher.kind.per_sequence:
        has_target, outputs = counts > 0, {}
        for name, values in columns.items():
            outputs[name] = np.zeros((len(places), values.shape[1]), np.float32)
            outputs[name][has_target] = values
        logits, mc_probs = outputs["logits"], outputs.get("mc_probs")
        return SequenceTargetBatch(teacher.info, has_target, logits, mc_probs)
    rows = np.repeat(np.arange(len(places), dtype=np.int64), counts)
    positions = columns.pop("positions").astype(np.int64)
    if not teacher.info.is_vocabulary:
        return TokenLabelBatch(teacher.info, rows, positions, columns["logits"])
    head = teacher.head if teacher.kind.has_head else None
    return TokenTargetBatch(teacher.info, rows, positions, columns, head, teacher.max_k)


@dataclass(frozen=True)
class Batch:
    """A batch of sequences and their targets."""

    index: Ints  # [B] global sequence numbers
    digests: Sequence[str | None]  # [B], no None in it
    domains: Sequence[str | None]  # [B]
    input_ids: NDArray[np.int32]  # [B,S] clean, padded at the end
    lengths: Ints  # [B]
    masked: MaskedInputs | None
    pairs: dict[str, PairInputs]  # by view name
    targets: dict[str, TargetBatch]  # by teacher name
    epoch: int = 0  # for values drawn anew in every epoch
    documents: Sequence[str | None] = ()  # [B] ids, where known
    groups: Sequence[str | None] = ()  # [B] names, no None in it; empty if the corpus has no groups
    token_types: Tokens | None = None  # [B,S] the segments, if each sequence is a pair
    trained: NDArray[np.bool_] | None = None  # [B,S] the tokens that are learnt; None: all
    # [B,S] the document of its sequence a token belongs to, −1 at padding; None: one each
    document_numbers: Tokens | None = None

    @property
    def attention_mask(self) -> NDArray[np.bool_]:
        """Return [B,S], True at real tokens."""
        return np.arange(self.input_ids.shape[1]) < self.lengths[:, None]

    @property
    def next_places(self) -> tuple[Ints, Ints]:
        """Return the rows [P] and positions [P] whose next token, in the same document, is trained:
        where a causal LM has a loss.
        """
        is_trained, numbers = self.trained, self.document_numbers
        if numbers is not None:
            same = np.diff(numbers, prepend=numbers[:, :1]) == 0
            is_trained = same & (self.attention_mask if is_trained is None else is_trained)
        if is_trained is not None:
            rows, positions_before = np.nonzero(is_trained[:, 1:])
            return rows.astype(np.int64), positions_before.astype(np.int64)
        counts = np.maximum(self.lengths - 1, 0)
        rows = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, positions

    def take(self, part: slice) -> "Batch":
        """Return a contiguous ``part`` of its sequences with their targets.

        It is no wider than the longest of them.
        """
        lengths, numbers = self.lengths[part], self.document_numbers
        width = int(lengths.max(initial=1))
        return replace(
            self,
            index=self.index[part],
            digests=self.digests[part],
            domains=self.domains[part],
            input_ids=self.input_ids[part, :width],
            lengths=lengths,
            masked=self.masked and self.masked.take(part, width),
            pairs={name: pairs.take(part) for name, pairs in self.pairs.items()},
            targets={name: target.take(part) for name, target in self.targets.items()},
            documents=self.documents[part],
            groups=self.groups[part],
            token_types=None if self.token_types is None else self.token_types[part, :width],
            trained=None if self.trained is None else self.trained[part, :width],
            document_numbers=None if numbers is None else numbers[part, :width],
        )
