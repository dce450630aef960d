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

# At most this much [rows, V] float32 at once. On a CPU small enough for the allocator to reuse the
# block: larger ones are mapped and unmapped at every operation, and page faults then cost more than
# the arithmetic.
LOGITS_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
LOWEST = -1e5  # stands for −inf below the largest logit: its exponential is 0, and 0 · LOWEST is 0


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

    The head is cut to the tokenizer's vocabulary before any normalisation: rows that pad it to a
    round size (30,522 → 30,528) are not tokens and get no probability.
    """
    assert info.vocabulary_size is not None
    real = head.cut(info.vocabulary_size)
    step = max(1, LOGITS_BYTES[hidden.device.type] // (4 * info.vocabulary_size))
    for start in range(0, len(hidden), step):
        block = slice(start, start + step)
        yield score_logits(real.logits(hidden[block]), gold[block], info)


def score_logits(logits: Tensor, gold: Tensor, info: TeacherInfo) -> RowScores:
    """Scores of one block of float32 ``logits`` [N,V], which is overwritten; ``gold`` [N] true ids.

    Masses outside the kept ids are sums over those ids, never 1 − kept. Raises InputError when the
    teacher's logits are NaN or +inf.
    """
    dense = info.kind == "dense"
    k = 1 if dense else info.k
    assert k is not None
    top, ids = torch.topk(logits, k, dim=1)
    if not bool(torch.isfinite(top[:, 0]).all()) or bool(torch.isnan(logits).any()):
        raise InputError(
            f"teacher {info.name!r} produced logits that are NaN or infinite in {info.precision}; "
            "its targets would be worthless. Try `precision: fp32` for it, and check the model"
        )
    gold_logit = logits.gather(1, gold[:, None])
    gold_rank = (logits > gold_logit).sum(dim=1)
    highest = top[:, :1].clone()
    relative = logits.sub_(highest).clamp_(min=LOWEST)
    top -= highest
    weights, above = torch.empty_like(relative), None
    odds = {}
    for tau in sorted({1.0, *info.temperatures}, reverse=True):
        _exponentials(relative, tau, weights, above)
        above = tau
        if not dense:
            kept = weights.gather(1, ids)
            rest = weights.scatter_(1, ids, 0.0).sum(dim=1)
            weights.scatter_(1, ids, kept)
            odds[tau] = kept.sum(dim=1).log() - rest.log()
        if tau == 1.0:
            total = weights.sum(dim=1)
            entropy = total.log() - torch.einsum("nv,nv->n", weights, relative) / total
    normaliser = total.log()[:, None]
    gold_log_prob = (gold_logit - highest - normaliser)[:, 0]
    scalars = (gold_log_prob, gold_rank, entropy)
    if dense:
        return RowScores(relative - normaliser, None, None, *scalars)
    tail_log_odds = torch.stack([odds[tau] for tau in info.temperatures], dim=1)
    return RowScores(top - normaliser, ids, tail_log_odds, *scalars)


def _exponentials(relative: Tensor, tau: float, out: Tensor, above: float | None) -> None:
    """exp(relative/τ) into ``out``, which holds those of the temperature ``above``: squared, if
    that is 2τ or 4τ.
    """
    if above is not None and above / tau in (2.0, 4.0):
        for _ in range(int(above / tau) // 2):
            out.square_()
        return
    torch.div(relative, tau, out=out)
    out.exp_()


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
        scores.ids.cpu().numpy(),
        log_probs,
        scores.tail_log_odds.cpu().numpy(),
        info.vocabulary_size,
    )
    kept = {name: value for name, value in vars(encoded).items() if value is not None}
    return columns | kept
