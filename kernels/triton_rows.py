"""Launch the row kernel and the small kernels around it: memory and compile-time switches.

Shapes: N rows, V vocabulary, K kept ids a row.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rekindle.kernels.closed_form import logit
from rekindle.kernels.divergences import DIVERGENCES
from rekindle.kernels.row_kernel import row_kernel
from rekindle.kernels.row_shapes import COMPILED, machine_of, shape_of
from rekindle.kernels.targets import TAILS, KernelTargets, LossSettings


class RowKernel:
    """The launches of one call: count its rows, run them in blocks, and sum their losses.

    Targets of the R rows are decoded or, for one teacher, encoded. With `gradient` a block's
    gradient is formed: that of the whole loss times `lift` and, row by row, `upstream` ([R], or one
    for all).
    """

    def __init__(
        self,
        targets: KernelTargets,
        settings: LossSettings,
        gradient: bool,
        upstream: Tensor | None = None,
        lift: float = 1.0,
    ):
        self.targets = KernelTargets(*(None if t is None else t.contiguous() for t in targets))  # type: ignore[arg-type]
        self.settings, self.gradient = settings, gradient
        self.rows, self.kept = targets.ids.shape
        self.factors = tuple(settings.kd_factors)
        self.mean = 1.0
        self.counts: Tensor | None = None
        if settings.reduction == "mean":
            self._count()
        new = targets.ids.new_empty
        per_row = settings.reduction == "none"
        self.loss = new(self.rows, dtype=torch.float32) if per_row else None
        self.ce = new(self.rows, dtype=torch.float32)
        several = (len(self.factors),) if len(self.factors) > 1 else ()
        self.kd = new((self.rows, *several), dtype=torch.float32)
        self.upstream = None if upstream is None else upstream.contiguous()
        self.spread = self.mean * lift

    def _count(self) -> None:
        """Set 1 / the number of rows that count, on the device if labels or weights must
        be read.
        """
        labels, weight = self.targets.labels, self.targets.weight
        if (labels is None and weight is None) or not self.rows:
            self.mean = 1.0 / max(self.rows, 1)
            return
        counts = self.counts = self.targets.ids.new_empty(2, dtype=torch.float32)
        rows, ignored = self.rows, self.settings.ignore_index
        _launch(_count_kernel, 1, counts, labels, weight, rows, ignored, BLOCK=_ROWS)

    def run(
        self, logits: Tensor, gradient: Tensor, rows: slice, bias: Tensor | None = None
    ) -> None:
        """Compute the losses of a block of rows from logits [C,V].

        `gradient` has the logits' dtype and strides; the last stride is 1. For a private buffer it
        is the logits' own memory: its rows start on 16 bytes, and its bias [V] is not added yet.
        Otherwise it serves as scratch, even if no gradient is formed, and is then left undefined.
        Rows of weight 0 are not read and get a gradient of zero. A row with an id or label outside
        [0, V) gets losses of NaN, because raising an error would mean waiting for the device.
        """
        count, vocabulary = logits.shape
        if count == 0:
            return
        settings, targets, upstream = self.settings, self.targets, self.upstream
        loss, ce, kd = self.loss, self.ce, self.kd
        if count < self.rows:
            targets, ce, kd = targets.take(rows), ce[rows], kd[rows]
            loss = None if loss is None else loss[rows]
            upstream = upstream[rows] if upstream is not None and upstream.dim() else upstream
        block_k = _next_power_of_two(self.kept)
        tau, labelled = settings.temperature, targets.labels is not None
        # the smallest remaining share of a row for which total − listed is as precise as a stored
        # gradient
        resolution = 2.0**-3 if logits.dtype == torch.float32 else 2.0**-9
        power = _POWERS.get(tau, 0) if labelled or tau == 1.0 else -1
        floats = 1 + (power == 0) + (settings.softcap is not None)
        machine = machine_of(logits.device)
        shape = shape_of(vocabulary, logits.itemsize, block_k, floats, machine)
        _launch(
            row_kernel, min(count, shape.programs or count), logits, gradient, *targets, bias,
            self.counts, upstream, loss, ce, kd, count, logits.stride(0), vocabulary,
            self.kept, settings.kept,
            settings.ignore_index, 0 if upstream is None else upstream.dim(), 1.0 / tau,
            float(settings.logit_scale), float(settings.softcap or 0.0), resolution,
            math.log(settings.skew), logit(settings.skew), float(settings.ce_weight),
            self.factors, self.spread,
            DIVERGENCE=DIVERGENCES.index(settings.divergence), TAIL=TAILS.index(settings.tail),
            POWER=power,
            ENCODED=targets.probs.dtype == torch.uint8, PLANES=settings.planes,
            TEACHERS=len(self.factors), SOFTCAP=settings.softcap is not None,
            HIDE=gradient is logits and not shape.held, GRADIENT=self.gradient,
            BLOCK_K=block_k, **shape.constants,
        )  # fmt: skip

    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss, ce, kd) over all rows: [R] for "none", else their sum or mean; kd is [T] or
        [R,T] for several teachers.
        """
        if self.loss is not None:
            return self.loss, self.ce, self.kd
        new, shape = self.ce.new_empty, self.kd.shape[1:]
        sums = new(()), new(()), new(shape)
        _launch(
            *(_sum_kernel, 1, self.ce, self.kd, self.counts, *sums),
            *(self.rows, self.mean, float(self.settings.ce_weight), self.factors),
            TEACHERS=len(self.factors),
            BLOCK=_ROWS,
        )
        return sums


