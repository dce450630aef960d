"""Blocks of rows of bounded size, the products around them, and the sums of a head's gradients.

No losses and no autograd here. Shapes: N rows, H hidden, V vocabulary, C block rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Bytes of all [C,V] buffers of a call together. On a GPU few rows a block would make reading and
# writing dW dearer than the products.
BLOCK_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


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


def rows_apart(like: Tensor, rows: int, size: int, stride: int) -> Tensor:
    """Memory [rows,size] of like's dtype and device whose rows start `stride` apart, not filled.

    Only what lies between the rows is zero. A product may read it: oneDNN's in bfloat16 takes a
    factor's rows up to a whole AMX tile and multiplies what is too much by zero, so that NaN left
    there by others becomes NaN in the result (uxlfoundation/oneDNN#5717; PyTorch 2.13 has it).
    """
    memory = like.new_empty(rows, stride)
    memory[:, size:] = 0
    return memory[:, :size]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: sixteen-bit inputs are computed in float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def matrix_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return what autocast, or else the factors' common dtype, wants the product a @ b in."""
    if torch.is_autocast_enabled(a.device.type):
        return torch.get_autocast_dtype(a.device.type)
    return torch.promote_types(a.dtype, b.dtype)


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


class HeadGradients:
    """The `wanted` gradients of x @ w.T + b, added up block by block, those of w and b in `dtype`.

    x [N,H] and w [V,H] are in the dtype of the products.
    """

    def __init__(self, x: Tensor, w: Tensor, wanted: Sequence[bool], dtype: torch.dtype):
        self.x, self.w = x, w
        self.dx = torch.empty_like(x) if wanted[0] else None
        # the first block overwrites dw, which saves a pass over [V,H]
        fresh = torch.empty if len(x) else torch.zeros
        self.dw = fresh(w.shape, dtype=dtype, device=w.device) if wanted[1] else None
        self.db = torch.zeros(len(w), dtype=dtype, device=w.device) if wanted[2] else None

    def add(self, z: Tensor, block: slice) -> None:
        """Add a block of the logits' gradient, z [C,V]."""
        gradient = z.to(self.x.dtype)
        if self.dx is not None:
            torch.mm(gradient, self.w, out=self.dx[block])
        if self.dw is not None:
            product_(self.dw, gradient.t(), self.x[block], plus=block.start > 0)
        if self.db is not None:
            self.db.add_(z.sum(0, dtype=self.db.dtype))

    def like(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None
    ) -> Gradients:
        """The sums in the dtypes of what they belong to, x being `rows` of hidden; None: all."""
        dx = None if self.dx is None else self.dx.to(hidden.dtype)
        if dx is not None and rows is not None:
            dx = torch.zeros_like(hidden).index_copy_(0, rows, dx)
        dw = None if self.dw is None else self.dw.to(weight.dtype)
        db = None if self.db is None or bias is None else self.db.to(bias.dtype)
        return dx, dw, db
