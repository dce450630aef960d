"""The row kernel in Triton: both losses and the exact gradient of a row of logits in one program.

It computes what `closed_form.loss_block` defines, in float32, from float32, bfloat16 or float16
logits, and must not allocate, choose defaults or talk to autograd. Shapes: N rows, V vocabulary,
K kept ids a row.

Of T teachers a row's ids are the union of what they list: the row is streamed for all of them at
once, and what is listed by others only is added to a teacher's own rest from the registers.

A program owns a row. It gathers the k + 1 special logits, streams the row once for the
log-sum-exp of all *other* ids, forms both losses and the row's constants, streams the row again
(backwards: its end is still in the cache) writing `constant · exp(z)`, and at last stores the k +
1 special entries, each once, from float32.

The complement's sum is exact, never total minus listed where that cancels. A private buffer is
written over anyway, so its listed entries are set to -inf before the row is streamed. A caller's
logits must stay as they are: the sum is total − listed while the remainder is large enough to be
resolved, and otherwise the row is copied to the gradient's memory, the listed entries taken out
there, and streamed again.

Memory: rows start anywhere (V = 30,522 is a multiple of 2 only), so a row is cut into a middle
that starts and ends on multiples of eight elements, read and written by 128-bit instructions, and
at most fifteen entries at its two edges, which one small vector covers. Row offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from rekindle.kernels.encoded import NO_TAIL, STEP
from rekindle.kernels.row_divergence import divergence_of_row, rest_of_teacher
from rekindle.kernels.targets import LOG_OF_ZERO

_LOG2E = tl.constexpr(1.4426950408889634)
_LOG_ZERO = tl.constexpr(LOG_OF_ZERO)
_STEP = tl.constexpr(STEP)
_NO_TAIL = tl.constexpr(NO_TAIL)
_EDGE = tl.constexpr(16)  # lanes of the edge vector: eight before the middle, eight after it


@triton.jit
def _logits(base, bias, at, mask, scale, softcap, SOFTCAP: tl.constexpr):
    """float32 logits after bias, scale and softcap; -inf stays -inf, and stands where none is."""
    x = tl.load(base + at, mask=mask, other=float("-inf")).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    x *= scale
    if SOFTCAP:
        # tanh by exp2: the interpreter has no libdevice
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * _LOG2E / softcap)))
        x = tl.where(x == float("-inf"), x, softcap * tanh)
    return x


@triton.jit
def _slope(x, scale, softcap, SOFTCAP: tl.constexpr):
    """d(transformed)/d(raw) at transformed x."""
    if SOFTCAP:
        tanh = x / softcap
        return tl.where(x == float("-inf"), 0.0, scale * (1.0 - tanh * tanh))
    else:
        return scale


@triton.jit
def _fold(peak, s_tau, s_one, x, k, POWER: tl.constexpr):
    """Take a vector of logits into (max, Σ exp((z − max)/τ), Σ exp(z − max)); k is log2(e)/τ.

    POWER is τ where the second sum is a power of the first's terms (1, 2, 4), 0 where it needs
    its own exponentials, -1 where nobody asks for it.
    """
    new = tl.maximum(peak, tl.max(x, 0))
    reference = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2((peak - reference) * k)
    u = tl.exp2((x - reference) * k)
    s_tau = s_tau * shrink + tl.sum(u, 0)
    if POWER == 2:
        s_one = s_one * shrink * shrink + tl.sum(u * u, 0)
    if POWER == 4:
        s_one = s_one * shrink * shrink * shrink * shrink + tl.sum(u * u * (u * u), 0)
    if POWER == 0:
        s_one = s_one * tl.exp2((peak - reference) * _LOG2E)
        s_one += tl.sum(tl.exp2((x - reference) * _LOG2E), 0)
    if POWER == 1:
        s_one = s_tau
    return new, s_tau, s_one


@triton.jit
def _row_sums(
    base, middle, bias, edge, edge_mask, n_middle, k, scale, softcap,
    SOFTCAP: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(max, Σ exp((z − max)/τ), Σ exp(z − max)) of a whole row."""
    x_edge = _logits(base, bias, edge, edge_mask, scale, softcap, SOFTCAP)
    nothing = tl.full([], 0.0, tl.float32)
    peak, s_tau, s_one = _fold(
        tl.full([], float("-inf"), tl.float32), nothing, nothing, x_edge, k, POWER
    )
    for i in range(0, tl.cdiv(n_middle, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        x = _logits(middle, bias, o, o < n_middle, scale, softcap, SOFTCAP)
        peak, s_tau, s_one = _fold(peak, s_tau, s_one, x, k, POWER)
    return peak, s_tau, s_one


@triton.jit
def _hide(base, ids, listed):
    """Take the listed ids out of the row."""
    nothing = tl.full(ids.shape, float("-inf"), tl.float32)
    tl.store(base + ids, nothing.to(base.dtype.element_ty), mask=listed)


@triton.jit
def _sums_of_others(
    base, middle, copy, copy_middle, edge, edge_mask, n_middle, ids, listed,
    k, scale, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(max, Σ exp((z − max)/τ)) of the ids that are not listed, by way of a copy of the row."""
    tl.store(copy + edge, tl.load(base + edge, mask=edge_mask), mask=edge_mask)
    for i in range(0, tl.cdiv(n_middle, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(copy_middle + o, tl.load(middle + o, mask=o < n_middle), mask=o < n_middle)
    tl.debug_barrier()
    _hide(copy, ids, listed)
    tl.debug_barrier()
    peak, s_tau, _ = _row_sums(
        copy, copy_middle, None, edge, edge_mask, n_middle, k, scale, softcap, SOFTCAP, -1, BLOCK
    )
    tl.debug_barrier()  # the copy is read before gradients replace it
    return peak, s_tau


@triton.jit
def _decoded(
    ids_ptr, values_ptr, side_ptr, high_ptr, row, K, kept, inverse_tau,
    PLANES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Ids (-1 past `kept`), their probabilities and the tail mass: `encoded.decode` of one row."""
    lane = tl.arange(0, BLOCK_K)
    stored = lane < K
    ids = tl.load(ids_ptr + row * K + lane, mask=stored, other=0).to(tl.int32) & 0xFFFF
    for plane in tl.static_range(PLANES):
        bit = plane * K + lane
        planes = tl.load(high_ptr + row * ((PLANES * K + 7) // 8) + bit // 8, mask=stored, other=0)
        ids |= ((planes.to(tl.int32) >> (bit % 8)) & 1) << (16 + plane)
    highest = tl.load(side_ptr + row * 3).to(tl.int32) & 0xFFFF
    lowest = tl.load(side_ptr + row * 3 + 1).to(tl.int32) & 0xFFFF
    fixed = tl.load(side_ptr + row * 3 + 2).to(tl.int32)
    step = (lowest - highest).to(tl.float32) * (inverse_tau * _LOG2E / (255.0 * _STEP))
    values = tl.load(values_ptr + row * K + lane, mask=stored, other=0).to(tl.float32)
    share = tl.where(stored, tl.exp2(-values * step), 0.0)
    odds = tl.exp(-tl.abs(fixed.to(tl.float32)) / _STEP)  # the smaller mass over the larger
    small = odds / (1.0 + odds)
    large = 1.0 / (1.0 + odds)
    whole = fixed == _NO_TAIL
    mass = tl.where(whole, 1.0, tl.where(fixed >= 0, large, small))
    tail = tl.where(whole, 0.0, tl.where(fixed >= 0, small, large))
    q = share * (mass / tl.sum(share, 0))
    tail += tl.sum(tl.where(lane >= kept, q, 0.0), 0)
    listed = stored & (lane < kept)
    return tl.where(listed, ids, -1).to(tl.int64), tl.where(listed, q, 0.0), tail


@triton.jit
def _target_of_teacher(
    probs_ptr, tail_ptr, at, K, lane, listed, q, tail,
    TAIL: tl.constexpr, ENCODED: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """Which ids the teacher lists, its target over the k + 1 outcomes, whether it has one.

    `at` is the place of its row; q and tail are there already if they were encoded.
    """
    if not ENCODED:
        q = tl.load(probs_ptr + at * K + lane, mask=listed, other=-1.0).to(tl.float32)
        if SEVERAL:
            listed = listed & (q >= 0)
        q = tl.where(listed, q, 0.0)
    total = tl.sum(q, 0)
    has_target = tl.max(listed.to(tl.int32), 0) > 0
    rest = 0.0
    if TAIL == 0:
        if ENCODED:
            rest = tail
        elif tail_ptr is not None:
            rest = tl.maximum(tl.load(tail_ptr + at).to(tl.float32), 0.0)
        else:
            rest = tl.maximum(1.0 - total, 0.0)
    if TAIL == 1:
        has_target = has_target & (total > 0)
        q = q / tl.where(total > 0, total, 1.0)
    return listed, q, rest, has_target


@triton.jit
def _outside(x, peak, k, rest_weight, one_weight, POWER: tl.constexpr):
    """Gradient of most entries: rest_weight · exp((z − peak)/τ) + one_weight · exp(z − peak)."""
    u = tl.exp2((x - peak) * k)
    if POWER == 1:
        g = (rest_weight + one_weight) * u
    else:
        g = rest_weight * u
        if POWER == 2:
            g += one_weight * (u * u)
        if POWER == 4:
            g += one_weight * (u * u * (u * u))
        if POWER == 0:
            g += one_weight * tl.exp2((x - peak) * _LOG2E)
    return g


@triton.jit
def row_kernel(
    logits_ptr,  # [N,V] float32 | bfloat16 | float16, rows `stride` apart
    grad_ptr,  # the same layout; the same memory if HIDE
    ids_ptr,  # [N,K] integers, -1 = padding; if ENCODED the low 16 bits
    probs_ptr,  # [N,K] floats, [N,T,K] of T > 1 teachers; if ENCODED uint8 values
    tail_ptr,  # [N,T] floats or None; if ENCODED int16 [N,3], see encoded.EncodedTargets.packed
    labels_ptr,  # [N] integers, or None
    weight_ptr,  # [N]; 0 = row ignored; or None
    high_ptr,  # [N,Q] uint8, with PLANES; or None
    bias_ptr,  # [V], added to the logits; or None. With HIDE, of rows that start aligned
    counts_ptr,  # [2] float32: one over the rows of CE and of D; or None
    upstream_ptr,  # float32, `upstream_stride` (0 or 1) apart; or None
    loss_ptr,  # [N] float32 out, or None
    ce_ptr,  # [N] float32 out: CE times the row's weight
    kd_ptr,  # [N,T] float32 out: the same of D
    stride, V, K, kept, ignore_index, upstream_stride, inverse_tau, scale, softcap, resolution,
    log_skew, logit_skew,  # log α and log α/(1−α) of skew_kl
    ce_weight, kd_weights,  # in the loss; a tuple [T]
    spread,  # what multiplies the gradient beside all these
    DIVERGENCE: tl.constexpr, TAIL: tl.constexpr, POWER: tl.constexpr,
    ENCODED: tl.constexpr, PLANES: tl.constexpr, TEACHERS: tl.constexpr,
    SOFTCAP: tl.constexpr, HIDE: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Losses of one row and, with GRADIENT, the derivative of their part in the whole loss."""
    row = tl.program_id(0).to(tl.int64)
    start = row * stride
    middle_start = (start + 7) // 8 * 8
    head = (middle_start - start).to(tl.int32)
    n_middle = tl.maximum(V - head, 0) // 8 * 8
    lane = tl.arange(0, _EDGE)
    edge = tl.where(lane < 8, lane, head + n_middle + lane - 8)
    edge_mask = (edge < V) & ((lane < head) | (lane >= 8))
    base = logits_ptr + start
    middle = logits_ptr + middle_start
    grad_base = grad_ptr + start
    grad_middle = grad_ptr + middle_start
    blocks = tl.cdiv(n_middle, BLOCK)

    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row).to(tl.float32)
        if weight == 0:
            tl.store(ce_ptr + row, 0.0)
            for t in tl.static_range(TEACHERS):
                tl.store(kd_ptr + row * TEACHERS + t, 0.0)
            if loss_ptr is not None:
                tl.store(loss_ptr + row, 0.0)
            if GRADIENT:
                zero = tl.zeros([BLOCK], tl.float32).to(grad_ptr.dtype.element_ty)
                zero_edge = tl.zeros([_EDGE], tl.float32).to(grad_ptr.dtype.element_ty)
                tl.store(grad_base + edge, zero_edge, mask=edge_mask)
                for i in range(0, blocks):
                    o = i * BLOCK + tl.arange(0, BLOCK)
                    tl.store(grad_middle + o, zero, mask=o < n_middle)
            return

    k = inverse_tau * _LOG2E
    slot = tl.arange(0, BLOCK_K)
    q_stored = 0.0
    tail_stored = 0.0
    if ENCODED:
        ids, q_stored, tail_stored = _decoded(
            ids_ptr, probs_ptr, tail_ptr, high_ptr, row, K, kept, inverse_tau, PLANES, BLOCK_K
        )
    else:
        ids = tl.load(ids_ptr + row * K + slot, mask=slot < K, other=-1).to(tl.int64)
    wrong = tl.max(((ids < -1) | (ids >= V)).to(tl.int32), 0) > 0
    listed = (ids >= 0) & (ids < V)
    z_k = _logits(base, bias_ptr, ids, listed, scale, softcap, SOFTCAP)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row).to(tl.int64)
        labelled = label != ignore_index
        wrong = wrong | (labelled & ((label < 0) | (label >= V)))
        label = tl.where(labelled & (label >= 0) & (label < V), label, 0)
        z_y = _logits(base, bias_ptr, label, label >= 0, scale, softcap, SOFTCAP)

    if HIDE:
        tl.debug_barrier()  # every thread has its special logits
        _hide(base, ids, listed)
        tl.debug_barrier()
    peak, s_tau, s_one = _row_sums(
        base, middle, bias_ptr, edge, edge_mask, n_middle, k, scale, softcap, SOFTCAP, POWER, BLOCK
    )
    top = peak
    if HIDE:
        top = tl.maximum(peak, tl.max(z_k, 0))
        s_one = s_one * tl.exp(peak - top) + tl.sum(tl.exp(z_k - top), 0)
    else:
        others = s_tau - tl.sum(tl.exp2((z_k - top) * k), 0)
        if others < resolution * s_tau:
            peak, others = _sums_of_others(
                base, middle, grad_base, grad_middle, edge, edge_mask, n_middle, ids, listed,
                k, scale, softcap, SOFTCAP, BLOCK,
            )  # fmt: skip
        s_tau = others

    # From here on peak and s_tau are those of the ids that are not listed; top is the row's.
    empty = peak == float("-inf")
    mass = tl.where(empty, 0.0, s_tau * tl.exp2((peak - top) * k))
    log_norm = tl.log(tl.sum(tl.exp2((z_k - top) * k), 0) + mass)
    log_p = (z_k - top) * inverse_tau - log_norm
    log_s = tl.log(tl.where(empty, 1.0, s_tau))
    log_p_outside = (peak - top) * inverse_tau + log_s - log_norm
    factor = weight * spread
    if upstream_ptr is not None:
        factor *= tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
    b = factor * inverse_tau
    if counts_ptr is not None:
        b *= tl.load(counts_ptr + 1)
    loss = 0.0
    kd_outside = 0.0
    kd_listed = tl.zeros([BLOCK_K], tl.float32)
    for t in tl.static_range(TEACHERS):
        own, q, q_rest, has_target = _target_of_teacher(
            probs_ptr, tail_ptr, row * TEACHERS + t, K, slot, listed, q_stored, tail_stored,
            TAIL, ENCODED, TEACHERS > 1,
        )  # fmt: skip
        log_own = log_p
        log_rest = log_p_outside
        if TEACHERS > 1:
            log_own = tl.where(own, log_p, float("-inf"))
            log_rest, share_outside, share_listed = rest_of_teacher(
                log_p, listed & (own == 0), log_p_outside
            )
        kd, kd_rest, kd_own = divergence_of_row(
            q, q_rest, log_own, log_rest, log_skew, logit_skew, DIVERGENCE
        )
        kd = tl.where(has_target, weight * kd, 0.0)
        tl.store(kd_ptr + row * TEACHERS + t, tl.where(wrong, float("nan"), kd))
        loss += kd_weights[t] * kd
        own_b = tl.where(has_target, b * kd_weights[t], 0.0)
        if TEACHERS > 1:
            kd_own += kd_rest * share_listed
            kd_rest *= share_outside
        kd_listed += own_b * kd_own
        kd_outside += own_b * kd_rest
    ce = 0.0
    if labels_ptr is not None:
        log_one = tl.log(s_one)
        possible = z_y != float("-inf")
        ce = tl.where(possible, top + log_one - z_y, -_LOG_ZERO)
        ce = tl.where(labelled, weight * ce, 0.0)
        loss += ce_weight * ce
        labelled = labelled & possible
    tl.store(ce_ptr + row, tl.where(wrong, float("nan"), ce))
    if loss_ptr is not None:
        tl.store(loss_ptr + row, tl.where(wrong, float("nan"), loss))

    if GRADIENT:
        out = grad_ptr.dtype.element_ty
        reference = tl.where(empty, 0.0, peak)
        rest_weight = kd_outside / tl.where(empty, 1.0, s_tau)
        one_weight = 0.0
        if labels_ptr is not None:
            a = tl.where(labelled, factor * ce_weight, 0.0)
            if counts_ptr is not None:
                a *= tl.load(counts_ptr)
            one_weight = a * tl.exp(reference - top - log_one)
        x_edge = _logits(base, bias_ptr, edge, edge_mask, scale, softcap, SOFTCAP)
        g_edge = _outside(x_edge, reference, k, rest_weight, one_weight, POWER)
        g_edge *= _slope(x_edge, scale, softcap, SOFTCAP)
        tl.store(grad_base + edge, g_edge.to(out), mask=edge_mask)
        for i in range(0, blocks):
            o = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            x = _logits(middle, bias_ptr, o, o < n_middle, scale, softcap, SOFTCAP)
            g = _outside(x, reference, k, rest_weight, one_weight, POWER)
            g *= _slope(x, scale, softcap, SOFTCAP)
            tl.store(grad_middle + o, g.to(out), mask=o < n_middle)
        tl.debug_barrier()  # the special entries come last
        g_k = kd_listed
        if labels_ptr is not None:
            g_k += a * tl.exp(z_k - top - log_one) - tl.where(ids == label, a, 0.0)
            g_y = _outside(z_y, reference, k, rest_weight, one_weight, POWER) - a
            g_y *= _slope(z_y, scale, softcap, SOFTCAP)
            alone = labelled & (tl.max((ids == label).to(tl.int32), 0) == 0)
            tl.store(grad_base + label, g_y.to(out), mask=alone)
        g_k *= _slope(z_k, scale, softcap, SOFTCAP)
        tl.store(grad_base + ids, g_k.to(out), mask=listed)
