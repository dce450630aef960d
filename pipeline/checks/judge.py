"""How far the targets of a cache are from a live teacher, and how far they may be.

Every value has a bound: what its codec states, plus what two passes of the same weights may differ
by. Nothing is run or read here: arrays in, errors and bounds out.

The second part is ROUNDING[precision]·(1 + |x|) nats for a log-probability or logit x. It holds for
any device, in the cache or in the audit; the audit computes in the recorded precision.

======================  ==========================================================================
what is compared        bound, beside that of the two passes
======================  ==========================================================================
topk log-probabilities  default and compact: 2·(s/510 + 1/1024)/τ + 1/2048 with s = lp₁ − lp_K at
                        τ = 1; precise: 1/(2048·τ) + 1/2048; and no other token is likelier
tails, at each τ        1/2048 of log(kept mass / mass outside)
threshold values        as topk; each is the larger of the probability and the live threshold.
                        Tokens above it are present, the others are drawn by the stored seed
random draws            0: each is where the stored seed falls in the live cumulative distribution
dense                   0
hidden                  states to half a step (largest/65,534): log-probabilities 2·that·‖w‖₁
gold log-prob, entropy  1/1024
logits of task heads    0
vectors                 the cosine to what int8 or fp16 may turn a vector by
                        (data/targets/kinds/embedding.py), the length to as much
Monte-Carlo means       six standard errors of the difference of two means, and 1/passes
======================  ==========================================================================
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rekindle.data.targets.codec import NO_TAIL, RANGE, STEP, Columns
from rekindle.data.targets.codec_registry import CODECS
from rekindle.data.targets.head import StoredHead
from rekindle.data.targets.kinds.embedding import Embedding
from rekindle.data.targets.schema import TeacherInfo
from rekindle.pipeline.caching.scoring import NO_TOKEN

Values = NDArray[np.float64]
# For fp32: kernels and the order of sums. bf16 keeps 8 bits through all layers, fp16 keeps 11: in
# 16 random Llama layers (CPU, torch 2.13, 2026-11), with the largest x they were 0.14 and 0.037 off
# fp32.
ROUNDING = {"fp32": 1e-3, "fp16": 0.08, "bf16": 0.3}
DEVIATIONS = 6.0
FEW_PASSES = 8  # passes; a deviation cannot be measured from so few
LOWEST = NO_TOKEN / 2
DEEPEST = (
    RANGE - 1
)  # nats below the best; beyond RANGE, candidates are stored as if they were at it
LARGEST_ODDS = (NO_TAIL - 2) / STEP


class Judged(NamedTuple):
    """One quantity compared at N positions (or sequences)."""

    quantity: str
    error: Values  # [N]
    codec_bound: Values  # [N] the codec's bound
    pass_bound: Values  # [N] what two passes may add

    @property
    def share(self) -> Values:
        """Return the errors as shares of their bounds [N]; NaN counts as infinite."""
        bound = np.maximum(self.codec_bound + self.pass_bound, 1e-30)
        return np.nan_to_num(self.error / bound, nan=np.inf, posinf=np.inf)


def rounding(info: TeacherInfo, values: NDArray) -> Values:
    """Return by how much two passes may differ at log-probabilities or logits ``values``."""
    allowed: Values = ROUNDING[info.precision] * (1 + np.abs(values))
    return allowed


def worst(quantity: str, error: Values, codec_bound: Values, pass_bound: Values) -> Judged:
    """From values [N,K] pick, in each row, the one that uses up most of its bound."""
    error, codec_bound, pass_bound = np.broadcast_arrays(error, codec_bound, pass_bound)
    place = (error / np.maximum(codec_bound + pass_bound, 1e-30)).argmax(axis=1)[:, None]
    picked = (np.take_along_axis(a, place, axis=1)[:, 0] for a in (error, codec_bound, pass_bound))
    return Judged(quantity, *picked)


# --- task heads -----------------------------------------------------------------------------------


def judge_logits(info: TeacherInfo, cached: Columns, live: Columns) -> Iterator[Judged]:
    """Judge logits [N,C] and the means of Monte-Carlo passes."""
    cached_values, live_values = (
        columns["logits"].astype(np.float64) for columns in (cached, live)
    )
    yield worst(
        "a logit", np.abs(cached_values - live_values), np.zeros(1), rounding(info, live_values)
    )
    if "mc_probs" in cached:
        cached_values, live_values = (
            columns["mc_probs"].astype(np.float64) for columns in (cached, live)
        )
        mean, count = np.clip((cached_values + live_values) / 2, 0, 1), info.monte_carlo_passes
        # A variable within [0, 1] varies by no more than p(1 − p).
        largest_error = np.sqrt(mean * (1 - mean) / count)
        error = (
            np.minimum(live["mc_errors"], largest_error) if count >= FEW_PASSES else largest_error
        )
        codec_bound = DEVIATIONS * np.sqrt(2) * error + 1 / count
        quantity = "a Monte-Carlo probability"
        yield worst(
            quantity, np.abs(cached_values - live_values), codec_bound, rounding(info, 0 * mean)
        )


def judge_vectors(kind: Embedding, cached: Columns, live: NDArray) -> Iterator[Judged]:
    """Of vectors [N,D]: their directions, then their lengths."""
    stored, exact = (v.astype(np.float64) for v in (kind.decode(cached), live))
    bound, allowed = kind.bounds(live), np.full(len(live), ROUNDING[kind.info.precision])
    # Of two turns by angles a and b it is (a + b)²/2 at most, so a² + b².
    error = kind.errors(live, cached)
    yield Judged("1 − cosine of a vector", error, 2 * bound, allowed**2)
    cached_lengths, live_lengths = (np.linalg.norm(v, axis=1) for v in (stored, exact))
    change = np.abs(cached_lengths - live_lengths) / np.where(live_lengths > 0, live_lengths, 1)
    yield Judged("the length of a vector, a share of it", change, np.sqrt(2 * bound), allowed)


# --- distributions over the vocabulary ------------------------------------------------------------


class Distributions(NamedTuple):
    """Live log-probabilities at τ = 1 of N positions, with what belongs to them."""

    info: TeacherInfo
    log_probs: Values  # [N,V]
    gold_log_prob: NDArray[np.uint16]  # [N] as stored
    entropy: NDArray[np.uint16]  # [N]
    uniforms: Values | None  # [N,draws] with which a sample was drawn
    has_foreign: bool = False  # the teacher has tokens of its own; their mass is in the tail

    @property
    def foreign_mass(self) -> Values:
        """The mass [N] of the teacher's own tokens at τ = 1."""
        if not self.has_foreign:
            return np.zeros(len(self.log_probs))
        missing_mass: Values = (1 - np.exp(self.log_probs).sum(axis=1)).clip(min=0)
        return missing_mass

    def at(self, temperature: float) -> Values:
        """Return log-probabilities [N,V] at a temperature."""
        if temperature == 1.0:
            return self.log_probs
        tempered = self.log_probs / temperature
        return tempered - _log_sum(tempered)[:, None]