_ROWS = 2048  # rows per step of the kernels that one program runs over all rows
_POWERS = {1.0: 1, 2.0: 2, 4.0: 4}  # POWER by temperature


def _next_power_of_two(count: int) -> int:
    """Return the next power of two."""
    return 1 << max(0, count - 1).bit_length()


def _launch(
    kernel: Any, programs: int, first: Tensor, *arguments: object, **constants: object
) -> None:
    """Run a kernel on the device of its first argument; a launch goes to the current device."""
    index = first.device.index
    if index is None or index == torch.cuda.current_device():
        kernel[(programs,)](first, *arguments, **constants, **COMPILED)
        return
    with torch.cuda.device(index):
        kernel[(programs,)](first, *arguments, **constants, **COMPILED)


@triton.jit
def _count_kernel(  # type: ignore[no-untyped-def]
    counts_ptr, labels_ptr, weight_ptr, n, ignore_index, BLOCK: tl.constexpr
):
    """Store 1 / the number of rows [n] whose label counts, and of weight ≠ 0; at most 1."""
    labelled = tl.zeros([BLOCK], tl.int32)
    active = tl.zeros([BLOCK], tl.int32)
    for i in range(0, tl.cdiv(n, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        counts = o < n
        if weight_ptr is not None:
            counts = counts & (tl.load(weight_ptr + o, mask=o < n, other=0.0).to(tl.float32) != 0)
        active += counts.to(tl.int32)
        if labels_ptr is not None:
            label = tl.load(labels_ptr + o, mask=counts, other=0).to(tl.int64)
            labelled += (counts & (label != ignore_index)).to(tl.int32)
    tl.store(counts_ptr, 1.0 / tl.maximum(tl.sum(labelled, 0), 1).to(tl.float32))
    tl.store(counts_ptr + 1, 1.0 / tl.maximum(tl.sum(active, 0), 1).to(tl.float32))


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    ce_ptr, kd_ptr, counts_ptr, loss_ptr, ce_sum_ptr, kd_sum_ptr, n, mean, ce_weight, kd_weights,
    TEACHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum CE [n] and each teacher's D [n,T], divide by their counts, and store them and
    the loss.
    """
    loss = 0.0
    for t in tl.static_range(TEACHERS + 1):
        total = tl.zeros([BLOCK], tl.float32)
        for i in range(0, tl.cdiv(n, BLOCK)):
            o = i * BLOCK + tl.arange(0, BLOCK)
            source = ce_ptr + o
            if t < TEACHERS:
                source = kd_ptr + o * TEACHERS + t
            total += tl.load(source, mask=o < n, other=0.0)
        value = tl.sum(total, 0) * mean
        if t < TEACHERS:
            if counts_ptr is not None:
                value *= tl.load(counts_ptr + 1)
            tl.store(kd_sum_ptr + t, value)
            loss += kd_weights[t] * value
        else:
            if counts_ptr is not None:
                value *= tl.load(counts_ptr)
            tl.store(ce_sum_ptr, value)
            loss += ce_weight * value
    tl.store(loss_ptr, loss)


@triton.jit
def _scale_kernel(values_ptr, factor_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply values [n] by factor [] in place, without touching them if the factor is 1.

    In float64 for float64 values, else in float32; whether the factor is 1 is asked in its own
    type.
    """
    factor = tl.load(factor_ptr)
    if factor == 1.0:
        return
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values_ptr + o, mask=o < n)
    if values_ptr.dtype.element_ty == tl.float64:
        x *= factor.to(tl.float64)
    else:
        x = x.to(tl.float32) * factor.to(tl.float32)
    tl.store(values_ptr + o, x.to(values_ptr.dtype.element_ty), mask=o < n)


def scale_unless_one(values: Tensor, factor: Tensor) -> None:
    """Multiply values by a scalar on the device in place; if it is 1, memory is not touched."""
    if not values.is_contiguous():
        values.mul_(factor)
    elif values.numel():
        count, block = values.numel(), 4096
        _launch(_scale_kernel, -(-count // block), values, factor, count, BLOCK=block)
