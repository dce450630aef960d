"""Launch the row kernel: memory, tile sizes and compile-time switches; and scale a gradient.

Shapes: N rows, V vocabulary, K kept ids a row.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rekindle.kernels.closed_form import BlockLosses, Coefficients, logit
from rekindle.kernels.divergences import DIVERGENCES
from rekindle.kernels.row_kernel import row_kernel
from rekindle.kernels.targets import TAILS, LossSettings, SparseTargets

# How every kernel is compiled, said at each launch: a·b + c may become one instruction that rounds
# once. Triton does so unasked up to 3.9 and no longer from 3.10 (triton-lang/triton#11270). The row
# kernel wants it for its speed: without, it has 1 to 10 % more instructions and up to 16 more
# registers a thread. Its accuracy needs neither: the interpreter, which fuses nothing, is held to
# the same bounds as a GPU. Said or not, which pairs are fused is the compiler's choice: losses and
# gradients are equal to the bit on one version of Triton and one GPU, not from one to another.
COMPILED = {"enable_fp_fusion": True}


def losses_of_rows(
    logits: Tensor,
    gradient: Tensor,
    targets: SparseTargets,
    settings: LossSettings,
    factors: Coefficients | None,
) -> BlockLosses:
    """Per-row CE and D [N] of logits [N,V], and in `gradient` the derivative of Σ factors·losses.

    `gradient` has the logits' dtype and strides, the last of which is 1. It is the logits' own
    memory for a private buffer; else it serves as scratch, even without factors. Rows of weight 0
    are not read and get a zero gradient; without factors `gradient` is left undefined. A row with
    an id or label outside [0, V) has losses of NaN: a device is not waited for to raise an error.
    """
    rows, vocabulary = logits.shape
    ce, kd = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows == 0:
        return BlockLosses(ce, kd)
    # the least share of a row that total − listed resolves as well as the gradient is stored
    resolution = 2.0**-3 if logits.dtype == torch.float32 else 2.0**-9
    weights = (None, None) if factors is None else factors
    block_k = triton.next_power_of_2(max(1, targets.ids.shape[1]))
    _launch(
        row_kernel,
        rows,
        logits,
        gradient,
        # ids, probs, tail, labels, weight, high; then what CE and D are multiplied by
        *(None if t is None else t.contiguous() for t in (*targets, *weights)),
        ce,
        kd,
        logits.stride(0),
        vocabulary,
        targets.ids.shape[1],
        settings.kept,
        settings.ignore_index,
        1.0 / settings.temperature,
        float(settings.logit_scale),
        0.0 if settings.softcap is None else float(settings.softcap),
        resolution,
        math.log(settings.skew),
        logit(settings.skew),
        **_constants(targets, settings, gradient is logits, factors is not None),
        **_tile(vocabulary, block_k),
        BLOCK_K=block_k,
    )
    return BlockLosses(ce, kd)


def _constants(
    targets: SparseTargets, settings: LossSettings, hide: bool, gradient: bool
) -> dict[str, int | bool]:
    """The kernel's compile-time switches."""
    tau, has_labels = settings.temperature, targets.labels is not None
    power = {1.0: 1, 2.0: 2, 4.0: 4}.get(tau, 0)
    return {
        "DIVERGENCE": DIVERGENCES.index(settings.divergence),
        "TAIL": TAILS.index(settings.tail),
        "ENCODED": targets.probs.dtype == torch.uint8,
        "PLANES": settings.planes,
        "POWER": power if has_labels or tau == 1.0 else -1,
        "HAS_TAIL": targets.tail is not None,
        "HAS_LABELS": has_labels,
        "HAS_WEIGHT": targets.weight is not None,
        "SOFTCAP": settings.softcap is not None,
        "HIDE": hide,
        "GRADIENT": gradient,
    }


def _tile(vocabulary: int, block_k: int) -> dict[str, int]:
    """Entries a step, warps and registers: a table, as what writes in place cannot be autotuned.

    The register limits are where the compiler spills nothing; without one it aims for more programs
    a processor and spills a few row constants.
    """
    if vocabulary >= 100_000:
        # few rows in flight, so that their second reading finds them in the L2
        tile = {"BLOCK": 16384, "num_warps": 16, "maxnreg": 128}
    else:
        block = min(4096, max(256, triton.next_power_of_2(vocabulary)))
        tile = {"BLOCK": block, "num_warps": max(1, block // 512), "maxnreg": 64}
    if block_k > 512:
        tile["maxnreg"] = 65536 // (32 * tile["num_warps"]) if tile["num_warps"] > 8 else 255
    return tile


def _launch(
    kernel: Any, programs: int, first: Tensor, *arguments: object, **constants: object
) -> None:
    """Run a kernel on the device of its first argument: a launch goes to the current one."""
    with torch.cuda.device_of(first):
        kernel[(programs,)](first, *arguments, **constants, **COMPILED)


@triton.jit
def _scale_kernel(values_ptr, factor_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values [n] *= factor [], without touching them if the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values_ptr + o, mask=o < n).to(tl.float32) * factor
    tl.store(values_ptr + o, x.to(values_ptr.dtype.element_ty), mask=o < n)


def scale_unless_one(values: Tensor, factor: Tensor) -> None:
    """In place values · factor, a scalar on the device; if it is 1, memory is not touched."""
    if not values.is_contiguous():
        values.mul_(factor)
    elif values.numel():
        count, block = values.numel(), 4096
        _launch(_scale_kernel, triton.cdiv(count, block), values, factor, count, BLOCK=block)