def judge_scalars(live: Distributions, cached: Columns) -> Iterator[Judged]:
    """Judge the gold log-probability and the entropy of each position."""
    info, log_probs = live.info, live.log_probs
    step = np.full(len(log_probs), 1 / STEP)
    live_gold = live.gold_log_prob / STEP
    error = np.abs(cached["gold_log_prob"] / STEP - live_gold)
    yield Judged("the gold log-probability", error, step, rounding(info, live_gold))
    probs, size = np.exp(log_probs), np.maximum(log_probs, -1e4)
    change = ROUNDING[info.precision] * (probs * (1 + np.abs(size)) ** 2).sum(axis=1)
    yield Judged(
        "the entropy", np.abs(cached["entropy"] / STEP - live.entropy / STEP), step, change
    )


def judge_dense(
    live: Distributions, cached: Columns, log_probs: Values, head: StoredHead | None
) -> Iterator[Judged]:
    """Judge every log-probability [N,V] of ``dense`` and ``hidden`` targets."""
    codec_bound = np.zeros(1)
    if head is not None:
        reach = np.abs(head.weight).sum(axis=1).max() * abs(head.scale)
        codec_bound = cached["hidden_scale"].astype(np.float64)[:, None] * reach
    # An id without a token has a log-probability of about NO_TOKEN, however it is stored.
    error = np.abs(np.maximum(log_probs, LOWEST) - np.maximum(live.log_probs, LOWEST))
    yield worst("a log-probability", error, codec_bound, rounding(live.info, live.log_probs))


