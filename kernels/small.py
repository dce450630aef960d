"""The loss of a small call in few operations, where arithmetic is cheap and each operation costs.

The same loss as `closed_form` when nothing is padded, ignored or weighted and no probability is
near zero. One softmax over all ids (two at τ ≠ 1 with labels) is read, summed without the listed
ids and scaled to the gradient: a third of the operations, whose overhead dominates a call of few
rows. The probabilities themselves show if this case applies; if it does not, nothing has been
changed. Larger calls stay with `closed_form`, and keep its exact bits.

Shapes: N rows, H hidden, V vocabulary, K kept ids.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rekindle.kernels.blocks import Gradients, product_
from rekindle.kernels.call import Call
from rekindle.kernels.closed_form import parts_of
from rekindle.kernels.targets import KernelTargets, LossSettings, target_masses

MAX_LOGITS = 4096  # N·V; above it passes over the logits cost more than the operations' overhead
# The least probability whose logarithm and reciprocal are accurate to the last bits.
MIN_PROBABILITY = 1e-30

Losses = tuple[Tensor, Tensor, Tensor]


def is_small(call: Call) -> bool:
    """Return whether a call may be computed here; its tensors' values may still rule it out."""
    student, targets, whole, settings, _ = call
    rows, kept = targets.ids.shape
    return (
        settings.full
        and 0 < rows * student.vocabulary <= MAX_LOGITS
        and kept > 0
        and targets.weight is None
        and targets.probs.dim() == 2
        and whole.states is None
        and settings.reduction != "none"
        and settings.softcap is None
        and settings.logit_scale == 1.0
    )


def small_losses(call: Call) -> tuple[Losses, Gradients] | None:
    """Return (loss, ce, kd) and the needed gradients; None if a probability is too near zero."""
    student, targets, _, settings, computation = call
    dtype, needs_grad = student.compute_dtype, computation.needs_grad
    x, w = student.inputs, student.weight
    if w is None:
        z = x if x.dtype == dtype else x.to(dtype)
    else:
        x, w = (t if t.dtype == dtype else t.to(dtype) for t in (x, w))
        z = torch.empty(len(x), len(w), dtype=dtype)
        product_(z, x, w.t())
        if student.bias is not None:
            z.add_(student.bias)
    computed = _losses(z, targets, settings, any(needs_grad))
    if computed is None:
        return None
    losses, gradient = computed.losses, computed.gradient
    if gradient is None:
        return losses, (None, None, None)
    if w is None:
        logits = student.inputs
        return losses, (
            gradient if logits.dtype == dtype else gradient.to(logits.dtype),
            None,
            None,
        )
    dx, dw = (
        torch.empty_like(x) if needs_grad[0] else None,
        torch.empty_like(w) if needs_grad[1] else None,
    )
    if dx is not None:
        product_(dx, gradient, w)
    if dw is not None:
        product_(dw, gradient.t(), x)
    sums = (dx, dw, gradient.sum(0) if needs_grad[2] else None)
    pairs = zip(sums, student, strict=True)
    dx, dw, db = (t if t is None or tensor is None else t.to(tensor.dtype) for t, tensor in pairs)
    return losses, (dx, dw, db)


class _Computed(NamedTuple):
    losses: Losses
    gradient: Tensor | None  # [N,V]: of the loss with respect to the logits


def _losses(
    z: Tensor, targets: KernelTargets, settings: LossSettings, needs_grad: bool
) -> _Computed | None:
    """Return the losses of logits [N,V], which are not changed, and the gradient if needed."""
    tau, ids, labels = settings.temperature, targets.ids, targets.labels
    if targets.tail is not None and settings.tail == "bucket" and targets.probs.dtype == z.dtype:
        q = torch.cat([targets.probs, targets.tail[:, None]], 1)
    else:
        q, has_target = target_masses(targets, settings.tail, z.dtype, is_full=True)
        if has_target is not None and not bool(has_target.all()):
            return None
    reduction, scale = (
        (torch.mean, 1.0 / len(z)) if settings.reduction == "mean" else (torch.sum, 1.0)
    )
    shares = torch.softmax(z if tau == 1.0 else z / tau, 1)
    inside = shares.gather(1, ids)
    parts, at_one, label = [inside], shares, ids
    if labels is not None:
        label = labels[:, None]
        if tau != 1.0:
            at_one = torch.softmax(z, 1)
        parts.append(at_one.gather(1, label))
    shares.scatter_(1, ids, 0.0)
    rest = shares.sum(1, keepdim=True)
    parts.insert(1, rest)
    p = torch.cat(parts, 1)
    if not float(p.amin()) > MIN_PROBABILITY:  # also true for NaN
        return None
    log_p = p.log()
    if labels is not None:
        ce = reduction(log_p[:, -1]).neg_()
        p, log_p = p[:, :-1], log_p[:, :-1]
    value, gradient = parts_of(q, p, log_p, settings)
    kd = reduction(value)
    factor = settings.kd_factors[0]
    loss = kd * factor
    if labels is None:
        ce = torch.zeros_like(kd)
    else:
        loss = loss.add_(ce, alpha=settings.ce_weight)
    if not needs_grad:
        return _Computed((loss, ce, kd), None)
    gradient = gradient.mul_(factor * scale / tau)
    listed, rest_factor = gradient[:, :-1], gradient[:, -1:] / rest
    if labels is None:
        return _Computed((loss, ce, kd), shares.mul_(rest_factor).scatter_(1, ids, listed))
    ce_factor = settings.ce_weight * scale
    if at_one is shares:
        shares.mul_(rest_factor.add_(ce_factor)).scatter_(
            1, ids, listed.add(inside, alpha=ce_factor)
        )
    else:
        shares = at_one.mul_(ce_factor).addcmul_(shares, rest_factor).scatter_add_(1, ids, listed)
    return _Computed((loss, ce, kd), shares.scatter_(1, label, -ce_factor, reduce="add"))
