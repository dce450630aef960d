"""The PyTorch path: losses and gradients in row blocks of bounded size, formed in one go.

The gradient is formed while a block's logits exist, so that [N,V] never does for a linear head.
Rows without loss are dropped before the first product. Nothing here talks to autograd. Shapes: N
rows, H hidden, V vocabulary, K kept ids, C block rows.
"""

import torch
from torch import Tensor

from rekindle.kernels.closed_form import BlockLosses, Coefficients, block_buffers, loss_block
from rekindle.kernels.targets import Objective, SparseTargets

# Bytes of all [C,V] buffers of a call together. On a GPU few rows a block would make reading and
# writing dW dearer than the products.
BLOCK_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def block_rows(rows: int, vocabulary: int, bytes_per_entry: int, budget: int) -> int:
    """Rows of a block: as many equal blocks as the budget asks for, at least one row each."""
    largest = max(1, budget // max(1, vocabulary * bytes_per_entry))
    blocks = max(1, -(-rows // largest))
    return max(1, -(-rows // blocks))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: sixteen-bit inputs are computed in float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def logits_blockwise(
    logits: Tensor, targets: SparseTargets, objective: Objective, factors: Coefficients | None
) -> tuple[BlockLosses, Tensor | None]:
    """Unweighted losses [N] of logits [N,V], and the derivative of Σ factors·losses."""
    dtype = compute_dtype(logits)
    rows = _rows_with_loss(targets, objective)
    kept = targets.take(rows)
    ce, kd = (torch.zeros(len(logits), dtype=dtype, device=logits.device) for _ in range(2))
    gradient = None if factors is None else torch.zeros_like(logits)
    for block in _blocks(rows.numel(), logits.shape[1], logits.to(dtype)[:0], kept, objective):
        z = logits[rows[block]].to(dtype)  # indexing copies
        own = None if factors is None else Coefficients(*(f[rows[block]] for f in factors))
        ce[rows[block]], kd[rows[block]] = loss_block(z, kept.take(block), objective, own)
        if gradient is not None:
            gradient[rows[block]] = z.to(logits.dtype)
    return BlockLosses(ce, kd), gradient


def linear_blockwise(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: SparseTargets,
    objective: Objective,
    factors: Coefficients | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[BlockLosses, Gradients]:
    """Unweighted losses [N] of hidden @ weight.T + bias, and the derivatives of Σ factors·losses.

    Gradients with respect to hidden, weight and bias where `wanted`, in their dtypes; without
    factors none.
    """
    dtype = compute_dtype(hidden, weight)
    rows = _rows_with_loss(targets, objective)
    kept = targets.take(rows)
    x, w = hidden[rows].to(dtype), weight.to(dtype)
    b = None if bias is None else bias.to(dtype)
    dx = torch.empty_like(x) if factors is not None and wanted[0] else None
    # the first block overwrites dw, which saves a pass over [V,H]
    fresh = torch.empty if rows.numel() else torch.zeros
    dw = fresh(w.shape, dtype=dtype, device=w.device) if factors is not None and wanted[1] else None
    db = torch.zeros_like(b) if factors is not None and wanted[2] and b is not None else None
    ce, kd = x.new_zeros(hidden.shape[0]), x.new_zeros(hidden.shape[0])
    blocks = _blocks(rows.numel(), weight.shape[0], x, kept, objective)
    logits = x.new_empty(blocks[0].stop if blocks else 0, weight.shape[0])
    for block in blocks:
        z = logits[: block.stop - block.start]
        torch.mm(x[block], w.t(), out=z)
        if b is not None:
            z.add_(b)
        own = None if factors is None else Coefficients(*(f[rows[block]] for f in factors))
        ce[rows[block]], kd[rows[block]] = loss_block(z, kept.take(block), objective, own)
        if dx is not None:
            torch.mm(z, w, out=dx[block])
        if dw is not None:
            dw.addmm_(z.t(), x[block], beta=1 if block.start else 0)
        if db is not None:
            db.add_(z.sum(0))
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


def _blocks(
    rows: int, vocabulary: int, like: Tensor, targets: SparseTargets, objective: Objective
) -> list[slice]:
    """Consecutive slices of `rows`, sized for buffers of `like`'s dtype on its device."""
    buffers = block_buffers(objective, targets.labels is not None)
    budget = BLOCK_BYTES.get(like.device.type, BLOCK_BYTES["cuda"])
    step = block_rows(rows, vocabulary, buffers * like.element_size(), budget)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
