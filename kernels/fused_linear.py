"""The Triton path of a linear head: library products around the row kernel, in few large blocks.

Nothing here waits for the device, except to count the rows of weight ≠ 0 where row weights are
given, and nothing talks to autograd. Shapes: N rows, H hidden, V vocabulary, K kept ids, C block
rows.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rekindle.kernels.chunked import Gradients, product_, row_blocks
from rekindle.kernels.closed_form import BlockLosses, Coefficients
from rekindle.kernels.fused import losses_of_rows
from rekindle.kernels.targets import LossSettings, SparseTargets


def linear_fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: SparseTargets,
    settings: LossSettings,
    factors: Coefficients | None,
    wanted: Sequence[bool],
    product_dtype: torch.dtype,
) -> tuple[BlockLosses, Gradients]:
    """As `chunked.linear_blockwise`; products and the logits buffer are in `product_dtype`.

    dW is summed in float32 over the blocks and stored in the weight's dtype.
    """
    rows = _rows_to_keep(targets)
    x = (hidden if rows is None else hidden[rows]).to(product_dtype)
    kept = targets if rows is None else targets.take(rows)._replace(weight=None)
    if rows is None and targets.weight is not None:
        x = x.masked_fill(~targets.active()[:, None], 0.0)  # 0 · NaN would reach dW
    if rows is not None and factors is not None:
        factors = factors.take(rows)
    w = weight.to(product_dtype)
    b = None if bias is None else bias.to(product_dtype)
    lift = _lift(len(x), product_dtype)
    lifted = None if factors is None else Coefficients(*(f * lift for f in factors))
    wanted = (False, False, False) if factors is None else wanted
    dx = torch.empty_like(x) if wanted[0] else None
    dw = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if wanted[1] else None
    db = torch.zeros(len(w), dtype=torch.float32, device=w.device) if wanted[2] else None
    ce, kd = (torch.zeros(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
    stride = -(-len(w) // 64) * 64  # products want rows that start on 128 bytes
    blocks = row_blocks(len(x), stride, x.element_size(), x.device)
    buffer = x.new_empty(blocks[0].stop if blocks else 0, stride)
    for block in blocks:
        z = buffer[: block.stop - block.start, : len(w)]
        if b is None:
            torch.mm(x[block], w.t(), out=z)
        else:
            torch.addmm(b, x[block], w.t(), out=z)
        own = None if lifted is None else lifted.take(block)
        ce[block], kd[block] = losses_of_rows(z, z, kept.take(block), settings, own)
        if dx is not None:
            torch.mm(z, w, out=dx[block])
        if dw is not None:
            product_(dw, z.t(), x[block], plus=True)
        if db is not None:
            db += z.sum(0, dtype=torch.float32)
    if lift != 1.0:
        for gradient in (dx, dw, db):
            if gradient is not None:
                gradient.mul_(1.0 / lift)
    if rows is not None:
        ce, kd = (
            torch.zeros_like(hidden[:, 0], dtype=ce.dtype).index_copy_(0, rows, v) for v in (ce, kd)
        )
        if dx is not None:
            dx = torch.zeros_like(hidden).index_copy_(0, rows, dx.to(hidden.dtype))
    return BlockLosses(ce, kd), (
        None if dx is None else dx.to(hidden.dtype),
        None if dw is None else dw.to(weight.dtype),
        None if db is None or bias is None else db.to(bias.dtype),
    )


def _rows_to_keep(targets: SparseTargets) -> Tensor | None:
    """Indices of the rows of weight ≠ 0; None to keep all: no weights, or no time to ask.

    Dropping rows saves the same share of the products, at the price of waiting once for their
    number; while a graph is captured one cannot wait, and the kernel skips those rows itself.
    """
    if targets.weight is None:
        return None
    if targets.weight.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    return targets.active().nonzero()[:, 0]


def _lift(rows: int, dtype: torch.dtype) -> float:
    """A power of two near the row count, so that gradients of a mean stay normal in float16."""
    return 2.0 ** math.ceil(math.log2(max(rows, 1))) if dtype == torch.float16 else 1.0
