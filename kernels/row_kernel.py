"""The row kernel in Triton: both losses and the exact gradient of a row of logits in one program.

It computes what `closed_form.loss_block` defines, in float32, from float32, bfloat16 or float16
logits. It must not allocate, choose defaults or talk to autograd. Shapes: N rows, V vocabulary, K
kept ids a row.

With T teachers a row's ids are the union of those they list. The row is read once for all of them,
and ids that only other teachers list are added to a teacher's own rest from the registers.

One program takes a row, or each of a cluster of C programs takes a part of it. It gathers the k + 1
special logits, reads the row for the log-sum-exp of all *other* ids, forms both losses and the
row's constants, writes `constant · exp(z)`, and finally stores the k + 1 special entries, each
once, from float32. A row is *held* (read once, with its exponentials kept in registers) or
*streamed* (read one block at a time, and again for the gradient: backwards, because its end is
still in the cache). `row_shapes` decides which.

In a cluster the first dimension of all tensors is the program. A program writes the special entries
of its own part after the rest of that part and waits for no other (no Triton barrier spans a
cluster). Every program computes everything about the k ids itself; only two sums and two maxima a
row cross the cluster.

The complement's sum is exact: it is never total minus listed where that cancels. A streamed private
buffer is overwritten anyway, so its listed entries are first set to -inf. Otherwise the sum is
total − listed while the remainder is large enough to be resolved. If it is not, the listed entries
are removed and the row is summed again: for a held row in the registers, for a streamed one in a
copy in the gradient's memory, because a caller's logits must not change.

Memory: rows start anywhere (V = 30,522 is a multiple of 2 only). A row is therefore cut into a
middle that starts and ends on multiples of eight elements, accessed by 128-bit instructions, and at
most fifteen entries at its two edges, which one small vector covers. Row offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from rekindle.kernels.row_divergence import (
    decode_row,
    divergence_of_row,
    max_of_row,
    rest_of_teacher,
    sum_of_row,
    target_of_teacher,
)
from rekindle.kernels.row_sums import (
    exponentials,
    finite_or_zero,
    held_row,
    hide_listed,
    logits_at,
    slope,
    streamed_sums,
    sums_of_others,
    unlisted_gradient,
)
from rekindle.kernels.targets import LOG_OF_ZERO

_LOG2E = tl.constexpr(1.4426950408889634)
_LOG_ZERO = tl.constexpr(LOG_OF_ZERO)
_EDGE = tl.constexpr(16)  # lanes of the edge vector: eight before the middle, eight after it


@triton.jit
def _store_once(pointer, value, cta, CTAS: tl.constexpr):
    """Store a value of the row once, by the first program of a cluster."""
    if CTAS > 1:
        tl.store(pointer + 0 * cta, value, mask=cta == 0)
    else:
        tl.store(pointer, value)


@triton.jit(do_not_specialize=["rows"])
def row_kernel(
    logits_ptr,  # [N,V] float32 | bfloat16 | float16, rows `stride` apart
    grad_ptr,  # the same layout; the same memory if HIDE, or if the logits may be overwritten
    ids_ptr,  # [N,K] integers, -1 = padding; if ENCODED the low 16 bits
    probs_ptr,  # [N,K] floats, [N,T,K] for T > 1 teachers; if ENCODED uint8 values
    tail_ptr,  # [N,T] floats or None; if ENCODED tail_log_odds [N] int16
    labels_ptr,  # [N] integers, or None
    weight_ptr,  # [N]; 0 = row ignored; or None
    high_ptr,  # [N,Q] uint8, with PLANES; or None
    max_ptr, min_ptr,  # log_prob_max and log_prob_min [N] int16 if ENCODED, else None
    bias_ptr,  # [V], added to the logits; or None. With HIDE, rows must start aligned
    counts_ptr,  # [2] float32: 1 / the number of rows of CE, and of D; or None
    upstream_ptr,  # float32, `upstream_stride` (0 or 1) apart; or None
    loss_ptr,  # [N] float32 out, or None
    ce_ptr,  # [N] float32 out: CE times the row's weight
    kd_ptr,  # [N,T] float32 out: D times the row's weight
    rows, stride, V, K, kept, ignore_index, upstream_stride, inverse_tau, scale, softcap,
    resolution,
    log_skew, logit_skew,  # log α and log α/(1−α) of skew_kl
    ce_weight, kd_weights,  # weights in the loss; kd_weights is a tuple [T]
    spread,  # another factor of the gradient
    DIVERGENCE: tl.constexpr, TAIL: tl.constexpr, POWER: tl.constexpr,
    ENCODED: tl.constexpr, PLANES: tl.constexpr, TEACHERS: tl.constexpr,
    SOFTCAP: tl.constexpr, HIDE: tl.constexpr, GRADIENT: tl.constexpr,
    HELD: tl.constexpr, CTAS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the losses of rows and, with GRADIENT, the derivative of their part in the whole
    loss.

    BLOCK entries are read at a time: for a HELD row all of it, by CTAS programs. HIDE is for
    streamed rows only.
    """
    k = inverse_tau * _LOG2E
    out = grad_ptr.dtype.element_ty
    lane = tl.arange(0, _EDGE)
    slot = tl.arange(0, BLOCK_K)
    at = tl.arange(0, BLOCK)
    cta = 0
    if CTAS > 1:
        cta = tl.arange(0, CTAS)[:, None]
        lane = tl.broadcast_to(lane[None, :], [CTAS, _EDGE])
        slot = tl.broadcast_to(slot[None, :], [CTAS, BLOCK_K])
        at = cta * (BLOCK // CTAS) + tl.arange(0, BLOCK // CTAS)[None, :]
    first = tl.program_id(0)
    last = rows
    step = tl.num_programs(0)
    if HELD:  # one row a program, without a loop that would keep values common to rows in registers
        last = first + 1
        step = 1
    for row32 in range(first, last, step):
        row = tl.full([], 0, tl.int64) + row32
        start = row * stride
        middle_start = (start + 7) // 8 * 8
        head = (middle_start - start).to(tl.int32)
        n_middle = tl.maximum(V - head, 0) // 8 * 8
        edge = tl.where(lane < 8, lane, head + n_middle + lane - 8)
        edge_mask = (edge < V) & ((lane < head) | (lane >= 8))
        if CTAS > 1:
            edge_mask = edge_mask & (cta == 0)
        base = logits_ptr + start
        middle = logits_ptr + middle_start
        grad_base = grad_ptr + start
        grad_middle = grad_ptr + middle_start
        blocks = tl.cdiv(n_middle, BLOCK)

        weight = 1.0
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + row).to(tl.float32)
        if weight == 0:
            _store_once(ce_ptr + row, 0.0, cta, CTAS)
            for t in tl.static_range(TEACHERS):
                _store_once(kd_ptr + row * TEACHERS + t, 0.0, cta, CTAS)
            if loss_ptr is not None:
                _store_once(loss_ptr + row, 0.0, cta, CTAS)
            if GRADIENT:
                tl.store(grad_base + edge, tl.zeros_like(edge_mask.to(out)), mask=edge_mask)
                for i in range(0, blocks):
                    o = i * BLOCK + at
                    tl.store(grad_middle + o, tl.zeros_like(o.to(out)), mask=o < n_middle)
        else:
            q_stored = 0.0
            tail_stored = 0.0
            if ENCODED:
                ids, q_stored, tail_stored = decode_row(
                    ids_ptr, probs_ptr, tail_ptr, high_ptr, max_ptr, min_ptr, row, slot, K, kept,
                    inverse_tau, PLANES,
                )  # fmt: skip
            else:
                ids = tl.load(ids_ptr + row * K + slot, mask=slot < K, other=-1)
            is_invalid = max_of_row(((ids < -1) | (ids >= V)).to(tl.int32)) > 0
            listed = (ids >= 0) & (ids < V)
            ids = tl.where(listed, ids, -1).to(tl.int32)
            in_part = listed  # the listed ids in this program's part
            if CTAS > 1:
                offset = ids - head
                inside = (offset >= 0) & (offset < n_middle)
                in_part = listed & (tl.where(inside, offset // (BLOCK // CTAS), 0) == cta)
            z_k = logits_at(base, bias_ptr, ids, listed, scale, softcap, SOFTCAP)
            if labels_ptr is not None:
                label = tl.load(labels_ptr + row).to(tl.int64)
                labelled = label != ignore_index
                is_invalid = is_invalid | (labelled & ((label < 0) | (label >= V)))
                label = tl.where(labelled & (label >= 0) & (label < V), label, 0)
                z_y = logits_at(base, bias_ptr, label, label >= 0, scale, softcap, SOFTCAP)

            if HELD:
                z_part = tl.where(in_part, z_k, float("-inf"))
                peak, s_tau, top, s_one, x, u, e, x_edge, u_edge, e_edge, part_peak = held_row(
                    base, middle, bias_ptr, at, edge, edge_mask, head, n_middle, ids, z_part, cta,
                    k, scale, softcap, resolution, SOFTCAP, POWER, BLOCK, CTAS,
                )  # fmt: skip
            else:
                if HIDE:
                    tl.debug_barrier()  # wait until every thread has its special logits
                    hide_listed(base, ids, listed)
                    tl.debug_barrier()
                peak, s_tau, s_one = streamed_sums(
                    base, middle, bias_ptr, edge, edge_mask, n_middle, k, scale, softcap,
                    SOFTCAP, POWER, BLOCK, STAGES,
                )  # fmt: skip
                top = peak
                if HIDE:
                    top = tl.maximum(peak, tl.max(z_k, 0))
                    s_one = s_one * tl.exp(peak - top) + tl.sum(tl.exp(z_k - top), 0)
                else:
                    others = s_tau - tl.sum(tl.exp2((z_k - top) * k), 0)
                    if others < resolution * s_tau:
                        peak, others = sums_of_others(
                            base, middle, grad_base, grad_middle, edge, edge_mask, n_middle, ids,
                            listed, k, scale, softcap, SOFTCAP, BLOCK, STAGES,
                        )  # fmt: skip
                    s_tau = others
                part_peak = peak

            # From here on peak and s_tau are over the ids that are not listed, and top is the row's
            # maximum. part_peak is the maximum of the program's own part, to which its exponentials
            # are relative.
            empty = peak == float("-inf")
            mass = tl.where(empty, 0.0, s_tau * tl.exp2((peak - top) * k))
            log_norm = tl.log(sum_of_row(tl.exp2((z_k - top) * k)) + mass)
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
            kd_listed = tl.zeros_like(z_k)
            for t in tl.static_range(TEACHERS):
                listed_by_teacher, q, q_rest, has_target = target_of_teacher(
                    probs_ptr, tail_ptr, row * TEACHERS + t, K, slot, listed, q_stored, tail_stored,
                    TAIL, ENCODED, TEACHERS > 1,
                )  # fmt: skip
                log_teacher = log_p
                log_rest = log_p_outside
                if TEACHERS > 1:
                    log_teacher = tl.where(listed_by_teacher, log_p, float("-inf"))
                    log_rest, share_outside, share_listed = rest_of_teacher(
                        log_p, listed & (listed_by_teacher == 0), log_p_outside
                    )
                kd, kd_rest, kd_teacher = divergence_of_row(
                    q, q_rest, log_teacher, log_rest, log_skew, logit_skew, DIVERGENCE
                )
                kd = tl.where(has_target, weight * kd, 0.0)
                _store_once(
                    kd_ptr + row * TEACHERS + t, tl.where(is_invalid, float("nan"), kd), cta, CTAS
                )
                loss += kd_weights[t] * kd
                teacher_b = tl.where(has_target, b * kd_weights[t], 0.0)
                if TEACHERS > 1:
                    kd_teacher += kd_rest * share_listed
                    kd_rest *= share_outside
                kd_listed += teacher_b * kd_teacher
                kd_outside += teacher_b * kd_rest
            ce = 0.0
            if labels_ptr is not None:
                log_one = tl.log(s_one)
                possible = z_y != float("-inf")
                ce = tl.where(possible, top + log_one - z_y, -_LOG_ZERO)
                ce = tl.where(labelled, weight * ce, 0.0)
                loss += ce_weight * ce
                labelled = labelled & possible
            _store_once(ce_ptr + row, tl.where(is_invalid, float("nan"), ce), cta, CTAS)
            if loss_ptr is not None:
                _store_once(loss_ptr + row, tl.where(is_invalid, float("nan"), loss), cta, CTAS)

            if GRADIENT:
                reference = finite_or_zero(part_peak)
                rest_weight = kd_outside / tl.where(empty, 1.0, s_tau)
                one_weight = 0.0
                if CTAS > 1:  # the exponentials are relative to the part's own maximum
                    rest_weight *= tl.exp2((reference - finite_or_zero(peak)) * k)
                if labels_ptr is not None:
                    a = tl.where(labelled, factor * ce_weight, 0.0)
                    if counts_ptr is not None:
                        a *= tl.load(counts_ptr)
                    one_weight = a * tl.exp(reference - top - log_one)
                # an empty part has no share whatever exp returned: infinity · 0 is NaN
                rest_weight = tl.where(part_peak == float("-inf"), 0.0, rest_weight)
                one_weight = tl.where(part_peak == float("-inf"), 0.0, one_weight)
                if HELD:
                    g = unlisted_gradient(u, e, rest_weight, one_weight, POWER) * slope(
                        x, scale, softcap, SOFTCAP
                    )
                    tl.store(grad_middle + at, g.to(out), mask=at < n_middle)
                else:
                    x_edge = logits_at(base, bias_ptr, edge, edge_mask, scale, softcap, SOFTCAP)
                    u_edge, e_edge = exponentials(x_edge, reference, k, POWER)
                    for i in tl.range(0, blocks, num_stages=STAGES):
                        o = (blocks - 1 - i) * BLOCK + at
                        x = logits_at(
                            middle,
                            bias_ptr,
                            o,
                            o < n_middle,
                            scale,
                            softcap,
                            SOFTCAP,
                            "evict_first",
                        )
                        u, e = exponentials(x, reference, k, POWER)
                        g = unlisted_gradient(u, e, rest_weight, one_weight, POWER)
                        g *= slope(x, scale, softcap, SOFTCAP)
                        tl.store(grad_middle + o, g.to(out), mask=o < n_middle)
                g = unlisted_gradient(u_edge, e_edge, rest_weight, one_weight, POWER)
                g *= slope(x_edge, scale, softcap, SOFTCAP)
                tl.store(grad_base + edge, g.to(out), mask=edge_mask)
                tl.debug_barrier()  # the special entries are written last
                g_k = kd_listed
                if labels_ptr is not None:
                    g_k += a * tl.exp(z_k - top - log_one) - tl.where(ids == label, a, 0.0)
                    u, e = exponentials(z_y, reference, k, POWER)
                    g_y = unlisted_gradient(u, e, rest_weight, one_weight, POWER) - a
                    g_y *= slope(z_y, scale, softcap, SOFTCAP)
                    # labelled and not listed; compared as integers because Triton 3.9's interpreter
                    # cannot make a mask from a scalar bool and a tensor of bools
                    is_listed_label = max_of_row((ids == label).to(tl.int32))
                    is_unlisted_label = labelled.to(tl.int32) > is_listed_label
                    if CTAS > 1:
                        offset = label - head
                        inside = (offset >= 0) & (offset < n_middle)
                        owner = tl.where(inside, offset // (BLOCK // CTAS), 0)
                        is_unlisted_label = is_unlisted_label & (owner == cta)
                    tl.store(grad_base + label + 0 * cta, g_y.to(out), mask=is_unlisted_label)
                g_k *= slope(z_k, scale, softcap, SOFTCAP)
                tl.store(grad_base + ids, g_k.to(out), mask=in_part)
