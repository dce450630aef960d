"""Blocks of rows of bounded size, and the products around them.

No losses and no autograd here. Shapes: N rows, H hidden, V vocabulary, C block rows.
"""

import functools

import torch
from torch import Tensor

BLOCK_BYTES = {"cpu": 256 * 2**20}  # of all [C,V] buffers of a call together

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def block_rows(rows: int, vocabulary: int, bytes_per_entry: int, budget: int) -> int:
    """Rows of a block: as many equal blocks as the budget asks for, at least one row each."""
    largest = max(1, budget // max(1, vocabulary * bytes_per_entry))
    blocks = max(1, -(-rows // largest))
    return max(1, -(-rows // blocks))


def row_blocks(
    rows: int, vocabulary: int, bytes_per_entry: int, device: torch.device
) -> list[slice]:
    """Consecutive slices of `rows`, whose [C,V] buffers keep within the device's budget."""
    budget = BLOCK_BYTES.get(device.type) or _gpu_budget(device)
    step = block_rows(rows, vocabulary, bytes_per_entry, budget)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@functools.cache
def _gpu_budget(device: torch.device) -> int:
    """A sixteenth of a GPU's memory, and 2 GiB at least: few rows a block would make reading and
    writing dW dearer than the products.

    Of all its memory, not of what is free: the blocks decide how sums are rounded, and neighbours
    are not to change them.
    """
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(2 * 2**30, memory // 16)


def rows_apart(
    rows: int, size: int, stride: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory [rows,size] whose rows start `stride` apart, not filled.

    Only what lies between the rows is zero. A product may read it: oneDNN's in bfloat16 takes a
    factor's rows up to a whole AMX tile and multiplies what is too much by zero, so that NaN left
    there by others becomes NaN in the result (uxlfoundation/oneDNN#5717; PyTorch 2.13 has it).
    """
    memory = torch.empty(rows, stride, dtype=dtype, device=device)
    if stride > size:
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
    if a.dtype != total.dtype or b.dtype != total.dtype:
        a, b = a.to(total.dtype), b.to(total.dtype)
    if plus:
        total.addmm_(a, b)
    else:
        torch.mm(a, b, out=total)
