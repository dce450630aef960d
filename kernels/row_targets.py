"""A row's targets in Triton: decoded, and as each teacher's outcomes; what `targets` defines.

Tensors over ids are [K], or [C,K] where each of a cluster's C programs holds them all.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from rekindle.kernels.encoded import NO_TAIL, STEP
from rekindle.kernels.row_divergence import max_of_row, sum_of_row

_LOG2E = tl.constexpr(1.4426950408889634)
_STEP = tl.constexpr(STEP)
_NO_TAIL = tl.constexpr(NO_TAIL)


@triton.jit
def decoded(
    ids_ptr, values_ptr, side_ptr, high_ptr, row, lane, K, kept, inverse_tau,
    PLANES: tl.constexpr,
):  # fmt: skip
    """Ids (-1 past `kept`), their probabilities and the tail mass: `encoded.decode` of one row."""
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
    q = share * (mass / sum_of_row(share))
    tail += sum_of_row(tl.where(lane >= kept, q, 0.0))
    listed = stored & (lane < kept)
    return tl.where(listed, ids, -1), tl.where(listed, q, 0.0), tail


@triton.jit
def target_of_teacher(
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
    total = sum_of_row(q)
    has_target = max_of_row(listed.to(tl.int32)) > 0
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
