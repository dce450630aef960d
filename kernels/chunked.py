"""The PyTorch path of `linear_kd_loss`: head, loss and gradient in blocks of bounded size.

The gradient is formed in the forward pass, while a block's logits exist, so [N,V] never does.
Rows without loss are dropped before the first product. Shapes: N rows, H hidden, V vocabulary, K
kept ids, C block rows.
"""

from typing import Any

import torch
from torch import Tensor

from rekindle.kernels.closed_form import BlockLosses, Coefficients, block_buffers, loss_block
from rekindle.kernels.targets import Objective, SparseTargets, loss_scales

# Bytes of all [C,V] buffers of a call together. CPU: larger blocks gain nothing (see
# tests/benchmarks/LOG.md); CUDA: under about 2,000 rows a block, reading and writing dW costs
# more than the products.
BLOCK_BYTES = {"cpu": 256 * 2**20}
BLOCK_BYTES_ACCELERATOR = 2 * 2**30

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def linear_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: SparseTargets,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kd) of logits = hidden @ weight.T + bias; scalars, or [N] for "none"."""
    if not torch.is_grad_enabled():  # autograd.Function cannot see it from inside
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    return _LinearKD.apply(hidden, weight, bias, targets, objective)


def block_rows(rows: int, vocabulary: int, bytes_per_row_entry: int, budget: int) -> int:
    """Rows of a block: as many equal blocks as the budget asks for, at least one row each."""
    largest = max(1, budget // max(1, vocabulary * bytes_per_row_entry))
    blocks = max(1, -(-rows // largest))
    return max(1, -(-rows // blocks))


class _LinearKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: SparseTargets,
        objective: Objective,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        # per-row upstream gradients are unknown yet: "none" forms its gradient in backward
        now = (False, False, False) if objective.reduction == "none" else wanted
        dtype = compute_dtype(hidden, weight)
        ce_scale, kd_scale = loss_scales(targets, objective, dtype)
        losses, gradients = _blockwise(
            hidden, weight, bias, targets, objective, Coefficients(ce_scale, kd_scale), now
        )
        ce, kd = losses.ce * ce_scale, losses.kd * kd_scale
        if objective.reduction != "none":
            ce, kd = ce.sum(), kd.sum()
        loss = objective.ce_weight * ce + objective.kd_weight * objective.temperature**2 * kd
        ctx.save_for_backward(hidden, weight, bias)
        ctx.targets, ctx.objective, ctx.wanted = targets, objective, wanted
        ctx.gradients = gradients if any(now) else None
        ctx.mark_non_differentiable(ce, kd)
        return loss, ce, kd

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # The stored gradients are handed over, not copied: autograd may make them a parameter's
        # .grad and add to them in place. A second backward through the same graph therefore
        # computes them anew.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            if upstream[0] != 1.0:
                gradients = tuple(None if g is None else g.mul_(upstream[0]) for g in gradients)
            return (*gradients, None, None)
        hidden, weight, bias = ctx.saved_tensors
        ce_scale, kd_scale = loss_scales(ctx.targets, ctx.objective, upstream[0].dtype)
        scaled = Coefficients(ce_scale * upstream[0], kd_scale * upstream[0])
        _, gradients = _blockwise(
            hidden, weight, bias, ctx.targets, ctx.objective, scaled, ctx.wanted
        )
        return (*gradients, None, None)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: sixteen-bit inputs are computed in float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@torch.no_grad()
def _blockwise(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: SparseTargets,
    objective: Objective,
    scales: Coefficients,
    wanted: tuple[bool, bool, bool],
) -> tuple[BlockLosses, Gradients]:
    """Losses [N] of all rows, unweighted, and the gradients asked for, in the inputs' dtypes.

    `scales` are the factors of the reported ce and kd; the objective's weights are applied here.
    """
    dtype = compute_dtype(hidden, weight)
    rows = _rows_with_loss(targets, objective)
    kept = targets.take(rows)
    ce_of = (scales.ce * objective.ce_weight)[rows]
    kd_of = (scales.kd * (objective.kd_weight * objective.temperature**2))[rows]
    x, w = hidden[rows].to(dtype), weight.to(dtype)
    b = None if bias is None else bias.to(dtype)
    dx = torch.empty_like(x) if wanted[0] else None
    dw = w.new_empty(w.shape) if wanted[1] else None
    db = torch.zeros_like(b) if wanted[2] and b is not None else None
    ce, kd = x.new_zeros(hidden.shape[0]), x.new_zeros(hidden.shape[0])
    step = _step(rows.numel(), weight.shape[0], x, kept, objective)
    logits = x.new_empty(step, weight.shape[0])
    for start in range(0, rows.numel(), step):
        block = slice(start, min(start + step, rows.numel()))
        z = logits[: block.stop - start]
        torch.mm(x[block], w.t(), out=z)
        if b is not None:
            z.add_(b)
        coefficients = Coefficients(ce_of[block], kd_of[block]) if any(wanted) else None
        losses = loss_block(z, kept.take(block), objective, coefficients)
        ce[rows[block]], kd[rows[block]] = losses
        if dx is not None:
            torch.mm(z, w, out=dx[block])
        if dw is not None:
            # beta 0 overwrites what the fresh memory holds, which saves one pass over [V,H]
            dw.addmm_(z.t(), x[block], beta=0 if start == 0 else 1)
        if db is not None:
            db.add_(z.sum(0))
    if dw is not None and rows.numel() == 0:
        dw.zero_()
    if dx is not None:
        dx = torch.zeros_like(hidden).index_copy_(0, rows, dx.to(hidden.dtype))
    return BlockLosses(ce, kd), (
        dx,
        None if dw is None else dw.to(weight.dtype),
        None if db is None or bias is None else db.to(bias.dtype),
    )


def _rows_with_loss(targets: SparseTargets, objective: Objective) -> Tensor:
    """Indices of the rows that weigh something and have a label or a target."""
    useful = targets.labelled(objective.ignore_index) | (targets.ids >= 0).any(1)
    return (targets.active() & useful).nonzero()[:, 0]


def _step(
    rows: int, vocabulary: int, x: Tensor, targets: SparseTargets, objective: Objective
) -> int:
    buffers = block_buffers(objective, targets.labels is not None)
    budget = BLOCK_BYTES.get(x.device.type, BLOCK_BYTES_ACCELERATOR)
    return block_rows(rows, vocabulary, buffers * x.element_size(), budget)
