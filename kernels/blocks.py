"""Split rows into blocks of bounded size, and multiply the matrices around them.

No losses and no autograd here. Shapes: N rows, H hidden, V vocabulary, C block rows.
"""

import functools

import torch
from torch import Tensor

BLOCK_BYTES = {"cpu": 256 * 2**20}  # for all [C,V] buffers of a call together

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def block_rows(rows: int, vocabulary: int, bytes_per_entry: int, budget: int) -> int:
    """Return the rows of a block: as many equal blocks as the budget needs, at least a row each."""
    largest = max(1, budget // max(1, vocabulary * bytes_per_entry))
    blocks = max(1, -(-rows // largest))
    return max(1, -(-rows // blocks))


def row_blocks(
    rows: int, vocabulary: int, bytes_per_entry: int, device: torch.device
) -> list[slice]:
    """Return consecutive slices of `rows` with [C,V] buffers that fit the device's budget."""
    budget = BLOCK_BYTES.get(device.type) or _gpu_budget(device)
    step = block_rows(rows, vocabulary, bytes_per_entry, budget)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@functools.cache
def _gpu_budget(device: torch.device) -> int:
    """Return a sixteenth of a GPU's memory, but at least 2 GiB: with few rows a block, reading and
    writing dW would cost more than the products.

    The share is of all its memory, not of what is free: the block size decides how sums are
    rounded, and another process on the GPU must not change results.
    """
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(2 * 2**30, memory // 16)


def rows_apart(
    rows: int, size: int, stride: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return uninitialised memory [rows,size] with rows `stride` apart.

    Only the gaps between the rows are zeroed, because a product may read them: in bfloat16, oneDNN
    reads a factor's rows up to a whole AMX tile and multiplies the surplus by zero, so a NaN left
    there becomes NaN in the result (uxlfoundation/oneDNN#5717; PyTorch 2.13 has it).
    """
    memory = torch.empty(rows, stride, dtype=dtype, device=device)
    if stride > size:
        memory[:, size:] = 0
    return memory[:, :size]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any input is float64, else float32 (also for 16-bit inputs)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def matrix_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return the dtype of the product a @ b: autocast's, or else the factors' common dtype."""
    if torch.is_autocast_enabled(a.device.type):
        return torch.get_autocast_dtype(a.device.type)
    return torch.promote_types(a.dtype, b.dtype)


def product_(total: Tensor, a: Tensor, b: Tensor, plus: bool = False) -> None:
    """Compute total <- a @ b in place, or total + a @ b, in total's dtype even for 16-bit factors.

    Uses only calls with an output argument, because autocast leaves those alone.
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
