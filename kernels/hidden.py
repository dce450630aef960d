"""What hidden states and an output matrix say of the whole vocabulary, a bounded block at a time.

A teacher's distribution from its cached states, as a loss takes it, and the entropy of a student's.
No losses and no autograd here. Shapes: N rows, H hidden, V vocabulary, C block rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rekindle.kernels.chunked import compute_dtype, product_, row_blocks
from rekindle.kernels.closed_form import transform_
from rekindle.kernels.whole_vocabulary import log_softmax_


class HiddenTargets(NamedTuple):
    """A teacher's final hidden states and output matrix, whose logits are never all made.

    logits = softcap·tanh(logit_scale · (scale · states @ weight.T + bias) / softcap)
    """

    states: Tensor  # [N,H] in any real dtype, integers too
    scale: Tensor | None  # [N] what a row of states is multiplied by; None: 1
    weight: Tensor  # [V,H], the student's V and the teacher's own H
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    logit_scale: float = 1.0


class DenseTargets(NamedTuple):
    """A teacher's log-probabilities at τ = 1 (or logits: a row's constant does not matter)."""

    log_probs: Tensor  # [N,V]; -inf: an id that cannot occur


WholeTargets = HiddenTargets | DenseTargets


class TeacherBlocks:
    """Log-probabilities [C,V] of some rows at a time, in one buffer that they share."""

    def __init__(self, targets: WholeTargets, dtype: torch.dtype, product_dtype: torch.dtype):
        self.targets, self.dtype, self.product_dtype = targets, dtype, product_dtype
        self.weight: Tensor | None = None
        if isinstance(targets, HiddenTargets):
            self.weight = targets.weight.to(product_dtype)
        self.buffer: Tensor | None = None

    def log_probs(self, rows: Tensor, temperature: float) -> Tensor:
        """At τ of the rows [C], at most as many as the first time; the caller may overwrite it."""
        targets = self.targets
        if isinstance(targets, DenseTargets):
            out = targets.log_probs[rows].to(self.dtype)  # indexing copies
        else:
            out = self._logits(targets, rows)
        if temperature != 1.0:
            out.div_(temperature)
        return log_softmax_(out)

    def _logits(self, targets: HiddenTargets, rows: Tensor) -> Tensor:
        assert self.weight is not None
        states = targets.states[rows].to(self.dtype)
        if targets.scale is not None:
            states.mul_(targets.scale[rows].to(self.dtype)[:, None])
        if self.buffer is None:
            self.buffer = states.new_empty(len(states), len(self.weight))
        out = self.buffer[: len(states)]
        product_(out, states.to(self.product_dtype), self.weight.t())
        if targets.bias is not None:
            out.add_(targets.bias)
        transform_(out, targets.logit_scale, targets.softcap)
        return out


def row_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Entropy in nats, float32 [N], of softmax(z), z = cap·tanh(scale·(hidden @ weight.T + b)/cap).

    hidden [N,H], weight [V,H], bias [V]. Without gradient, and never with all logits at once: the
    blocks take as many bytes as those of a loss. On a GPU the product is in the autocast dtype, or
    the inputs' common one, if that is bfloat16.
    """
    with torch.no_grad():
        dtype = compute_dtype(hidden, weight)
        product_dtype = block_product_dtype(hidden, weight)
        x, w = hidden.to(product_dtype), weight.to(product_dtype)
        blocks = row_blocks(len(x), len(w), 3 * dtype.itemsize, x.device)
        buffer = torch.empty(blocks[0].stop if blocks else 0, len(w), dtype=dtype, device=x.device)
        entropy = torch.empty(len(x), dtype=torch.float32, device=x.device)
        for block in blocks:
            z = buffer[: block.stop - block.start]
            product_(z, x[block], w.t())
            if bias is not None:
                z.add_(bias)
            transform_(z, logit_scale, softcap)
            p = log_softmax_(z).exp()
            z.masked_fill_(z == -math.inf, 0.0)  # 0 · log 0 = 0
            entropy[block] = -p.mul_(z).sum(1)
        return entropy


def block_product_dtype(hidden: Tensor, weight: Tensor, exactly: bool = False) -> torch.dtype:
    """What the factors of products around blocks of PyTorch arithmetic are rounded to.

    bfloat16 on a GPU, where autocast or the inputs ask for it and `exactly` does not forbid it:
    products in float32 take ten times as long there. Else nothing is rounded.
    """
    product_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type):
        product_dtype = torch.get_autocast_dtype(hidden.device.type)
    if exactly or hidden.device.type != "cuda" or product_dtype != torch.bfloat16:
        return compute_dtype(hidden, weight)
    return product_dtype


def check_whole(targets: WholeTargets, rows: int, vocabulary: int, device: torch.device) -> None:
    """ValueError where the targets are not of the student's N rows and V ids, on its device."""
    shapes: list[tuple[str, Tensor | None, tuple[int, ...]]]
    if isinstance(targets, DenseTargets):
        shapes = [("log_probs", targets.log_probs, (rows, vocabulary))]
        real = [targets.log_probs]
    else:
        _check_factors(targets)
        size = targets.weight.shape[-1]
        shapes = [
            ("states", targets.states, (rows, size)),
            ("scale", targets.scale, (rows,)),
            ("weight", targets.weight, (vocabulary, size)),
            ("bias", targets.bias, (vocabulary,)),
        ]
        real = [targets.weight]
    for name, tensor, shape in shapes:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"the teacher's {name} is {tuple(tensor.shape)}; it must be {shape}, for the "
                f"student's N = {rows} rows and V = {vocabulary} ids"
            )
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"the teacher's {name} is on {tensor.device} and the student on {device}; "
                "all tensors of a call must be on one device"
            )
    if not all(tensor.is_floating_point() for tensor in real):
        raise ValueError(f"the teacher's values are {real[0].dtype}; they must be floating point")


def _check_factors(targets: HiddenTargets) -> None:
    for name, given in (("logit_scale", targets.logit_scale), ("softcap", targets.softcap)):
        if given is not None and not 0 < given < math.inf:
            raise ValueError(f"the teacher's {name} is {given}; it must be positive and finite")
