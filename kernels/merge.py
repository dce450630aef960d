"""Several teachers' sparse targets as one; never invents a probability that no teacher stored."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rekindle.kernels.targets import DecodedTargets

SparseRow = tuple[Tensor, Tensor, Tensor | None]


def merge_rows(teachers: Sequence[SparseRow], weights: Tensor) -> DecodedTargets:
    """Σ_t weights[:, t]·teacher_t over the union of ids; the rule is in `merge_targets`.

    All shapes follow from the inputs' shapes, so that a device is never asked for a count.
    """
    probs_of = [probs for _, probs, _ in teachers]
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in probs_of) else torch.float32
    weights = weights.to(probs_of[0].device, dtype)
    all_ids, all_probs, tail = [], [], torch.zeros_like(weights[:, 0])
    for t, (ids, probs, teacher_tail) in enumerate(teachers):
        listed = (ids >= 0) & (weights[:, t, None] != 0)
        p = torch.where(listed, probs.to(dtype), 0.0)
        rest = (1.0 - p.sum(1)).clamp(min=0) if teacher_tail is None else teacher_tail.to(dtype)
        all_ids.append(torch.where(listed, ids.long(), -1))
        all_probs.append(p * weights[:, t, None])
        tail = tail + torch.where(listed.any(1), rest * weights[:, t], 0.0)
    return DecodedTargets(*_sum_duplicates(torch.cat(all_ids, 1), torch.cat(all_probs, 1)), tail)


def _sum_duplicates(ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids [N,K] with their summed probabilities, by falling probability, padding last."""
    ids, order = ids.sort(dim=1, stable=True)
    probs = probs.gather(1, order)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    group = first.long().cumsum(1) - 1
    summed = torch.zeros_like(probs).scatter_add_(1, group, probs)
    distinct = torch.full_like(ids, -1).scatter_(1, group, ids)
    rank = torch.where(distinct >= 0, summed, -1.0)
    order = rank.argsort(dim=1, descending=True, stable=True)
    return distinct.gather(1, order), summed.gather(1, order)
