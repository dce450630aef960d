"""Whole-vocabulary distributions from hidden states and an output matrix, in bounded blocks.

A teacher's distribution from its cached states, as a loss takes it, and the entropy of a student's.
No losses and no autograd here. Shapes: N rows, H hidden, V vocabulary, C block rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rekindle.kernels.blocks import compute_dtype, matrix_dtype, product_, row_blocks
from rekindle.kernels.closed_form import transform_
from rekindle.kernels.targets import check_tensor, read_factor
from rekindle.kernels.whole_vocabulary import log_softmax_


class HiddenTargets(NamedTuple):
    """A teacher's final hidden states and output matrix; all its logits are never held at once.

    logits = softcap·tanh(logit_scale · (scale · states @ weight.T + bias) / softcap)
    """

    states: Tensor  # [N,H] in any real dtype, integers included
    scale: Tensor | None  # [N] factor of each row of states; None: 1
    weight: Tensor  # [V,H], with the student's V and the teacher's own H
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    logit_scale: float = 1.0


class DenseTargets(NamedTuple):
    """A teacher's log-probabilities at τ = 1, or logits: a constant per row makes no difference."""

    log_probs: Tensor  # [N,V]; -inf: an id that cannot occur


WholeTargets = HiddenTargets | DenseTargets


class WholeLogits(NamedTuple):
    """All logits of N rows, a teacher's or a student's: the fields of HiddenTargets; without
    `weight`, `states` holds log-probabilities.
    """

    states: Tensor | None = None  # None: the targets are sparse
    scale: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def of(cls, targets: WholeTargets) -> "WholeLogits":
        """Return those of a teacher's targets, detached."""
        if isinstance(targets, DenseTargets):
            return cls(targets.log_probs.detach())
        tensors = (None if t is None else t.detach() for t in targets[:4])
        softcap = None if targets.softcap is None else float(targets.softcap)
        return cls._make((*tensors, softcap, float(targets.logit_scale)))


class LogProbBlocks:
    """Log-probabilities [C,V] of some rows at a time, in one shared buffer."""

    def __init__(self, whole: WholeLogits, dtype: torch.dtype, product_dtype: torch.dtype):
        self.whole, self.dtype, self.product_dtype = whole, dtype, product_dtype
        self.weight = None if whole.weight is None else whole.weight.to(product_dtype)
        self.buffer: Tensor | None = None

    def log_probs(self, rows: Tensor, temperature: float) -> Tensor:
        """Return those of the rows [C] at τ: at most as many rows as in the first call; the caller
        may overwrite them.
        """
        assert self.whole.states is not None
        out = self.whole.states[rows].to(self.dtype)  # indexing copies
        if self.weight is not None:
            out = self._logits(out, rows, self.weight)
        if temperature != 1.0:
            out.div_(temperature)
        return log_softmax_(out)

    def _logits(self, states: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        whole = self.whole
        if whole.scale is not None:
            states.mul_(whole.scale[rows].to(self.dtype)[:, None])
        if self.buffer is None:
            self.buffer = states.new_empty(len(states), len(weight))
        out = self.buffer[: len(states)]
        product_(out, states.to(self.product_dtype), weight.t())
        if whole.bias is not None:
            out.add_(whole.bias)
        transform_(out, whole.logit_scale, whole.softcap)
        return out


def row_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return the entropy in nats, float32 [N], of softmax(z), z = cap·tanh(scale·(hidden @ weight.T
    + b)/cap).

    hidden [N,H], weight [V,H], bias [V]. No gradient, and all logits are never held at once: blocks
    take as many bytes as a loss's. On a GPU the product is in the autocast dtype, or the inputs'
    common one, if that is bfloat16.
    """
    with torch.no_grad():
        dtype = compute_dtype(hidden, weight)
        head = WholeLogits(hidden, None, weight, bias, softcap, logit_scale)
        student = LogProbBlocks(head, dtype, block_product_dtype(hidden, weight))
        rows = torch.arange(len(hidden), device=hidden.device)
        entropy = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for block in row_blocks(len(rows), len(weight), 3 * dtype.itemsize, hidden.device):
            z = student.log_probs(rows[block], 1.0)
            p = z.exp()
            z.masked_fill_(z == -math.inf, 0.0)  # 0 · log 0 = 0
            entropy[block] = -p.mul_(z).sum(1)
        return entropy


def block_product_dtype(hidden: Tensor, weight: Tensor, exactly: bool = False) -> torch.dtype:
    """Return the dtype to which factors of products around PyTorch arithmetic are rounded.

    bfloat16 on a GPU where autocast or the inputs ask for it, unless `exactly` forbids it (float32
    products take ten times as long there). Otherwise nothing is rounded.
    """
    product_dtype = matrix_dtype(hidden, weight)
    if exactly or hidden.device.type != "cuda" or product_dtype != torch.bfloat16:
        return compute_dtype(hidden, weight)
    return product_dtype


def check_whole(targets: WholeTargets, rows: int, vocabulary: int, device: torch.device) -> None:
    """Raise ValueError if the targets do not fit the student's N rows, V ids and device."""
    sizes: dict[str, tuple[int, ...]] = {"log_probs": (rows, vocabulary)}
    if isinstance(targets, HiddenTargets):
        read_factor("the teacher's logit_scale", targets.logit_scale)
        if targets.softcap is not None:
            read_factor("the teacher's softcap", targets.softcap)
        size = -1 if targets.weight is None else targets.weight.shape[-1]
        sizes = {"weight": (vocabulary, size), "states": (rows, size)}
        sizes |= {"scale": (rows,), "bias": (vocabulary,)}

    def requirement() -> str:
        return f"for the student's N = {rows} rows and V = {vocabulary} ids"

    for name, shape in sizes.items():
        if getattr(targets, name) is None and name not in ("scale", "bias"):
            raise ValueError(f"the teacher's {name} is missing; it is {shape}, {requirement()}")
        check_tensor(f"the teacher's {name}", getattr(targets, name), shape, requirement, device)
    values = targets.weight if isinstance(targets, HiddenTargets) else targets.log_probs
    if not values.is_floating_point():
        raise ValueError(f"the teacher's values are {values.dtype}; they must be floating point")
