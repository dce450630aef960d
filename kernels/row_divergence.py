"""A row's targets and divergences in Triton: D over k + 1 outcomes, and its gradient.

Computes for one row, in float32 registers, what `encoded.decode`, `targets.target_masses` and
`closed_form.divergence_parts` define. Tensors over ids are [K], or [C,K] in a cluster, where each
of the C programs holds them all.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from rekindle.kernels.encoded import NO_TAIL, STEP
from rekindle.kernels.targets import LOG_OF_ZERO

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
_STEP = tl.constexpr(STEP)
_NO_TAIL = tl.constexpr(NO_TAIL)
_LOG_ZERO = tl.constexpr(LOG_OF_ZERO)


@triton.jit
def sum_of_row(x):
    """Return Σ over a row: a scalar; for [C,·] each program's own part, [C,1]."""
    return tl.sum(x, len(x.shape) - 1, keep_dims=len(x.shape) > 1)


@triton.jit
def max_of_row(x):
    """Return the maximum of a row, shaped as in `sum_of_row`."""
    return tl.max(x, len(x.shape) - 1, keep_dims=len(x.shape) > 1)


@triton.jit
def decode_row(
    ids_ptr, values_ptr, log_odds_ptr, high_ptr, max_ptr, min_ptr, row, lane, K, kept, inverse_tau,
    PLANES: tl.constexpr,
):  # fmt: skip
    """Return ids (-1 past `kept`), their probabilities and the tail mass: `encoded.decode` of one
    row.
    """
    is_stored = lane < K
    ids = tl.load(ids_ptr + row * K + lane, mask=is_stored, other=0).to(tl.int32) & 0xFFFF
    for plane in tl.static_range(PLANES):
        bit = plane * K + lane
        plane_bytes = high_ptr + row * ((PLANES * K + 7) // 8) + bit // 8
        planes = tl.load(plane_bytes, mask=is_stored, other=0)
        ids |= ((planes.to(tl.int32) >> (bit % 8)) & 1) << (16 + plane)
    highest = tl.load(max_ptr + row).to(tl.int32) & 0xFFFF
    lowest = tl.load(min_ptr + row).to(tl.int32) & 0xFFFF
    log_odds = tl.load(log_odds_ptr + row).to(tl.int32)
    step = (lowest - highest).to(tl.float32) * (inverse_tau * _LOG2E / (255.0 * _STEP))
    values = tl.load(values_ptr + row * K + lane, mask=is_stored, other=0).to(tl.float32)
    weights = tl.where(is_stored, tl.exp2(-values * step), 0.0)
    odds = tl.exp(-tl.abs(log_odds.to(tl.float32)) / _STEP)  # the smaller mass over the larger
    small = odds / (1.0 + odds)
    large = 1.0 / (1.0 + odds)
    has_no_tail = log_odds == _NO_TAIL
    mass = tl.where(has_no_tail, 1.0, tl.where(log_odds >= 0, large, small))
    tail = tl.where(has_no_tail, 0.0, tl.where(log_odds >= 0, small, large))
    q = weights * (mass / sum_of_row(weights))
    tail += sum_of_row(tl.where(lane >= kept, q, 0.0))
    listed = is_stored & (lane < kept)
    return tl.where(listed, ids, -1), tl.where(listed, q, 0.0), tail


@triton.jit
def target_of_teacher(
    probs_ptr, tail_ptr, target_row, K, lane, listed, q, tail,
    TAIL: tl.constexpr, ENCODED: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """Return which ids the teacher lists, its target over the k + 1 outcomes, and whether it has
    one.

    `target_row` is the index of its row; q and tail are already computed if the targets were
    encoded.
    """
    if not ENCODED:
        q = tl.load(probs_ptr + target_row * K + lane, mask=listed, other=-1.0).to(tl.float32)
        if SEVERAL:
            listed = listed & (q >= 0)
        q = tl.where(listed, q, 0.0)
    total = sum_of_row(q)
    has_target = max_of_row(listed.to(tl.int32)) > 0
    rest = 0.0
    if TAIL == 0:
        if ENCODED:
            rest = tail
        elif tail_ptr is not None:
            rest = tl.maximum(tl.load(tail_ptr + target_row).to(tl.float32), 0.0)
        else:
            rest = tl.maximum(1.0 - total, 0.0)
    if TAIL == 1:
        has_target = has_target & (total > 0)
        q = q / tl.where(total > 0, total, 1.0)
    return listed, q, rest, has_target


@triton.jit
def _log_of_target(q):
    return tl.where(q > 0, tl.log(tl.where(q > 0, q, 1.0)), _LOG_ZERO)


@triton.jit
def _outcome(q, log_p, log_skew, logit_skew, DIVERGENCE: tl.constexpr):
    """Return the term of D, p and φ·p (for reverse KL: φ) of outcomes; log_p -inf marks none."""
    possible = log_p != float("-inf")
    p = tl.exp(log_p)
    log_p = tl.where(possible, log_p, _LOG_ZERO)
    log_q = _log_of_target(q)
    if DIVERGENCE == 0:
        term = q * (log_q - log_p)
        p_phi = tl.where(possible, -q, 0.0)
    elif DIVERGENCE == 1:
        p_phi = log_p - log_q
        term = p * p_phi
    elif DIVERGENCE == 2:
        high = tl.maximum(log_q, log_p)
        low = tl.minimum(log_q, log_p)
        log_m = high + tl.log(1.0 + tl.exp(low - high)) - _LN2
        p_phi = 0.5 * p * (log_p - log_m)
        term = 0.5 * q * (log_q - log_m) + p_phi
    elif DIVERGENCE == 4:
        # see closed_form._skew_kl
        odds = log_p - log_q - logit_skew
        small = tl.exp(-tl.abs(odds))
        term = -q * (tl.maximum(odds, 0.0) + tl.log(1.0 + small) + log_skew)
        share = tl.where(odds > 0, 1.0, small) / (1.0 + small)
        p_phi = tl.where(possible, -q * share, 0.0)
    else:
        term = 0.5 * tl.abs(p - q)
        p_phi = tl.where(p > q, 0.5 * p, tl.where(p < q, -0.5 * p, 0.0))
    return term, p, p_phi


@triton.jit
def divergence_of_row(q, q_rest, log_p, log_p_rest, log_skew, logit_skew, DIVERGENCE: tl.constexpr):
    """Return D and its gradient with respect to z/τ: the rest's factor and the listed values."""
    q_rest = tl.where(log_p_rest == float("-inf"), 0.0, q_rest)
    term, p, p_phi = _outcome(q, log_p, log_skew, logit_skew, DIVERGENCE)
    term_rest, p_rest, p_phi_rest = _outcome(q_rest, log_p_rest, log_skew, logit_skew, DIVERGENCE)
    if DIVERGENCE == 1:
        # φ relative to the likeliest outcome's: see closed_form._reverse_kl
        top = max_of_row(p)
        at_top = max_of_row(tl.where(p == top, p_phi, float("-inf")))
        likeliest = tl.where(p_rest > top, p_phi_rest, at_top)
        p_phi = p * (p_phi - likeliest)
        p_phi_rest = p_rest * (p_phi_rest - likeliest)
    mean = sum_of_row(p_phi) + p_phi_rest
    return sum_of_row(term) + term_rest, p_phi_rest - p_rest * mean, p_phi - p * mean


@triton.jit
def rest_of_teacher(log_p, others, log_p_outside):
    """Return the log-probability of a teacher's rest, and the shares of its gradient: for the ids
    outside the union, and for each id of the union that only others list.
    """
    log_p = tl.where(others, log_p, float("-inf"))
    top = tl.maximum(max_of_row(log_p), log_p_outside)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = sum_of_row(tl.exp(log_p - top)) + tl.exp(log_p_outside - top)
    log_rest = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    reference = tl.where(total > 0, log_rest, 0.0)
    return log_rest, tl.exp(log_p_outside - reference), tl.exp(log_p - reference)
