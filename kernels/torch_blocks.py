"""The PyTorch path: losses and gradients in row blocks of bounded size, formed in one go.

The gradient is formed while a block's logits exist, so that [N,V] never does for a linear head.
Rows without loss are dropped before the first product. Nothing here talks to autograd. Shapes: N
rows, H hidden, V vocabulary, K kept ids, C block rows.
"""

import torch
from torch import Tensor

from rekindle.kernels.blocks import Gradients, HeadGradients, product_, row_blocks
from rekindle.kernels.call import Call
from rekindle.kernels.closed_form import BlockLosses, Coefficients, block_buffers, loss_block
from rekindle.kernels.hidden import TeacherBlocks
from rekindle.kernels.targets import LossSettings, SparseTargets
from rekindle.kernels.whole_vocabulary import whole_buffers, whole_loss_block


def logits_blockwise(call: Call, factors: Coefficients | None) -> tuple[BlockLosses, Tensor | None]:
    """Unweighted losses [N] of logits [N,V], and the derivative of Σ factors·losses."""
    logits, dtype = call.student.inputs, call.student.compute_dtype
    rows, teacher = _rows_with_loss(call), _teacher(call, dtype)
    kept = call.targets.take(rows)
    ce, kd = (torch.zeros(len(logits), dtype=dtype, device=logits.device) for _ in range(2))
    gradient = None if factors is None else torch.zeros_like(logits)
    for block in _blocks(call, len(rows)):
        here = rows[block]
        z = logits[here].to(dtype)  # indexing copies
        own = None if factors is None else factors.take(here)
        ce[here], kd[here] = _losses(z, here, kept.take(block), call.settings, own, teacher)
        if gradient is not None:
            gradient[here] = z.to(logits.dtype)
    return BlockLosses(ce, kd), gradient


def linear_blockwise(call: Call, factors: Coefficients | None) -> tuple[BlockLosses, Gradients]:
    """Unweighted losses [N] of hidden @ weight.T + bias, and the derivatives of Σ factors·losses.

    Gradients with respect to hidden, weight and bias where they are wanted, which needs factors, in
    their dtypes. The products' factors are rounded to the call's `product_dtype`, if it has one;
    logits and dW are not.
    """
    hidden, weight, bias = call.student
    assert weight is not None
    dtype = call.student.compute_dtype
    product_dtype = call.computation.product_dtype or dtype
    rows, teacher = _rows_with_loss(call), _teacher(call, product_dtype)
    kept = call.targets.take(rows)
    x, w = hidden[rows].to(product_dtype), weight.to(product_dtype)
    b = None if bias is None else bias.to(dtype)
    gradients = HeadGradients(x, w, call.computation.wanted, dtype)
    ce, kd = (torch.zeros(len(hidden), dtype=dtype, device=x.device) for _ in range(2))
    blocks = _blocks(call, len(rows))
    logits = torch.empty(blocks[0].stop if blocks else 0, len(w), dtype=dtype, device=x.device)
    for block in blocks:
        z, here = logits[: block.stop - block.start], rows[block]
        product_(z, x[block], w.t())
        if b is not None:
            z.add_(b)
        own = None if factors is None else factors.take(here)
        ce[here], kd[here] = _losses(z, here, kept.take(block), call.settings, own, teacher)
        gradients.add(z, block)
    return BlockLosses(ce, kd), gradients.like(hidden, weight, bias, rows)


def _teacher(call: Call, product_dtype: torch.dtype) -> TeacherBlocks | None:
    """The teacher of whom every probability is known; None where the targets are sparse."""
    if call.teacher.states is None:
        return None
    return TeacherBlocks(call.teacher, call.student.compute_dtype, product_dtype)


def _losses(
    z: Tensor,
    rows: Tensor,
    kept: SparseTargets,
    settings: LossSettings,
    factors: Coefficients | None,
    teacher: TeacherBlocks | None,
) -> BlockLosses:
    """Losses of one block's raw logits z [C,V], which become their gradient."""
    if teacher is None:
        return loss_block(z, kept, settings, factors)
    log_q = teacher.log_probs(rows, settings.temperature)
    return whole_loss_block(z, log_q, kept.labels, settings, factors)


def _rows_with_loss(call: Call) -> Tensor:
    """Indices of the rows that weigh something and have a label or a target."""
    targets = call.targets
    if call.teacher.states is None:
        useful = targets.labelled(call.settings.ignore_index) | (targets.ids >= 0).any(1)
        return (targets.active() & useful).nonzero()[:, 0]
    if targets.weight is None:
        return torch.arange(len(targets.ids), device=targets.ids.device)  # without waiting for it
    return targets.active().nonzero()[:, 0]


def _blocks(call: Call, rows: int) -> list[slice]:
    """Consecutive slices of `rows`, sized for what a block of their logits takes."""
    student = call.student
    count = block_buffers if call.teacher.states is None else whole_buffers
    buffers = count(call.settings, call.targets.labels is not None)
    size = buffers * student.compute_dtype.itemsize
    return row_blocks(rows, student.vocabulary, size, student.inputs.device)