def judge_topk(
    live: Distributions, cached: Columns, ids: NDArray[np.int64], log_probs: Values
) -> Iterator[Judged]:
    """Judge the candidates [N,K], the likeliest token left out, and the tail at each
    temperature.
    """
    info, exact = live.info, live.log_probs
    live_values = np.take_along_axis(exact, ids, axis=1)
    yield _values(info, log_probs, live_values, 1.0)
    remaining = exact.copy()
    np.put_along_axis(remaining, ids, -np.inf, axis=1)
    outside, lowest = remaining.max(axis=1), live_values.min(axis=1)
    excess = np.where(np.isfinite(outside), np.maximum(outside - lowest, 0.0), 0.0)
    quantity = "the likeliest token that was left out (above the last one kept)"
    yield Judged(quantity, excess, np.zeros(len(excess)), 2 * rounding(info, lowest))
    for slot, temperature in enumerate(info.temperatures):
        if live.has_foreign and temperature != 1.0:
            continue  # the live logits lack those of its own tokens
        yield _tail(live, cached["tail_log_odds"][:, slot], ids, temperature)


def _values(info: TeacherInfo, cached: Values, expected: Values, temperature: float) -> Judged:
    """Judge log-probabilities [N,K] at τ in the teacher's codec; ``cached`` are the stored ones."""
    top = expected.max(axis=1, keepdims=True)
    lowest = top - DEEPEST / temperature
    cached, expected = np.maximum(cached, lowest), np.maximum(expected, lowest)
    span = (expected.max(axis=1) - expected.min(axis=1)) * temperature
    codec_bound = CODECS[info.codec].error_bound(span, temperature)
    pass_bound = 2 * rounding(info, expected)
    error = np.abs(cached - expected)
    return worst("a kept log-probability", error, codec_bound[:, None], pass_bound)


