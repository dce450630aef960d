"""Tokens drawn from sparse distributions, given the random numbers: pure, and row by row.

P rows, K kept ids.
"""

import torch
from torch import Tensor

from rekindle.kernels.targets import DecodedTargets


def sample(targets: DecodedTargets, uniforms: Tensor, content: Tensor | None) -> Tensor:
    """Draw a token [P] of each row's distribution, by the inverse of its cumulative sum.

    ``uniforms`` [P,2] in [0,1): the first chooses among the K kept ids and the tail, the second
    among the tail's tokens: those of ``content`` (ascending ids) that are not kept, all alike.
    ``content`` None: nothing is outside the kept ids.
    """
    ids, probs, tail = targets
    mass = probs.double()
    if content is not None:
        rank = _ranks(ids, content)
        others = len(content) - (rank < len(content)).sum(dim=1)
        mass = torch.cat([mass, (tail.double() * (others > 0))[:, None]], dim=1)
    cumulative = mass.cumsum(dim=1)
    total = cumulative[:, -1:]
    # Below the total, whatever is rounded: an outcome of no mass is never chosen.
    point = torch.minimum(uniforms[:, :1] * total, torch.nextafter(total, torch.zeros_like(total)))
    outcome = torch.searchsorted(cumulative, point, right=True)
    chosen = ids.gather(1, outcome.clamp(max=ids.shape[1] - 1))[:, 0]
    if content is None:
        return chosen
    in_tail = outcome[:, 0] == ids.shape[1]
    return torch.where(in_tail, _outside(rank, content, others, uniforms[:, 1]), chosen)


def _ranks(ids: Tensor, content: Tensor) -> Tensor:
    """Return each id's [P,K] place in ``content``; len(content) for those that are not in it."""
    found = torch.searchsorted(content, ids.contiguous())
    there = content[found.clamp(max=len(content) - 1)] == ids
    return torch.where(there, found, len(content))


def _outside(rank: Tensor, content: Tensor, others: Tensor, uniform: Tensor) -> Tensor:
    """Choose one of the ``others`` [P] tokens of ``content`` whose rank is not among ``rank``
    [P,K].

    The n-th of them stands n places on, and one more for every kept rank before it: the j-th
    smallest kept rank s_j lies before it when s_j − j ≤ n.
    """
    number = (uniform * others).long().minimum(others - 1).clamp(min=0)
    kept = rank.sort(dim=1).values
    before = kept - torch.arange(kept.shape[1], device=kept.device) <= number[:, None]
    place = number + (before & (kept < len(content))).sum(dim=1)
    return content[place.clamp(max=len(content) - 1)]
