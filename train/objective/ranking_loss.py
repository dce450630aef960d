"""Regression experts whose scores are an order: pointwise and pairwise squared errors.

Source: UEGP (Findings of NAACL 2024), its loss of ranking tasks. With the error e = s − t of each
row, the error of a difference of two scores is eᵢ − eⱼ, and in a group of n rows

    Σ_{i<j} (eᵢ − eⱼ)² = n · Σᵢ (eᵢ − ē)²,

whose gradient takes ē for a constant, as Σᵢ (eᵢ − ē) = 0. So all that a row must know of the other
rows of the step is their number and their mean error: a step may be split among micro-batches and
processes (``ranking_pass.py``). R rows, G groups.
"""

from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.batch import Batch, Ints
from rekindle.train.config import RankingConfig

KEY_BITS = 48  # of a group's key


@dataclass(frozen=True)
class Centres:
    """The groups of a whole step: their keys, ascending, numbers of rows, and mean errors.

    ``means`` is None where the step is one micro-batch of one process, which knows its own.
    """

    keys: tuple[int, ...]  # [G]
    sizes: tuple[int, ...]  # [G]
    means: tuple[float, ...] | None  # [G]

    @property
    def pairs(self) -> int:
        """Count the pairs of rows within the groups."""
        return sum(size * (size - 1) // 2 for size in self.sizes)


def group_keys(batch: Batch, teacher: str, group: str) -> Ints:
    """Return the group's key of each sequence that has a target of the teacher [R]: equal for
    equal groups, in every process.
    """
    rows = batch.targets[teacher].rows
    if group == "batch":
        return np.zeros(len(rows), np.int64)
    names = batch.domains if group == "domain" else batch.documents
    if len(names) != len(batch.index):
        raise ValueError(f"the batch does not say which {group} its sequences are of")
    keys = [xxhash.xxh3_64_intdigest((name or "").encode()) >> (64 - KEY_BITS) for name in names]
    return np.array(keys, np.int64)[rows]


def centres_of(keys: Ints, errors: NDArray[np.float64] | None) -> Centres:
    """Group rows with ``keys`` [R] and ``errors`` [R]."""
    found, inverse, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    means = None
    if errors is not None:
        sums = np.bincount(inverse, errors, minlength=len(found))
        means = tuple((sums / sizes).tolist())
    return Centres(tuple(found.tolist()), tuple(sizes.tolist()), means)


def ranking_loss(
    errors: Tensor, keys: Ints, centres: Centres, rows: int, config: RankingConfig
) -> Tensor:
    """Return the share of a micro-batch in pointwise·mean e² + pairwise·mean over pairs of (eᵢ −
    eⱼ)².

    ``errors`` [R] of rows in the groups ``keys`` [R]; ``rows``: of the whole step.
    """
    loss = config.pointwise / max(rows, 1) * errors.square().sum()
    if not config.pairwise or not centres.pairs:
        return loss
    place = np.searchsorted(np.array(centres.keys, np.int64), keys)
    group = torch.from_numpy(place).to(errors.device)
    sizes = torch.tensor(centres.sizes, dtype=torch.float32, device=errors.device)
    if centres.means is None:
        assert len(errors) == sum(centres.sizes), "a part of a step needs the step's mean errors"
        sums = torch.zeros_like(sizes).index_add_(0, group, errors.detach())
        means = sums / sizes
    else:
        means = torch.tensor(centres.means, dtype=torch.float32, device=errors.device)
    apart = sizes[group] * (errors - means[group]).square()
    return loss + config.pairwise / centres.pairs * apart.sum()