def _tail(
    live: Distributions, stored: NDArray[np.int16], ids: NDArray[np.int64], temperature: float
) -> Judged:
    exact = live.at(temperature)
    inside, outside = np.take_along_axis(exact, ids, axis=1), exact.copy()
    np.put_along_axis(outside, ids, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        outside_mass = np.logaddexp(_log_sum(outside), np.log(live.foreign_mass))
    live_odds = _log_sum(inside) - outside_mass
    cached_odds = np.where(stored == NO_TAIL, LARGEST_ODDS, stored / STEP)
    live_odds = np.clip(live_odds, -LARGEST_ODDS, LARGEST_ODDS)
    error = np.abs(np.clip(cached_odds, -LARGEST_ODDS, LARGEST_ODDS) - live_odds)
    pass_bound = sum(_mean_rounding(live.info, part) for part in (inside, outside))
    quantity = f"the log-odds of the kept mass at temperature {temperature:g}"
    return Judged(
        quantity, error, np.full(len(error), 0.5 / STEP), np.asarray(pass_bound) / temperature
    )


def _mean_rounding(info: TeacherInfo, log_probs: Values) -> Values:
    """Return by how much a sum of probabilities may move, in nats: the mean over its terms."""
    finite = np.maximum(log_probs, -1e4)
    with np.errstate(invalid="ignore"):  # an empty sum has no mean
        weights = np.exp(log_probs - _log_sum(log_probs)[:, None])
    change: Values = ROUNDING[info.precision] * (np.nan_to_num(weights) * (1 - finite)).sum(axis=1)
    return change


def _log_sum(values: Values) -> Values:
    """Return log Σ exp of rows [N]; −inf where all entries are."""
    top = np.maximum(values.max(axis=1), -1e30)
    with np.errstate(divide="ignore"):
        log_sum: Values = top + np.log(np.exp(values - top[:, None]).sum(axis=1))
    return log_sum


# --- samples --------------------------------------------------------------------------------------


def judge_threshold(
    live: Distributions, ids: NDArray[np.int64], log_probs: Values
) -> Iterator[Judged]:
    """Judge a threshold sample [N,k]: its values, what it must contain, and what was drawn.

    ``log_probs``: at the temperature of the sample.
    """
    info, (temperature,) = live.info, live.info.temperatures
    exact = live.at(temperature)
    threshold, certain_count = _threshold(np.exp(exact), ids.shape[1])
    live_values = np.maximum(np.take_along_axis(exact, ids, axis=1), threshold[:, None])
    yield _values(info, log_probs, live_values, temperature)
    remaining = exact.copy()
    np.put_along_axis(remaining, ids, -np.inf, axis=1)
    with np.errstate(invalid="ignore"):
        excess = np.nan_to_num(np.maximum(remaining.max(axis=1) - threshold, 0.0))
    bound = 2 * rounding(info, np.maximum(threshold, -1e4))
    quantity = "the likeliest token that was left out (above the threshold)"
    yield Judged(quantity, excess, np.zeros(len(excess)), bound)
    yield _judge_drawn(live, exact, ids, certain_count)


def _threshold(probs: Values, k: int) -> tuple[Values, NDArray[np.int64]]:
    """Return log θ [N] such that Σ min(1, p/θ) = k, and how many tokens exceed it. −inf if all
    tokens are kept.
    """
    size = probs.shape[1]
    order = np.sort(probs, axis=1)[:, ::-1]
    mass_from_rank = order[:, ::-1].cumsum(axis=1)[:, ::-1][:, :k]  # from each rank on
    remaining_places = k - np.arange(k)
    certain_count = (order[:, :k] * remaining_places >= mass_from_rank).sum(axis=1)
    if k == size:
        return np.full(len(probs), -np.inf), certain_count
    last_certain = np.minimum(certain_count, k - 1)[:, None]
    mass = np.take_along_axis(mass_from_rank, last_certain, axis=1)[:, 0]
    with np.errstate(divide="ignore"):
        theta = np.log(mass / np.maximum(k - certain_count, 1))
    return np.where(certain_count < k, theta, -np.inf), certain_count


def _judge_drawn(
    live: Distributions, exact: Values, ids: NDArray[np.int64], certain_count: NDArray[np.int64]
) -> Judged:
    """Check that the ids below the threshold are those drawn by the row's uniform u.

    The j-th of n, in the order of ids, lies at (u + j)/n of the cumulative mass below the
    threshold.
    """
    assert live.uniforms is not None
    count, k = ids.shape
    error, pass_bound = np.zeros(count), np.full(count, 1.0)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    for row in np.flatnonzero(certain_count < k):
        certain_ids = order[row, : certain_count[row]]
        weights = np.exp(exact[row])
        weights[certain_ids] = 0.0
        drawn_ids = np.sort(np.setdiff1d(ids[row], certain_ids))
        if len(drawn_ids) != k - certain_count[row] or not weights.sum() > 0:
            continue  # a token within rounding of the threshold: its value was judged
        weights /= weights.sum()
        points = (live.uniforms[row, 0] + np.arange(len(drawn_ids))) / len(drawn_ids)
        error[row] = _distance_outside(weights, drawn_ids, points).max()
        pass_bound[row] = _displacement(live.info, exact[row], weights)
    return Judged("the place of a drawn token", error, np.zeros(count), pass_bound)


def judge_random(
    live: Distributions, ids: NDArray[np.int64], counts: NDArray[np.uint8]
) -> Iterator[Judged]:
    """Judge draws with replacement: ids [N,K] and their counts; −1 and 0 where fewer were drawn."""
    assert live.uniforms is not None
    exact = live.at(live.info.temperatures[0])
    error, pass_bound = np.zeros(len(ids)), np.zeros(len(ids))
    for row, log_probs in enumerate(exact):
        probs = np.exp(log_probs)
        drawn_ids = np.sort(np.repeat(ids[row], counts[row]))
        points = np.sort(live.uniforms[row, : len(drawn_ids)])
        error[row] = _distance_outside(probs / probs.sum(), drawn_ids, points).max()
        pass_bound[row] = _displacement(live.info, log_probs, probs)
    yield Judged("the place of a draw", error, np.zeros(len(ids)), pass_bound)


def _distance_outside(weights: Values, drawn_ids: NDArray[np.int64], points: Values) -> Values:
    """Return how far points lie outside the part of the cumulative ``weights`` of the drawn ids."""
    upper = weights.cumsum()[drawn_ids]
    lower = upper - weights[drawn_ids]
    return np.maximum(np.maximum(lower - points, points - upper), 0.0)


def _displacement(info: TeacherInfo, log_probs: Values, weights: Values) -> float:
    """Return how far two passes may displace a cumulative distribution."""
    finite = np.maximum(log_probs, -1e4)
    return float(ROUNDING[info.precision] * (weights * (1 - finite)).sum()) + 1e-6
