"""One sequence of a cache with its targets decoded, for people and checks; not for training."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenTargets:
    """One example's vocabulary targets from one teacher, decoded (one replica of a masked view)."""

    replica: int | None
    input_ids: NDArray[np.int32]  # [S] as the teacher saw them
    positions: NDArray[np.int64]  # [P]
    ids: NDArray[np.int64]  # [P,K] by falling probability
    log_probs: NDArray[np.float32]  # [P,K] at τ = 1, else at the first in log_tail
    log_tail: dict[float, NDArray[np.float32]]  # τ -> [P]
    # Unknown values of imported targets are NaN, unknown ranks −1.
    gold_ids: NDArray[np.int64]  # [P]
    gold_log_prob: NDArray[np.float32]  # [P]
    gold_rank: NDArray[np.int64]  # [P]
    entropy: NDArray[np.float32]  # [P] nats


@dataclass(frozen=True)
class SequenceTargets:
    """One example's logits from a sequence expert."""

    logits: NDArray[np.float32]  # [C]
    mc_probs: NDArray[np.float32] | None  # [C]


@dataclass(frozen=True)
class TokenLabelTargets:
    """One example's logits from a token classifier, at the positions that begin a word."""

    positions: NDArray[np.int64]  # [P]
    logits: NDArray[np.float32]  # [P,C]


@dataclass(frozen=True)
class VectorTargets:
    """One example's vector from a sentence encoder."""

    vector: NDArray[np.float32]  # [D]


Target = TokenTargets | SequenceTargets | TokenLabelTargets | VectorTargets


@dataclass(frozen=True)
class Example:
    """One sequence of the corpus with all its targets."""

    index: int
    digest: str
    document: str
    domain: str | None
    text: str
    input_ids: NDArray[np.int32]  # [S]
    pairs: dict[str, tuple[str, str] | None]  # by view name
    targets: dict[str, list[Target]]  # by teacher: one entry per replica, or a single one
    trained: NDArray[np.bool_] | None = None  # [S] the tokens that are learnt; None: all
    group: str | None = None  # the group it is compared within
