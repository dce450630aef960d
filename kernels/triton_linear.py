"""The Triton path of a linear head: library products around the row kernel, in few large blocks.

Nothing here waits for the device, except to count the rows of weight ≠ 0 where row weights are
given, and nothing talks to autograd. Shapes: N rows, H hidden, V vocabulary, K kept ids, C block
rows.
"""

import math

import torch
from torch import Tensor

from rekindle.kernels.blocks import Gradients, HeadGradients, row_blocks, rows_apart
from rekindle.kernels.call import Call
from rekindle.kernels.closed_form import BlockLosses, Coefficients
from rekindle.kernels.targets import SparseTargets
from rekindle.kernels.triton_rows import losses_of_rows


def linear_fused(call: Call, factors: Coefficients | None) -> tuple[BlockLosses, Gradients]:
    """As `torch_blocks.linear_blockwise`; products and logits are in the call's `product_dtype`.

    dW is summed in float32 over the blocks and stored in the weight's dtype.
    """
    (hidden, weight, bias), targets = call.student, call.targets
    product_dtype = call.computation.product_dtype
    assert weight is not None
    assert product_dtype is not None
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
    gradients = HeadGradients(x, w, call.computation.wanted, torch.float32)
    ce, kd = (torch.zeros(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
    stride = -(-len(w) // 64) * 64  # products want rows that start on 128 bytes
    blocks = row_blocks(len(x), stride, x.element_size(), x.device)
    buffer = rows_apart(x, blocks[0].stop if blocks else 0, len(w), stride)
    for block in blocks:
        z = buffer[: block.stop - block.start]
        if b is None:
            torch.mm(x[block], w.t(), out=z)
        else:
            torch.addmm(b, x[block], w.t(), out=z)
        own = None if lifted is None else lifted.take(block)
        ce[block], kd[block] = losses_of_rows(z, z, kept.take(block), call.settings, own)
        gradients.add(z, block)
    if lift != 1.0:
        for gradient in (gradients.dx, gradients.dw, gradients.db):
            if gradient is not None:
                gradient.mul_(1.0 / lift)
    if rows is not None:
        ce, kd = (v.new_zeros(len(hidden)).index_copy_(0, rows, v) for v in (ce, kd))
    return BlockLosses(ce, kd), gradients.like(hidden, weight, bias, rows)


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
