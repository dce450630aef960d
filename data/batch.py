"""What a training step reads: sequences, views and targets, still in the cache's encoding.

B sequences, S positions of the longest, P positions with a target in the whole batch, K candidates,
C classes. ``rows`` [P] says which sequence of the batch a position belongs to.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rekindle.data.codec import EncodedTargets, decode_ids, decode_log_probs
from rekindle.data.errors import InputError
from rekindle.data.targets import Columns, TeacherInfo

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
    columns: Columns  # flat [P,…], see data/targets.py

    def decode(self, temperature: float = 1.0, k: int | None = None) -> tuple[Ints, Floats, Floats]:
        """Ids [P,k], log-probabilities [P,k] at ``temperature``, log tail mass [P].

        By falling probability; the whole vocabulary of a dense teacher in the order of its ids.

        Raises InputError when a top-k teacher did not store that temperature, ValueError for a k
        outside 1..K.
        """
        info = self.info
        stored = info.k if info.kind == "topk" else info.vocabulary_size
        assert stored is not None
        if k is not None and not 1 <= k <= stored:
            raise ValueError(f"k must lie in 1..{stored}, the number that is cached, got {k}")
        if info.kind == "dense":
            return _decode_dense(self.columns["log_probs"], temperature, k)
        if temperature not in info.temperatures:
            raise InputError(
                f"teacher {info.name!r} stores the temperatures {list(info.temperatures)}, not "
                f"{temperature}: the mass outside its top {stored} at another one is not known. "
                "Add it "
                "to the teacher's targets.temperatures, or train at a stored one"
            )
        encoded = self.encoded
        slot = info.temperatures.index(temperature)
        log_probs, log_tail = decode_log_probs(encoded, temperature, slot, k)
        assert info.vocabulary_size is not None
        return decode_ids(encoded, info.vocabulary_size)[:, :k], log_probs, log_tail

    @property
    def encoded(self) -> EncodedTargets:
        """The codec's columns of a top-k teacher."""
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
    digests: list[str]
    domains: list[str | None]
    input_ids: NDArray[np.int32]  # [B,S] clean, padded at the end
    lengths: Ints  # [B]
    masked: MaskedInputs | None
    pairs: dict[str, PairInputs]  # by view name
    targets: dict[str, TargetBatch]  # by teacher name

    @property
    def attention_mask(self) -> NDArray[np.bool_]:
        """[B,S], True at real tokens."""
        return np.arange(self.input_ids.shape[1]) < self.lengths[:, None]


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
