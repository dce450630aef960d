"""What a training step reads: sequences, views and targets, still in the cache's encoding.

B sequences, S positions of the longest, P positions with a target in the whole batch, K candidates,
C classes. ``rows`` [P] says which sequence of the batch a position belongs to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rekindle.data.errors import CacheFormatError, InputError
from rekindle.data.targets.codec import EncodedTargets, decode_log_probs, join_ids
from rekindle.data.targets.codec_precise import decode_precise
from rekindle.data.targets.head import StoredHead, decode_hidden
from rekindle.data.targets.schema import SAMPLED, SPARSE, Columns, TeacherInfo

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class MaskedInputs:
    """One masked replica of the batch's sequences."""

    replica: int
    input_ids: NDArray[np.int32]  # [B,S]
    rows: Ints  # [P]
    positions: Ints  # [P]
    labels: Ints  # [P] the true ids


@dataclass(frozen=True)
class PairInputs:
    """The batch's sentence pairs as the student sees them; an absent pair has length 0."""

    input_ids: NDArray[np.int32]  # [B,S']
    token_types: NDArray[np.int32]  # [B,S']
    lengths: Ints  # [B]


@dataclass(frozen=True)
class TokenTargetBatch:
    """One teacher's vocabulary targets of a batch, encoded."""

    info: TeacherInfo
    rows: Ints  # [P]
    positions: Ints  # [P]
    columns: Columns  # flat [P,…], see data/targets/schema.py
    head: StoredHead | None = None  # of a teacher whose hidden states are kept

    def decode(self, temperature: float = 1.0, k: int | None = None) -> tuple[Ints, Floats, Floats]:
        """Ids [P,k], log-probabilities [P,k] at ``temperature``, log tail mass [P].

        By falling probability; the whole vocabulary of a dense teacher in the order of its ids. Of
        ``random`` targets an id of −1 (with probability 0) stands where fewer ids were drawn.

        Raises InputError at a temperature that is not stored, or a ``k`` below that of a sample;
        ValueError for a k outside 1..K.
        """
        info = self.info
        stored = info.k if info.kind in (*SPARSE, "random") else info.vocabulary_size
        assert stored is not None
        if k is not None and not 1 <= k <= stored:
            raise ValueError(f"k must lie in 1..{stored}, the number that is cached, got {k}")
        if info.kind in ("dense", "hidden"):
            return _decode_dense(self._log_probs(), temperature, k)
        slot = self.slot(temperature, k)
        assert info.vocabulary_size is not None
        if info.kind == "random":
            return _decode_drawn(self.columns, stored)
        ids = join_ids(self.columns["ids"], self.columns.get("ids_high"), info.vocabulary_size)
        if info.codec == "precise":
            log_probs, log_tail = decode_precise(self.columns, temperature, slot, k)
        else:
            log_probs, log_tail = decode_log_probs(self.encoded, temperature, slot, k)
        return ids[:, :k], log_probs, log_tail

    def slot(self, temperature: float, k: int | None = None) -> int:
        """Which of the stored temperatures it is; InputError when it is none of them."""
        info = self.info
        if k is not None and k != info.k and info.kind in SAMPLED:
            raise InputError(
                f"teacher {info.name!r} keeps a sample of {info.k} ({info.kind}): a part of it "
                "would be biased. Leave k out, or cache a smaller sample"
            )
        if temperature in info.temperatures:
            return info.temperatures.index(temperature)
        reason = (
            f"the mass outside its top {info.k} at another one is not known (or not yet of all "
            "text: `pipeline cache-teachers` was not finished). Add it to"
            if info.kind == "topk"
            else "a sample is of one distribution. Change"
        )
        raise InputError(
            f"teacher {info.name!r} stores the temperatures {list(info.temperatures)}, not "
            f"{temperature}: {reason} the teacher's targets.temperatures, or train at a stored one"
        )

    def log_normalisers(self, temperature: float) -> Floats:
        """Log Σ_v p_v^(1/τ) [P] over the whole vocabulary, p being the probabilities at τ = 1.

        With it a log-probability at τ is log p / τ − this. Of top-k and dense teachers.
        """
        log_probs = self.decode(1.0)[1]
        tempered = self.decode(temperature)[1]
        return (log_probs[:, 0] / np.float32(temperature) - tempered[:, 0]).astype(np.float32)

    def _log_probs(self) -> Floats:
        if self.info.kind == "dense":
            return self.columns["log_probs"]
        assert self.head is not None
        states = decode_hidden(self.columns["hidden"], self.columns["hidden_scale"])
        log_probs = self.head.log_probs(states)
        if np.isnan(log_probs).any():  # finite numbers, but too large ones
            raise CacheFormatError(
                f"the hidden states of teacher {self.info.name!r} give no probabilities"
            )
        return log_probs

    @property
    def encoded(self) -> EncodedTargets:
        """The default codec's columns of a topk or threshold teacher."""
        c = self.columns
        return EncodedTargets(
            c["ids"],
            c.get("ids_high"),
            c["values"],
            c["log_prob_max"],
            c["log_prob_min"],
            c["tail_log_odds"],
        )


