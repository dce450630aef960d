"""Students and teachers by their hidden states, and the loss over all logits in float64."""

import math
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rekindle.kernels.hidden import DenseTargets, HiddenTargets
from rekindle.kernels.losses import KDLoss, kd_loss, linear_kd_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl")
ROWS, VOCABULARY, HIDDEN, TEACHER_HIDDEN = 7, 23, 5, 3


def head(dtype: torch.dtype = torch.float64, seed: int = 0, rows: int = ROWS) -> list[Tensor]:
    """Return hidden states, weight and bias of a student."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(DEVICE, dtype) for s in shapes]


def teacher(kind: str = "int16", seed: int = 1, rows: int = ROWS, **options: Any) -> HiddenTargets:
    """Return states as in a cache, as integers of 16 or 8 bits, or as floats."""
    g = torch.Generator().manual_seed(seed)
    weight = 2 * torch.randn(VOCABULARY, TEACHER_HIDDEN, generator=g)
    bias = torch.randn(VOCABULARY, generator=g) if options.pop("bias", True) else None
    if kind == "float":
        states, scale = torch.randn(rows, TEACHER_HIDDEN, generator=g), None
    else:
        dtype = getattr(torch, kind)
        top = torch.iinfo(dtype).max
        states = torch.randint(-top, top, (rows, TEACHER_HIDDEN), generator=g).to(dtype)
        scale = (0.5 + torch.rand(rows, generator=g)) / top
    tensors = (None if t is None else t.to(DEVICE) for t in (states, scale, weight, bias))
    return HiddenTargets(*tensors, **options)


def labels(rows: int = ROWS) -> Tensor:
    g = torch.Generator().manual_seed(2)
    found = torch.randint(VOCABULARY, (rows,), generator=g)
    found[1::3] = -100
    return found.to(DEVICE)


def transformed(z: Tensor, scale: float, cap: float | None) -> Tensor:
    return scale * z if cap is None else cap * torch.tanh(scale * z / cap)


def teacher_logits(targets: HiddenTargets | DenseTargets) -> Tensor:
    """Return the logits [N,V] in float64."""
    if isinstance(targets, DenseTargets):
        return targets.log_probs.double()
    states = targets.states.double()
    if targets.scale is not None:
        states = states * targets.scale.double()[:, None]
    bias = None if targets.bias is None else targets.bias.double()
    z = F.linear(states, targets.weight.double(), bias)
    return transformed(z, targets.logit_scale, targets.softcap)


def divergence(log_q: Tensor, log_p: Tensor, kind: str) -> Tensor:
    """Return D [N] of finite log-probabilities [N,V]."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, reduction="none", log_target=True).sum(1)

    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return {
        "forward_kl": kl(log_q, log_p),
        "reverse_kl": kl(log_p, log_q),
        "jsd": (kl(log_q, log_m) + kl(log_p, log_m)) / 2,
        "tvd": (log_q.exp() - log_p.exp()).abs().sum(1) / 2,
        "skew_kl": kl(log_q, torch.logaddexp(log_q + math.log(0.1), log_p + math.log(0.9))),
    }[kind]


def truth(inputs: Any, targets: Any, **o: Any) -> KDLoss:
    """Compute the loss with dense float64 autograd: all logits, every row, plain formulas."""
    x, w, b = (None if t is None else t.double() for t in inputs)
    raw = x if w is None else F.linear(x, w, b)
    z = transformed(raw, o.get("logit_scale", 1.0), o.get("softcap"))
    tau, row_weight = o.get("temperature", 1.0), o.get("row_weight")
    log_q = torch.log_softmax(teacher_logits(targets) / tau, 1)
    kind = o.get("divergence", "forward_kl")
    kd = divergence(log_q, torch.log_softmax(z / tau, 1), kind)
    ce = torch.zeros_like(kd)
    if o.get("labels") is not None:
        ce = F.cross_entropy(z, o["labels"], reduction="none", ignore_index=-100)
    counted = o["labels"] != -100 if o.get("labels") is not None else torch.zeros_like(kd)
    active = torch.ones_like(kd)
    if row_weight is not None:
        active = (row_weight != 0).double()
        kd, ce = kd * row_weight.double(), ce * row_weight.double()
    if o.get("reduction", "mean") == "mean":
        kd = kd.sum() / active.sum().clamp(min=1)
        ce = ce.sum() / (active * counted).sum().clamp(min=1)
    elif o["reduction"] == "sum":
        kd, ce = kd.sum(), ce.sum()
    loss = o.get("ce_weight", 0.0) * ce + o.get("kd_weight", 1.0) * tau**2 * kd
    return KDLoss(loss, ce.detach(), kd.detach())


def with_gradients(function: Any, inputs: list[Tensor], targets: Any, **o: Any) -> list[Tensor]:
    """Return loss, ce, kd, and the gradients of inputs, weight and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(leaves, targets, **o)
    upstream = torch.linspace(0.5, 2, out.loss.numel(), dtype=out.loss.dtype, device=DEVICE)
    gradients = torch.autograd.grad(out.loss, leaves, upstream.view(out.loss.shape))
    return [t.detach() for t in out] + list(gradients)


def fused(inputs: list[Tensor], targets: Any, **o: Any) -> KDLoss:
    x, w, b = inputs
    return linear_kd_loss(x, w, targets, bias=b, **o)


def from_logits(inputs: list[Tensor], targets: Any, **o: Any) -> KDLoss:
    x, w, b = inputs
    return kd_loss(F.linear(x, w, b), targets, **o)


def check(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-9) -> None:
    """Compare with a bound for float64, on a GPU as on a CPU.

    Sums of at most 23 ids and 7 rows in another order differ by some 1e-14 of their size; a value
    that passed through float32 anywhere, by up to 6e-8. The bound lies between them.
    """
    for one, other in zip(found, expected, strict=True):
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=rtol * size)


# --- blocks and memory ----------------------------------------------------------------------------


def budget(rows: int, buffers: int, size: int) -> int:
    return rows * buffers * size * VOCABULARY


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor, and the most bytes alive at once."""

    def __init__(self, block: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.block, self.largest, self.most = block, 0, 0
        self.living: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.shape != self.block or storage._cdata in self.living:
            return
        self.living[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self.living.pop, storage._cdata, None)
        tensor._kept_storage = storage  # the storage's wrapper dies with the tensor
        self.most = max(self.most, sum(self.living.values()))
