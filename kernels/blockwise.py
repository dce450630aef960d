"""The loop over blocks of rows: losses and gradients in bounded memory, in one pass.

The gradient is formed while a block's logits exist, so a linear head never holds [N,V]. On a CPU,
rows without loss are dropped before the first product; on a GPU counting them would mean waiting
for the device, so all rows are kept. The Triton path of a linear head is this loop as well: library
products around the row kernel, in few large blocks. No autograd here. Shapes: N rows, H hidden, V
vocabulary, K kept ids, R rows that are kept, C block rows.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rekindle.kernels.blocks import Gradients, product_, row_blocks, rows_apart
from rekindle.kernels.call import Call
from rekindle.kernels.closed_form import BlockLosses, Coefficients, block_buffers, loss_block
from rekindle.kernels.hidden import LogProbBlocks
from rekindle.kernels.targets import KernelTargets
from rekindle.kernels.whole_vocabulary import whole_buffers, whole_loss_block


def blockwise(call: Call, factors: Coefficients | None) -> tuple[BlockLosses, Gradients]:
    """Return unweighted losses of N rows, and the derivatives of Σ factors·losses, in PyTorch.

    Gradients of the student's inputs, weight and bias are returned where they are wanted, in the
    dtypes of these; they need factors. The factors of matrix products are rounded to the call's
    `product_dtype`, if it has one. dW is summed in float32, or in float64 for float64 inputs.
    """
    rows, kept_targets = _rows_to_keep(call), call.targets
    if rows is not None:
        kept_targets = kept_targets.take(rows)
        factors = None if factors is None else factors.take(rows)
    head = _GivenLogits(call, rows) if call.student.weight is None else _LinearHead(call, rows)
    losses = _block_losses(call, kept_targets, rows)
    ignored = (
        ~kept_targets.active()
        if kept_targets.weight is not None and not _drops_rows(call)
        else None
    )
    block_losses = []
    for block in head.blocks:
        z = head.logits(block)
        block_factors = None if factors is None else factors.take(block)
        row_losses = losses(z, block, block_factors)
        if ignored is not None:  # these rows may hold anything, and NaN · 0 is NaN
            z.masked_fill_(ignored[block, None], 0.0)
            row_losses = BlockLosses(
                *(v.t().masked_fill(ignored[block], 0.0).t() for v in row_losses)
            )
        block_losses.append(row_losses)
        head.add(z, block)
    return _join_blocks(call, block_losses, rows), head.gradients()


def fused_head(
    call: Call, upstream: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor] | None, Gradients]:
    """Return (loss, ce, kd) of a linear head, reduced, and its gradients, around the row kernel.

    The products' factors and the logits are in the call's `product_dtype`; dW is summed in float32.
    With an upstream gradient only the gradients are returned.
    """
    from rekindle.kernels.triton_rows import RowKernel

    head, needs_grad = _LinearHead(call, None), any(call.computation.needs_grad)
    kernel = RowKernel(call.targets, call.settings, needs_grad, upstream, head.lift)
    for block in head.blocks:
        z = head.logits(block)
        kernel.run(z, z, block, head.bias)
        head.add(z, block)
    return kernel.losses() if upstream is None else None, head.gradients()


def _scatter_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return zeros [count,…] with the values [R,…] placed at the given rows."""
    return values.new_zeros(count, *values.shape[1:]).index_copy_(0, rows, values)


def _join_blocks(call: Call, block_losses: list[BlockLosses], rows: Tensor | None) -> BlockLosses:
    """Join the losses of all blocks; rows that were left out get 0."""
    count, teachers = len(call.targets.ids), len(call.settings.kd_weights)
    if not block_losses:
        zeros = call.student.inputs.new_zeros(count, teachers, dtype=call.student.compute_dtype)
        return BlockLosses(zeros[:, 0], zeros if teachers > 1 else zeros[:, 0])
    losses = block_losses[0]
    if len(block_losses) > 1:
        losses = BlockLosses(*(torch.cat(parts) for parts in zip(*block_losses, strict=True)))
    return losses if rows is None else BlockLosses(*(_scatter_rows(v, rows, count) for v in losses))


