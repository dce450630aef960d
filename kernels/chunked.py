"""The PyTorch path: losses and gradients in row blocks of bounded size, formed in one go.

The gradient is formed while a block's logits exist, so that [N,V] never does for a linear head.
Rows without loss are dropped before the first product. Nothing here talks to autograd. Shapes: N
rows, H hidden, V vocabulary, K kept ids, C block rows.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rekindle.kernels.closed_form import BlockLosses, Coefficients, block_buffers, loss_block
from rekindle.kernels.targets import LossSettings, SparseTargets
from rekindle.kernels.whole_vocabulary import whole_buffers, whole_loss_block

# Bytes of all [C,V] buffers of a call together. On a GPU few rows a block would make reading and
# writing dW dearer than the products.
BLOCK_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Teacher(Protocol):
    """A teacher of whom every probability is known, formed where it is used."""

    def log_probs(self, rows: Tensor, temperature: float) -> Tensor:
        """Log-probabilities [C,V] of some rows, in memory that may be written over."""


def block_rows(rows: int, vocabulary: int, bytes_per_entry: int, budget: int) -> int:
    """Rows of a block: as many equal blocks as the budget asks for, at least one row each."""
    largest = max(1, budget // max(1, vocabulary * bytes_per_entry))
    blocks = max(1, -(-rows // largest))
    return max(1, -(-rows // blocks))


def row_blocks(
    rows: int, vocabulary: int, bytes_per_entry: int, device: torch.device
) -> list[slice]:
    """Consecutive slices of `rows`, whose [C,V] buffers keep within the device's BLOCK_BYTES."""
    budget = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])
    step = block_rows(rows, vocabulary, bytes_per_entry, budget)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: sixteen-bit inputs are computed in float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def logits_blockwise(
    logits: Tensor,
    targets: SparseTargets,
    settings: LossSettings,
    factors: Coefficients | None,
    teacher: Teacher | None = None,
) -> tuple[BlockLosses, Tensor | None]:
    """Unweighted losses [N] of logits [N,V], and the derivative of Σ factors·losses.

    With a teacher, `targets` hold labels and weights only, and list no ids.
    """
    dtype = compute_dtype(logits)
    rows = _rows_with_loss(targets, settings, teacher)
    kept = targets.take(rows)
    ce, kd = (torch.zeros(len(logits), dtype=dtype, device=logits.device) for _ in range(2))
    gradient = None if factors is None else torch.zeros_like(logits)
    like = logits[:0].to(dtype)
    for block in _blocks(rows.numel(), logits.shape[1], like, kept, settings, teacher):
        here = rows[block]
        z = logits[here].to(dtype)  # indexing copies
        own = None if factors is None else factors.take(here)
        ce[here], kd[here] = _losses(z, here, kept.take(block), settings, own, teacher)
        if gradient is not None:
            gradient[here] = z.to(logits.dtype)
    return BlockLosses(ce, kd), gradient


def linear_blockwise(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: SparseTargets,
    settings: LossSettings,
    factors: Coefficients | None,
    wanted: Sequence[bool],
    teacher: Teacher | None = None,
    product_dtype: torch.dtype | None = None,
) -> tuple[BlockLosses, Gradients]:
    """Unweighted losses [N] of hidden @ weight.T + bias, and the derivatives of Σ factors·losses.

    Gradients with respect to hidden, weight and bias where `wanted`, in their dtypes; without
    factors none. With a teacher, `targets` hold labels and weights only, and list no ids. The
    products' factors are rounded to `product_dtype`, if given; logits and dW are not.
    """
    dtype = compute_dtype(hidden, weight)
    product_dtype = product_dtype or dtype
    rows = _rows_with_loss(targets, settings, teacher)
    kept = targets.take(rows)
    x, w = hidden[rows].to(product_dtype), weight.to(product_dtype)
    b = None if bias is None else bias.to(dtype)
    dx = torch.empty_like(x) if factors is not None and wanted[0] else None
    # the first block overwrites dw, which saves a pass over [V,H]
    fresh = torch.empty if rows.numel() else torch.zeros
    dw = fresh(w.shape, dtype=dtype, device=w.device) if factors is not None and wanted[1] else None
    db = torch.zeros_like(b) if factors is not None and wanted[2] and b is not None else None
    ce, kd = (torch.zeros(hidden.shape[0], dtype=dtype, device=x.device) for _ in range(2))
    blocks = _blocks(rows.numel(), weight.shape[0], x[:0].to(dtype), kept, settings, teacher)
    logits = torch.empty(blocks[0].stop if blocks else 0, len(w), dtype=dtype, device=x.device)
    for block in blocks:
        z, here = logits[: block.stop - block.start], rows[block]
        product_(z, x[block], w.t())
        if b is not None:
            z.add_(b)
        own = None if factors is None else factors.take(here)
        ce[here], kd[here] = _losses(z, here, kept.take(block), settings, own, teacher)
        gradient = z.to(product_dtype)
        if dx is not None:
            torch.mm(gradient, w, out=dx[block])
        if dw is not None:
            product_(dw, gradient.t(), x[block], plus=block.start > 0)
        if db is not None:
            db.add_(z.sum(0))
    if dx is not None:
        dx = torch.zeros_like(hidden).index_copy_(0, rows, dx.to(hidden.dtype))
    return BlockLosses(ce, kd), (
        dx,
        None if dw is None else dw.to(weight.dtype),
        None if db is None or bias is None else db.to(bias.dtype),
    )


def product_(total: Tensor, a: Tensor, b: Tensor, plus: bool = False) -> None:
    """In place total <- a @ b, or total + a @ b; in total's dtype, also of sixteen-bit matrices.

    Only forms that write to given memory: autocast leaves those alone.
    """
    if a.dtype != total.dtype and a.device.type == "cuda":
        if plus:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        return
    a, b = a.to(total.dtype), b.to(total.dtype)
    if plus:
        total.addmm_(a, b)
    else:
        torch.mm(a, b, out=total)


def _losses(
    z: Tensor,
    rows: Tensor,
    kept: SparseTargets,
    settings: LossSettings,
    factors: Coefficients | None,
    teacher: Teacher | None,
) -> BlockLosses:
    """Losses of one block's raw logits z [C,V], which become their gradient."""
    if teacher is None:
        return loss_block(z, kept, settings, factors)
    log_q = teacher.log_probs(rows, settings.temperature)
    return whole_loss_block(z, log_q, kept.labels, settings, factors)


def _rows_with_loss(
    targets: SparseTargets, settings: LossSettings, teacher: Teacher | None
) -> Tensor:
    """Indices of the rows that weigh something and have a label or a target."""
    if teacher is not None and targets.weight is None:
        return torch.arange(len(targets.ids), device=targets.ids.device)  # without waiting for it
    if teacher is not None:
        return targets.active().nonzero()[:, 0]
    useful = targets.labelled(settings.ignore_index) | (targets.ids >= 0).any(1)
    return (targets.active() & useful).nonzero()[:, 0]


def _blocks(
    rows: int,
    vocabulary: int,
    like: Tensor,
    targets: SparseTargets,
    settings: LossSettings,
    teacher: Teacher | None,
) -> list[slice]:
    """Consecutive slices of `rows`, sized for buffers of `like`'s dtype on its device."""
    count = block_buffers if teacher is None else whole_buffers
    buffers = count(settings, targets.labels is not None)
    return row_blocks(rows, vocabulary, buffers * like.element_size(), like.device)
