"""Tails at a temperature between stored ones, computed on the device from what is stored.

This is the twin of the NumPy function that reads a cache for people
(rekindle.data.targets.interpolation), which states the formula and its error. N rows, K candidates.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rekindle.kernels.encoded import NO_TAIL, STEP, EncodedTargets, relative_log_probs


def odds_at(
    targets: EncodedTargets,
    tail_log_odds: Tensor,
    at: Sequence[float],
    weights: Sequence[float],
    temperature: float,
) -> EncodedTargets:
    """Return ``targets`` with the log-odds [N] of their kept mass at ``temperature``.

    ``tail_log_odds`` [N,3] int16 are stored for the three temperatures ``at``, which have the
    ``weights`` in the parabola. The result is rounded to 1/1024 nat, as stored odds are.
    """
    odds = _log_sum(targets, temperature)
    for slot, (tau, weight) in enumerate(zip(at, weights, strict=True)):
        odds = odds - weight * (_log_sum(targets, tau) - tail_log_odds[:, slot].float() / STEP)
    stored = (odds * STEP).round().clamp(1 - NO_TAIL, NO_TAIL - 1).to(torch.int16)
    has_no_tail = (tail_log_odds == NO_TAIL).all(dim=1)
    return replace(targets, tail_log_odds=stored.masked_fill(has_no_tail, NO_TAIL))


def _log_sum(targets: EncodedTargets, temperature: float) -> Tensor:
    return torch.logsumexp(relative_log_probs(targets, temperature), dim=1)
