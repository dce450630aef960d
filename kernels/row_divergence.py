"""The row kernel's divergences in Triton: D over k + 1 outcomes, and its gradient.

What `closed_form.divergence_parts` defines, of one row, in float32 registers; no memory is touched.
Tensors over ids are [K]; or [C,K], where each of a cluster's C programs holds them all.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from rekindle.kernels.targets import LOG_OF_ZERO

_LN2 = tl.constexpr(0.6931471805599453)
_LOG_ZERO = tl.constexpr(LOG_OF_ZERO)


@triton.jit
def sum_of_row(x):
    """Σ over a row: a scalar; of [C,·] a program's own part, [C,1]."""
    return tl.sum(x, len(x.shape) - 1, keep_dims=len(x.shape) > 1)


@triton.jit
def max_of_row(x):
    """As `sum_of_row`, the largest."""
    return tl.max(x, len(x.shape) - 1, keep_dims=len(x.shape) > 1)


@triton.jit
def _log_of_target(q):
    return tl.where(q > 0, tl.log(tl.where(q > 0, q, 1.0)), _LOG_ZERO)


@triton.jit
def _outcome(q, log_p, log_skew, logit_skew, DIVERGENCE: tl.constexpr):
    """Term of D, p and φ·p (for reverse KL: φ) of outcomes; log_p is -inf where there is none."""
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
    """D, and its gradient with respect to z/τ: the rest's factor and the listed values."""
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
    """Of a teacher's rest, its log-probability; and how its gradient is shared out: to what is
    outside the union, and to those ids of the union that others list.
    """
    log_p = tl.where(others, log_p, float("-inf"))
    top = tl.maximum(max_of_row(log_p), log_p_outside)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = sum_of_row(tl.exp(log_p - top)) + tl.exp(log_p_outside - top)
    log_rest = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    reference = tl.where(total > 0, log_rest, 0.0)
    return log_rest, tl.exp(log_p_outside - reference), tl.exp(log_p - reference)
