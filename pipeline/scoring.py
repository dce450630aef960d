"""From logits to what the cache keeps, on the teacher's device, in float32. No models, no files.

N rows (positions), V real tokens of the vocabulary, K kept, T temperatures.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rekindle.data.codec import encode, fixed_point
from rekindle.data.errors import InputError
from rekindle.data.targets import Columns, TeacherInfo, rank_dtype
from rekindle.train.language_model import OutputHead

LOGITS_BYTES = 256 << 20  # at most this much [rows, V] float32 at once


@dataclass(frozen=True)
class RowScores:
    """What is taken from a block of logits, on the device."""

    log_probs: Tensor  # [N,K] by falling probability, or [N,V] for dense targets
    ids: Tensor | None  # [N,K]
    tail_log_odds: Tensor | None  # [N,T]
    gold_log_prob: Tensor  # [N]
    gold_rank: Tensor  # [N]
    entropy: Tensor  # [N]


def score_hidden(
    hidden: Tensor, head: OutputHead, gold: Tensor, info: TeacherInfo
) -> Iterator[RowScores]:
    """Scores of ``hidden`` [N,H], a bounded block of rows at a time.

    The head is cut to the tokenizer's vocabulary before any normalisation: rows that pad it to a round size
    (30,522 → 30,528) are not tokens and get no probability.
    """
    assert info.vocabulary_size is not None
    real = head.cut(info.vocabulary_size)
    step = max(1, LOGITS_BYTES // (4 * info.vocabulary_size))
    for start in range(0, len(hidden), step):
        block = slice(start, start + step)
        yield score_logits(real.logits(hidden[block]), gold[block], info)


def score_logits(logits: Tensor, gold: Tensor, info: TeacherInfo) -> RowScores:
    """Scores of one block of float32 ``logits`` [N,V], which is overwritten; ``gold`` [N] true ids.

    Raises InputError when the teacher's logits are NaN or +inf.
    """
    normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
    if not bool(torch.isfinite(normaliser).all()):
        raise InputError(
            f"teacher {info.name!r} produced logits that are NaN or infinite in {info.precision}; "
            "its targets would be worthless. Try `precision: fp32` for it, and check the model"
        )
    gold_logit = logits.gather(1, gold[:, None])
    gold_rank = (logits > gold_logit).sum(dim=1)
    # 0 · (−inf) must count as 0: a token with logit −inf has no share in the entropy.
    weighted = torch.softmax(logits, dim=1).mul_(logits.clamp_min(torch.finfo(logits.dtype).min))
    entropy = normaliser[:, 0] - weighted.sum(dim=1)
    scalars = ((gold_logit - normaliser)[:, 0], gold_rank, entropy)
    if info.kind == "dense":
        return RowScores(logits - normaliser, None, None, *scalars)
    assert info.k is not None
    top, ids = torch.topk(logits, info.k, dim=1)
    rest = logits.scatter_(1, ids, -torch.inf)
    odds = [torch.logsumexp(top / t, 1) - torch.logsumexp(rest / t, 1) for t in info.temperatures]
    return RowScores(top - normaliser, ids, torch.stack(odds, dim=1), *scalars)


def to_columns(scores: RowScores, info: TeacherInfo) -> Columns:
    """The cache's columns (NumPy) of one block of scores."""
    assert info.vocabulary_size is not None
    largest = np.iinfo(rank_dtype(info.vocabulary_size)).max
    columns: Columns = {
        "gold_log_prob": fixed_point(-scores.gold_log_prob.cpu().numpy()),
        "gold_rank": np.minimum(scores.gold_rank.cpu().numpy(), largest).astype(
            rank_dtype(info.vocabulary_size)
        ),
        "entropy": fixed_point(scores.entropy.clamp_min(0).cpu().numpy()),
    }
    log_probs = scores.log_probs.cpu().numpy()
    if scores.ids is None or scores.tail_log_odds is None:
        return columns | {"log_probs": log_probs}
    encoded = encode(
        scores.ids.cpu().numpy(), log_probs, scores.tail_log_odds.cpu().numpy(), info.vocabulary_size
    )
    kept = {name: value for name, value in vars(encoded).items() if value is not None}
    return columns | kept
