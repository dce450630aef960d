"""Read a row of logits in Triton: its maximum, its exponentials and their sums.

Two ways. *Held*: the whole row is read once, and its exponentials stay in the registers of one
program, or of a cluster of C, until the gradient is formed from them. *Streamed*: it is read one
block at a time, twice. Tensors over entries are [B]; [C,B/C] in a cluster, where each program holds
a part. Nothing here depends on targets or losses.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from rekindle.kernels.row_divergence import max_of_row, sum_of_row

_LOG2E = tl.constexpr(1.4426950408889634)
_NO_HINT = tl.constexpr("")  # wrapped: Triton 3.6 does not wrap defaults
_HEAVIEST = tl.constexpr(8)  # entries removed from a held row before it is summed again


@triton.jit
def logits_at(
    base, bias, at, mask, scale, softcap, SOFTCAP: tl.constexpr, KEEP: tl.constexpr = _NO_HINT
):
    """Return float32 logits after bias, scale and softcap; -inf stays -inf and fills masked places.

    KEEP is the cache's eviction policy. Loads with different policies are not merged into one.
    """
    x = tl.load(base + at, mask=mask, other=float("-inf"), eviction_policy=KEEP).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    x *= scale
    if SOFTCAP:
        # tanh by exp2: the interpreter has no libdevice
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * _LOG2E / softcap)))
        x = tl.where(x == float("-inf"), x, softcap * tanh)
    return x


@triton.jit
def slope(x, scale, softcap, SOFTCAP: tl.constexpr):
    """Return d(transformed)/d(raw) at the transformed x."""
    if SOFTCAP:
        tanh = x / softcap
        return tl.where(x == float("-inf"), 0.0, scale * (1.0 - tanh * tanh))
    else:
        return scale


@triton.jit
def exponentials(x, reference, k, POWER: tl.constexpr):
    """Return exp((x − reference)/τ) and exp(x − reference); k is log2(e)/τ.

    POWER is τ where the second is a power of the first (1, 2, 4), 0 where it needs an exponential
    of its own, -1 where it is not needed.
    """
    u = tl.exp2((x - reference) * k)
    e = u
    if POWER == 2:
        e = u * u
    if POWER == 4:
        e = u * u * (u * u)
    if POWER == 0:
        e = tl.exp2((x - reference) * _LOG2E)
    return u, e


@triton.jit
def unlisted_gradient(u, e, rest_weight, one_weight, POWER: tl.constexpr):
    """Return the gradient of most entries: rest_weight · u + one_weight · e.

    A power is computed again by Horner's rule, so that only u is kept in registers.
    """
    if POWER == 1:
        g = (rest_weight + one_weight) * u
    elif POWER == 2:
        g = u * (rest_weight + one_weight * u)
    elif POWER == 4:
        g = u * (rest_weight + one_weight * u * u * u)
    else:
        g = rest_weight * u
        if POWER == 0:
            g += one_weight * e
    return g


@triton.jit
def finite_or_zero(peak):
    """Return the reference of the exponents: the peak, or 0 where there is nothing."""
    return tl.where(peak == float("-inf"), 0.0, peak)


# ---- held ---------------------------------------------------------------------------------------


@triton.jit
def _maxima(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _sums(a, b, c, d):
    return a + c, b + d


@triton.jit
def _largest_in_cluster(peak, flag, CTAS: tl.constexpr):
    """Return the two maxima over a cluster, bit-identical in all programs: branches may
    use them.
    """
    if CTAS > 1:
        peak, flag = tl.reduce((tl.reshape(peak, [CTAS]), tl.reshape(flag, [CTAS])), 0, _maxima)
    return peak, flag


@triton.jit
def _part_sums(x, x_edge, k, POWER: tl.constexpr):
    """Return the maximum of a program's part of the row, both exponentials and their sums."""
    peak = tl.maximum(max_of_row(x), max_of_row(x_edge))
    u, e = exponentials(x, finite_or_zero(peak), k, POWER)
    u_edge, e_edge = exponentials(x_edge, finite_or_zero(peak), k, POWER)
    s_tau = sum_of_row(u) + sum_of_row(u_edge)
    s_one = sum_of_row(e) + sum_of_row(e_edge)
    return peak, s_tau, s_one, u, e, u_edge, e_edge