class _GivenLogits:
    """Logits [N,V] given by the caller; each block is a copy."""

    def __init__(self, call: Call, rows: Tensor | None):
        self.rows, self.inputs, self.dtype = rows, call.student.inputs, call.student.compute_dtype
        self.blocks = _torch_blocks(call, len(self.inputs) if rows is None else len(rows))
        self.gradient: Tensor | None = None
        self.needs_grad = any(call.computation.needs_grad)
        if self.needs_grad and (rows is not None or len(self.blocks) != 1):
            self.gradient = torch.zeros_like(self.inputs)

    def logits(self, block: slice) -> Tensor:
        if self.rows is None:
            return self.inputs[block].to(self.dtype, copy=True)
        return self.inputs[self.rows[block]].to(self.dtype)  # indexing copies

    def add(self, z: Tensor, block: slice) -> None:
        """Store the gradient z [C,V] of a block's logits."""
        if self.gradient is not None:
            self.gradient[block if self.rows is None else self.rows[block]] = z.to(
                self.inputs.dtype
            )
        elif self.needs_grad:
            self.gradient = z.to(self.inputs.dtype)

    def gradients(self) -> Gradients:
        return self.gradient, None, None


class _LinearHead:
    """Logits x @ w.T + b, one block at a time in a single buffer, and the sums of their gradients.

    x [R,H] and w [V,H] are in the dtype of the products. Gradients are multiplied by `lift` until
    they are handed over. The row kernel adds the bias itself: a product that adds it would first
    have to write it into the padded rows and then read it again.

    On a GPU, the products of a vocabulary that does not fill 16 bytes seem to run at some 270
    TFLOP/s where others reach 700 (H200, H = 768, V = 30,522 beside 50,368: the head's time less
    the row kernel's, 2026-11-29; that padding heals it is not measured). There the weight is copied
    with rows of zeros after its last, so that logits and dW have as many ids more: logits of 0,
    which the row kernel does not read, and a dW of which the first V rows are handed over.

    dB costs a reading of a block's whole gradient, C·V·itemsize bytes at the memory's rate (0.5 GB
    for 8,192 rows of 30,522 ids in bfloat16), beside the five passes over it of the products and
    the row kernel. Nothing cheaper is exact and repeatable: a column of ones in x would let dW's
    product form it, but H + 8 columns are a tile more where H fills its tiles, and leave dW in rows
    that must be copied to lie together; sums over rows in the row kernel would be atomic, in
    another order each time.
    """

    def __init__(self, call: Call, rows: Tensor | None):
        (hidden, weight, bias), (impl, product_dtype, needs_grad) = call.student, call.computation
        self.student, self.rows, self.fused = call.student, rows, impl == "triton"
        assert weight is not None
        dtype = call.student.compute_dtype
        product_dtype = product_dtype or dtype
        logits_dtype = product_dtype if self.fused else dtype
        x = (hidden if rows is None else hidden[rows]).to(product_dtype)
        if call.targets.weight is not None and (self.fused or not _drops_rows(call)):
            # because 0 · NaN would reach dW
            x = x.masked_fill(~call.targets.active()[:, None], 0.0)
        self.x, self.vocabulary = x, len(weight)
        self.bias = bias if self.fused or bias is None else bias.to(dtype)
        self.lift = _lift(len(x), product_dtype) if self.fused else 1.0
        padded = width = self.vocabulary
        if self.fused:
            width = -(-width // 64) * 64  # products are faster when rows start on 128 bytes
            if self.vocabulary * x.element_size() % 16:
                padded = width
            self.blocks = row_blocks(len(x), width, x.element_size(), x.device)
        else:
            self.blocks = _torch_blocks(call, len(x))
        whole = padded == self.vocabulary
        self.w = weight.to(product_dtype) if whole else _zeros_after(weight, padded, product_dtype)
        largest_block = self.blocks[0].stop if self.blocks else 0
        self.buffer = rows_apart(largest_block, padded, width, logits_dtype, x.device)
        # on a GPU a product sums in nothing else
        self.sums = torch.float32 if self.fused else dtype
        # With the row kernel, a product writes the final gradient directly where its rounding is
        # final: dX, and dW of a single block. A lifted dW could overflow in 16 bits, so it is not
        # written so.
        output_dtypes = (torch.float32, product_dtype)
        dx_dtype = hidden.dtype if self.fused and hidden.dtype in output_dtypes else product_dtype
        writes_final_dw = (
            self.fused
            and self.lift == 1.0
            and len(self.blocks) == 1
            and weight.dtype in output_dtypes
        )
        dw_dtype = weight.dtype if writes_final_dw else self.sums
        self.dx = x.new_empty(x.shape, dtype=dx_dtype) if needs_grad[0] else None
        # the first block overwrites dw, which saves a pass over [V,H]
        allocate = torch.empty if len(x) else torch.zeros
        dw_shape = (padded, x.shape[1])
        self.dw = allocate(dw_shape, dtype=dw_dtype, device=x.device) if needs_grad[1] else None
        self.db = allocate(len(weight), dtype=self.sums, device=x.device) if needs_grad[2] else None

    def logits(self, block: slice) -> Tensor:
        z = self.buffer[: block.stop - block.start]
        product_(z, self.x[block], self.w.t())
        z = z[:, : self.vocabulary]
        return z if self.fused or self.bias is None else z.add_(self.bias)

    def add(self, z: Tensor, block: slice) -> None:
        """Add a block's gradient, which stands in the memory of its logits z [C,V], to the sums."""
        gradient = self.buffer[: len(z)].to(self.x.dtype)
        if self.dx is not None:
            product_(self.dx[block], gradient, self.w)
        if self.dw is not None:
            product_(self.dw, gradient.t(), self.x[block], plus=block.start > 0)
        if self.db is None:
            return
        if block.start == 0:
            torch.sum(z, 0, dtype=self.sums, out=self.db)
        else:
            self.db.add_(z.sum(0, dtype=self.sums))

    def gradients(self) -> Gradients:
        """Return the sums in the dtypes of the tensors they belong to."""
        cast: list[Tensor | None] = []
        dw = None if self.dw is None else self.dw[: self.vocabulary]
        for total, tensor in zip((self.dx, dw, self.db), self.student, strict=True):
            if total is not None and self.lift != 1.0:
                total.mul_(1.0 / self.lift)
            cast.append(None if total is None or tensor is None else total.to(tensor.dtype))
        dx, dw, db = cast
        if dx is not None and self.rows is not None:
            dx = _scatter_rows(dx, self.rows, len(self.student.inputs))
        return dx, dw, db


def _zeros_after(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Return a copy of a weight [V,H] in a dtype, [rows,H], with zeros after its last row."""
    copy = weight.new_empty(rows, weight.shape[1], dtype=dtype)
    copy[: len(weight)] = weight
    copy[len(weight) :] = 0
    return copy


def _block_losses(
    call: Call, kept_targets: KernelTargets, rows: Tensor | None
) -> Callable[[Tensor, slice, Coefficients | None], BlockLosses]:
    """Return a function that computes the losses of a block's raw logits z [C,V] and overwrites z
    with their gradient.
    """
    settings, tau = call.settings, call.settings.temperature
    if call.whole.states is None:
        return lambda z, block, block_factors: loss_block(
            z, kept_targets.take(block), settings, block_factors
        )
    dtype = call.student.compute_dtype
    teacher = LogProbBlocks(call.whole, dtype, call.computation.product_dtype or dtype)
    assert rows is not None
    return lambda z, block, block_factors: whole_loss_block(
        z,
        teacher.log_probs(rows[block], tau),
        kept_targets.take(block).labels,
        settings,
        block_factors,
    )


def _drops_rows(call: Call) -> bool:
    """Return whether rows without loss are dropped; their number sets shapes, so the host must know
    it.

    Dropping saves their share of the products. On a GPU, a caller with many such rows leaves them
    out.
    """
    return call.targets.ids.device.type == "cpu"


def _rows_to_keep(call: Call) -> Tensor | None:
    """Return the indices of rows with a weight and a label or target; None to keep all rows."""
    targets = call.targets
    if not _drops_rows(call):
        is_whole = call.whole.states is not None
        return torch.arange(len(targets.ids), device=targets.ids.device) if is_whole else None
    if call.whole.states is not None:
        return targets.active().nonzero()[:, 0]
    has_loss = targets.labelled(call.settings.ignore_index) if targets.labels is not None else None
    if has_loss is None or not bool(has_loss.all()):
        listed = (targets.ids >= 0).any(1)
        has_loss = listed if has_loss is None else has_loss | listed
    if targets.weight is not None:
        has_loss = has_loss & targets.active()
    return None if bool(has_loss.all()) else has_loss.nonzero()[:, 0]


def _torch_blocks(call: Call, rows: int) -> list[slice]:
    """Return consecutive slices of `rows`, sized by what PyTorch needs for a block of logits."""
    student = call.student
    count = block_buffers if call.whole.states is None else whole_buffers
    buffers = count(call.settings, call.targets.labels is not None)
    size = buffers * student.compute_dtype.itemsize
    return row_blocks(rows, student.vocabulary, size, student.inputs.device)


def _lift(rows: int, dtype: torch.dtype) -> float:
    """Return a power of two near the row count, which keeps gradients of a mean normal in
    float16.
    """
    return 2.0 ** math.ceil(math.log2(max(rows, 1))) if dtype == torch.float16 else 1.0
