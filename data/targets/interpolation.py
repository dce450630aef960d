"""Interpolate tails at a temperature between stored ones. NumPy only; the twin on a device is
``odds_at`` in ``kernels/encoded.py``.

With lp the log-probabilities at τ = 1, L(1/τ) = log Σ exp(lp/τ) over the ids *outside* the kept
ones is the log of a partition function. It is smooth in 1/τ, and its derivatives are the cumulants
of lp. A parabola in 1/τ goes through its values at three stored temperatures around τ. The sum over
the kept ids is known at every τ, so it is computed and not interpolated. Only the tail is therefore
inexact, by κ₃/6 · |Π(1/τ − 1/τᵢ)| nats of its logarithm. A parabola through log Z of the whole
vocabulary, minus the kept sum, would lose small tails entirely, and one through the log of the
tail's share is not much better; docs/targets.md has the figures. P positions, K candidates.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rekindle.data.targets.codec import NO_TAIL, STEP, encode_odds, log_sum_exp

KNOTS = 3
# Largest KL in nats between 1, 2 and 4 (the worst is near τ = 1.3), by the number of kept
# candidates. docs/targets.md lists the measured distributions, including the hardest.
MEASURED_AT = (1.0, 2.0, 4.0)
MEASURED = ((64, 1e-2), (32, 2e-2), (8, 3e-2))


def knots(temperature: float, stored: Sequence[float]) -> tuple[int, ...]:
    """Return the indices of the three ``stored`` temperatures from which one is interpolated: its
    neighbours, and the next nearest in 1/τ. Empty if it lies outside, is stored, or fewer than
    three are stored.
    """
    order = sorted(range(len(stored)), key=lambda slot: stored[slot])
    below = [slot for slot in order if stored[slot] < temperature]
    above = [slot for slot in order if stored[slot] > temperature]
    if not below or not above or len(order) < KNOTS or temperature in stored:
        return ()
    others = [*below[:-1], *above[1:]]
    third = min(others, key=lambda slot: abs(1 / stored[slot] - 1 / temperature))
    return tuple(sorted((below[-1], above[0], third)))


def parabola(temperature: float, at: Sequence[float]) -> list[float]:
    """Return the weights of the values at three temperatures (Lagrange's, in 1/τ)."""
    x, nodes = 1 / temperature, [1 / tau for tau in at]
    return [
        float(np.prod([(x - other) / (node - other) for other in nodes if other != node]))
        for node in nodes
    ]


def odds_between(
    relative: NDArray[np.floating],
    tail_log_odds: NDArray[np.int16],
    at: Sequence[float],
    temperature: float,
) -> NDArray[np.int16]:
    """Return log(kept mass / tail mass) [P] at ``temperature``, as the codecs store it.

    ``relative`` [P,K]: log-probabilities of all kept ids at τ = 1, up to a constant per row;
    ``tail_log_odds`` [P,3]: the values stored ``at`` three temperatures around it.
    """
    odds = log_sum_exp(relative / temperature)
    for slot, (tau, weight) in enumerate(zip(at, parabola(temperature, at), strict=True)):
        odds = odds - weight * (log_sum_exp(relative / tau) - tail_log_odds[:, slot] / STEP)
    has_no_tail = (tail_log_odds == NO_TAIL).all(axis=1)
    return encode_odds(np.where(has_no_tail, np.inf, odds)[:, None].astype(np.float32))[:, 0]


def expected_error(temperature: float, stored: Sequence[float], k: int) -> float:
    """Return the expected KL in nats of an interpolated target.

    Between MEASURED_AT it is the value measured with k candidates. Elsewhere it is scaled by the
    square of the largest |Π(1/τ − 1/τᵢ)| between the knots, because the tail's error is
    proportional to that.
    """
    at = [stored[slot] for slot in knots(temperature, stored)]
    base = next((error for least, error in MEASURED if k >= least), MEASURED[-1][1])
    return base * (_widest(at) / _widest(MEASURED_AT)) ** 2


def _widest(at: Sequence[float]) -> float:
    nodes = [1 / tau for tau in at]
    x = np.linspace(min(nodes), max(nodes), 1001)
    return float(np.abs(np.prod([x - node for node in nodes], axis=0)).max())