@triton.jit
def _sum_of_others(peak, s_tau, z_k, k, resolution):
    """Return a part's sum without its entries z_k, and 1 if that is mostly rounding
    error, else 0.
    """
    listed = sum_of_row(tl.exp2((z_k - finite_or_zero(peak)) * k))
    others = s_tau - listed
    return others, ((others < resolution * s_tau) & (listed > 0)).to(tl.int32)


@triton.jit
def _sums_without_heaviest(
    base, middle, bias, edge, edge_mask, head, n_middle, ids, z_k, cta,
    k, scale, softcap, resolution,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, CTAS: tl.constexpr,
):  # fmt: skip
    """Return a part's maximum and its sum at τ over the ids that are not listed, and the row's
    maximum over them.

    The part is read again in groups of eight entries: a thread compares an id with its groups'
    numbers and eight constants, and needs no register for each entry's own number.
    """
    group = tl.arange(0, BLOCK // CTAS // 8)[:, None] * 8
    lane = tl.arange(0, 8)[None, :]
    if CTAS > 1:
        group = cta[:, :, None] * (BLOCK // CTAS) + group[None, :, :]
        lane = lane[None, :, :]
    o = group + lane
    y = logits_at(middle, bias, o, o < n_middle, scale, softcap, SOFTCAP, "evict_last")
    y_edge = logits_at(base, bias, edge, edge_mask, scale, softcap, SOFTCAP, "evict_last")
    remaining = z_k
    unresolved = 1
    peak = max_of_row(remaining)
    others = peak
    others_peak = 0.0
    while unresolved > 0:
        for _ in range(_HEAVIEST):
            heaviest = max_of_row(remaining)
            is_heaviest = (remaining == heaviest) & (remaining != float("-inf"))
            removed = max_of_row(tl.where(is_heaviest, ids, -1))
            y_edge = tl.where(edge == removed, float("-inf"), y_edge)
            remaining = tl.where(ids == removed, float("-inf"), remaining)
            offset = removed - head
            if CTAS > 1:
                offset = offset[:, :, None]
            y = tl.where((group == offset // 8 * 8) & (lane == offset % 8), float("-inf"), y)
        peak = tl.maximum(max_of_row(tl.max(y, len(y.shape) - 1)), max_of_row(y_edge))
        reference = finite_or_zero(peak)
        u_edge = tl.exp2((y_edge - reference) * k)
        if CTAS > 1:
            reference = reference[:, :, None]
        u = tl.exp2((y - reference) * k)
        s_tau = sum_of_row(tl.sum(u, len(y.shape) - 1)) + sum_of_row(u_edge)
        others, unresolved = _sum_of_others(peak, s_tau, remaining, k, resolution)
        others_peak, unresolved = _largest_in_cluster(peak, unresolved, CTAS)
    return peak, others, others_peak


@triton.jit
def held_row(
    base, middle, bias, at, edge, edge_mask, head, n_middle, ids, z_k, cta,
    k, scale, softcap, resolution,
    SOFTCAP: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr, CTAS: tl.constexpr,
):  # fmt: skip
    """Read a row once and take its listed ids out; z_k is their logits, -inf outside their own
    part.

    Returns for the row: the maximum and the sum at τ of the ids that are not listed, and the
    maximum and the sum at 1 of all ids. Then what a program holds: the logits and both exponentials
    of its part and of the row's edges, and the reference of these.

    A part's sum over the other ids is total − listed while the remainder is large enough to be
    resolved. Otherwise the part is read again (nothing has been written yet) and the heaviest
    listed entries are removed, some at a time, until it is; each costs one comparison per entry.
    """
    x = logits_at(middle, bias, at, at < n_middle, scale, softcap, SOFTCAP)
    x_edge = logits_at(base, bias, edge, edge_mask, scale, softcap, SOFTCAP)
    peak, s_tau, s_one, u, e, u_edge, e_edge = _part_sums(x, x_edge, k, POWER)
    first_reference = finite_or_zero(peak)
    others, unresolved = _sum_of_others(peak, s_tau, z_k, k, resolution)
    top, unresolved = _largest_in_cluster(peak, unresolved, CTAS)
    others_peak = top
    if unresolved > 0:
        peak, others, others_peak = _sums_without_heaviest(
            base, middle, bias, edge, edge_mask, head, n_middle, ids, z_k, cta,
            k, scale, softcap, resolution, SOFTCAP, BLOCK, CTAS,
        )  # fmt: skip
        # listed entries may overflow: they are overwritten later
        y = logits_at(middle, bias, at, at < n_middle, scale, softcap, SOFTCAP, "evict_first")
        u, e = exponentials(y, finite_or_zero(peak), k, POWER)
        u_edge, e_edge = exponentials(x_edge, finite_or_zero(peak), k, POWER)
        tl.debug_barrier()  # everything is read before anything is written
    s_tau = others
    if CTAS > 1:
        empty = peak == float("-inf")
        s_tau *= tl.where(
            empty, 0.0, tl.exp2((finite_or_zero(peak) - finite_or_zero(others_peak)) * k)
        )
        s_one *= tl.where(s_one > 0, tl.exp2((first_reference - finite_or_zero(top)) * _LOG2E), 0.0)
        s_tau, s_one = tl.reduce((tl.reshape(s_tau, [CTAS]), tl.reshape(s_one, [CTAS])), 0, _sums)
    return others_peak, s_tau, top, s_one, x, u, e, x_edge, u_edge, e_edge, peak


# ---- streamed -----------------------------------------------------------------------------------


@triton.jit
def _fold(peak, s_tau, s_one, x, k, POWER: tl.constexpr):
    """Fold logits [L,S] into L running triples (max, Σ exp((z − max)/τ), Σ exp(z − max)).

    The S logits are in one thread: it needs no other thread and rescales once per S entries.
    """
    new_peak = tl.maximum(peak, tl.max(x, 1))
    reference = finite_or_zero(new_peak)
    shrink_tau, shrink_one = exponentials(peak, reference, k, POWER)
    u, e = exponentials(x, reference[:, None], k, POWER)
    return new_peak, s_tau * shrink_tau + tl.sum(u, 1), s_one * shrink_one + tl.sum(e, 1)


@triton.jit
def streamed_sums(
    base, middle, bias, edge, edge_mask, n_middle, k, scale, softcap,
    SOFTCAP: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return (max, Σ exp((z − max)/τ), Σ exp(z − max)) of a whole row."""
    S: tl.constexpr = 128 // middle.dtype.element_ty.primitive_bitwidth
    L: tl.constexpr = BLOCK // S
    at = tl.arange(0, L)[:, None] * S + tl.arange(0, S)[None, :]
    peaks = tl.full([L], float("-inf"), tl.float32)
    sums_tau = tl.zeros([L], tl.float32)
    sums_one = tl.zeros([L], tl.float32)
    for i in tl.range(0, tl.cdiv(n_middle, BLOCK), num_stages=STAGES):
        o = i * BLOCK + at
        x = logits_at(middle, bias, o, o < n_middle, scale, softcap, SOFTCAP, "evict_last")
        peaks, sums_tau, sums_one = _fold(peaks, sums_tau, sums_one, x, k, POWER)
    x_edge = logits_at(base, bias, edge, edge_mask, scale, softcap, SOFTCAP)
    peak = tl.maximum(tl.max(peaks, 0), tl.max(x_edge, 0))
    factors_tau, factors_one = exponentials(peaks, finite_or_zero(peak), k, POWER)
    u, e = exponentials(x_edge, finite_or_zero(peak), k, POWER)
    return (
        peak,
        tl.sum(sums_tau * factors_tau, 0) + tl.sum(u, 0),
        tl.sum(sums_one * factors_one, 0) + tl.sum(e, 0),
    )


@triton.jit
def hide_listed(base, ids, listed):
    """Set the listed ids of the row to -inf."""
    minus_infinity = tl.full(ids.shape, float("-inf"), tl.float32)
    tl.store(base + ids, minus_infinity.to(base.dtype.element_ty), mask=listed)


@triton.jit
def sums_of_others(
    base, middle, copy, copy_middle, edge, edge_mask, n_middle, ids, listed, k, scale, softcap,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return (max, Σ exp((z − max)/τ)) of the ids that are not listed, from a copy of the row."""
    tl.store(copy + edge, tl.load(base + edge, mask=edge_mask), mask=edge_mask)
    for i in range(0, tl.cdiv(n_middle, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(copy_middle + o, tl.load(middle + o, mask=o < n_middle), mask=o < n_middle)
    tl.debug_barrier()
    hide_listed(copy, ids, listed)
    tl.debug_barrier()
    peak, s_tau, _ = streamed_sums(
        copy, copy_middle, None, edge, edge_mask, n_middle, k, scale, softcap, SOFTCAP, -1, BLOCK,
        STAGES,
    )  # fmt: skip
    tl.debug_barrier()  # finish reading the copy before gradients replace it
    return peak, s_tau