@dataclass(frozen=True)
class TokenLabelBatch:
    """One token classifier's logits of a batch."""

    info: TeacherInfo
    rows: Ints  # [P]
    positions: Ints  # [P]
    logits: Floats  # [P,C]


@dataclass(frozen=True)
class SequenceTargetBatch:
    """One sequence expert's logits of a batch."""

    info: TeacherInfo
    present: NDArray[np.bool_]  # [B]
    logits: Floats  # [B,C], zero where absent
    mc_probs: Floats | None  # [B,C]


TargetBatch = TokenTargetBatch | TokenLabelBatch | SequenceTargetBatch


@dataclass(frozen=True)
class Batch:
    """A batch of sequences and their targets."""

    index: Ints  # [B] global sequence numbers
    digests: Sequence[str | None]  # [B], never None
    domains: Sequence[str | None]  # [B]
    input_ids: NDArray[np.int32]  # [B,S] clean, padded at the end
    lengths: Ints  # [B]
    masked: MaskedInputs | None
    pairs: dict[str, PairInputs]  # by view name
    targets: dict[str, TargetBatch]  # by teacher name
    epoch: int = 0  # for what is drawn anew in every epoch
    documents: Sequence[str | None] = ()  # [B] ids, where they are known

    @property
    def attention_mask(self) -> NDArray[np.bool_]:
        """[B,S], True at real tokens."""
        return np.arange(self.input_ids.shape[1]) < self.lengths[:, None]


def _decode_drawn(columns: Columns, draws: int) -> tuple[Ints, Floats, Floats]:
    """Relative frequencies of the drawn ids; nothing is known of the others, and no mass is left
    for them: in the mean over draws every id has its probability.
    """
    with np.errstate(divide="ignore"):
        log_probs = np.log(columns["counts"].astype(np.float32) / np.float32(draws))
    tail = np.full(len(log_probs), -np.inf, np.float32)
    return columns["ids"].astype(np.int64), log_probs, tail


def _decode_dense(
    log_probs: Floats, temperature: float, k: int | None
) -> tuple[Ints, Floats, Floats]:
    tempered = log_probs / np.float32(temperature)
    top = tempered.max(axis=1, keepdims=True)
    tempered = tempered - top - np.log(np.exp(tempered - top).sum(axis=1, keepdims=True))
    count, size = tempered.shape
    if k is None or k == size:
        ids = np.broadcast_to(np.arange(size), (count, size))
        return ids, tempered, np.full(count, -np.inf, np.float32)
    order = np.argsort(-tempered, axis=1, kind="stable")
    ordered = np.take_along_axis(tempered, order, axis=1)
    log_tail = np.logaddexp.reduce(ordered[:, k:], axis=1)  # −inf where all of them are
    return order[:, :k], ordered[:, :k], log_tail.astype(np.float32)


def pad(
    flat: list[NDArray[np.int32]], lengths: Ints, fill: int, width: int | None = None
) -> NDArray[np.int32]:
    """Rows of different lengths as [B, longest], ``fill`` at the end."""
    width = int(lengths.max(initial=1)) if width is None else width
    out = np.full((len(flat), width), fill, dtype=np.int32)
    for row, values in enumerate(flat):
        out[row, : len(values)] = values
    return out
