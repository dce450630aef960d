"""One sequence of a cache with its targets decoded, for people and for checks; not for training."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rekindle.data.batch import SequenceTargetBatch, TargetBatch, TokenLabelBatch
from rekindle.data.targets.codec import STEP
from rekindle.data.targets.schema import SAMPLED, SequenceTargets, TokenLabelTargets, TokenTargets

Target = TokenTargets | SequenceTargets | TokenLabelTargets


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
    targets: dict[str, list[Target]]  # by teacher: an entry per replica, or one


def decode_target(
    found: TargetBatch, ids: NDArray[np.int32], seen: NDArray[np.int32], replica: int | None
) -> Target | None:
    """The target of a batch of one sequence: ``ids`` [S] as it is, ``seen`` [S] by the teacher.

    None where a sequence expert has nothing to say of it.
    """
    if isinstance(found, SequenceTargetBatch):
        mc = found.mc_probs[0] if found.mc_probs is not None else None
        return SequenceTargets(found.logits[0], mc) if found.present[0] else None
    if isinstance(found, TokenLabelBatch):
        return TokenLabelTargets(found.positions, found.logits)
    info, columns = found.info, found.columns
    # A sample is of the one temperature it was drawn at; everything else can be read at 1.
    first = info.temperatures[0] if info.kind in SAMPLED else 1.0
    kept, log_probs, log_tail = found.decode(first)
    tails = {temperature: found.decode(temperature)[2] for temperature in info.temperatures}
    return TokenTargets(
        replica=replica,
        input_ids=seen,
        positions=found.positions,
        ids=kept,
        log_probs=log_probs,
        log_tail=tails | {first: log_tail},
        gold_ids=ids[found.positions + (info.task == "causal_lm")].astype(np.int64),
        gold_log_prob=-columns["gold_log_prob"].astype(np.float32) / np.float32(STEP),
        gold_rank=columns["gold_rank"].astype(np.int64),
        entropy=columns["entropy"].astype(np.float32) / np.float32(STEP),
    )
