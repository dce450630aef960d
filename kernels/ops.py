"""The loss as a registered operator: what autograd, autocast and torch.compile see of it.

`rekindle::kd_loss` returns (loss, ce, kd) and, formed in the same go, the gradients of the loss.
`rekindle::kd_loss_backward` forms them for an upstream gradient instead: for reduction "none", and
when a graph is walked backward twice. No arithmetic of a loss is here.
"""

import importlib.util
from typing import Protocol

import torch
from torch import Tensor

from rekindle.kernels.blocks import Gradients, rows_apart
from rekindle.kernels.blockwise import blockwise
from rekindle.kernels.call import (
    ARGUMENTS,
    SCHEMA,
    TENSORS,
    Call,
    Computation,
    StudentLogits,
    Wanted,
)
from rekindle.kernels.closed_form import BlockLosses, Coefficients
from rekindle.kernels.targets import LossSettings, SparseTargets, loss_scales


def losses(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kd): scalars, or [N] for "none"; `loss` carries the gradient."""
    enabled = torch.is_grad_enabled()
    wanted = [enabled and t is not None and t.requires_grad for t in call.student]
    loss, ce, kd, *_ = _kd_loss(*call.wanting(wanted).flat())
    return loss, ce.detach(), kd.detach()


# ---- what it does -------------------------------------------------------------------------------


def _run(call: Call, upstream: Tensor | None) -> tuple[BlockLosses, tuple[Tensor, ...]]:
    """The unweighted losses [N], and the wanted gradients; empty ones for the others."""
    inputs, dtype = call.student.inputs, call.student.compute_dtype
    gradients: Gradients
    factors = None
    if any(call.computation.wanted):
        factors = _loss_factors(call.targets, call.settings, dtype, upstream)
    if call.student.weight is None and call.computation.impl == "triton":
        from rekindle.kernels.triton_rows import losses_of_rows

        gradient = _like(inputs)  # scratch where it is not wanted
        found = losses_of_rows(inputs, gradient, call.targets, call.settings, factors)
        gradients = (gradient if factors is not None else None, None, None)
    else:
        found, gradients = blockwise(call, factors)
    return found, tuple(inputs.new_empty(0) if g is None else g for g in gradients)


def _reduced(
    found: BlockLosses, targets: SparseTargets, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kd) of unweighted losses [N]."""
    ce_scale, kd_scale = loss_scales(targets, settings, found.kd.dtype)
    ce, kd = found.ce * ce_scale, found.kd * kd_scale
    if settings.reduction != "none":
        ce, kd = ce.sum(), kd.sum()
    return settings.ce_weight * ce + settings.kd_weight * settings.temperature**2 * kd, ce, kd


def _loss_factors(
    targets: SparseTargets, settings: LossSettings, dtype: torch.dtype, upstream: Tensor | None
) -> Coefficients:
    """What each row's CE and D are multiplied by in the loss, times the upstream gradient."""
    ce, kd = loss_scales(targets, settings, dtype)
    if upstream is not None:
        ce, kd = ce * upstream, kd * upstream
    return Coefficients(
        ce * settings.ce_weight, kd * (settings.kd_weight * settings.temperature**2)
    )


def _like(logits: Tensor) -> Tensor:
    """Memory for a gradient, laid out as the logits are, so that both are read in aligned steps."""
    rows, size = logits.shape
    return rows_apart(rows, size, logits.stride(0), logits.dtype, logits.device)


def _at_once(call: Call) -> Wanted:
    """Which gradients the forward pass forms: none where the upstream differs from row to row."""
    return call.computation.wanted if call.settings.reduction != "none" else [False] * 3


def _fake_gradients(student: StudentLogits, wanted: Wanted) -> tuple[Tensor, ...]:
    """The gradients as the compiler sees them; empty where not wanted."""
    inputs = student.inputs
    if student.weight is None:
        return _like(inputs) if wanted[0] else inputs.new_empty(0), *map(inputs.new_empty, (0, 0))
    return tuple(
        t.new_empty(t.shape) if w and t is not None else inputs.new_empty(0)
        for t, w in zip(student, wanted, strict=True)
    )


# ---- how it is registered -----------------------------------------------------------------------

_LOSSES, _GRADIENTS = "Tensor, Tensor, Tensor", "Tensor, Tensor, Tensor"


@torch.library.custom_op(
    "rekindle::kd_loss", mutates_args=(), schema=f"({SCHEMA}) -> ({_LOSSES}, {_GRADIENTS})"
)
def _kd_loss(*flat: object) -> tuple[Tensor, ...]:
    call = Call.of(flat)
    found, gradients = _run(call.wanting(_at_once(call)), None)
    return *_reduced(found, call.targets, call.settings), *gradients


@_kd_loss.register_fake
def _(*flat: object) -> tuple[Tensor, ...]:
    call = Call.of(flat)
    inputs, dtype = call.student.inputs, call.student.compute_dtype
    shape = inputs.shape[:1] if call.settings.reduction == "none" else ()
    fakes = [inputs.new_empty(shape, dtype=dtype) for _ in range(3)]
    return *fakes, *_fake_gradients(call.student, _at_once(call))


@torch.library.custom_op(
    "rekindle::kd_loss_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {SCHEMA}) -> ({_GRADIENTS})",
)
def _kd_loss_backward(upstream: Tensor, *flat: object) -> tuple[Tensor, ...]:
    call = Call.of(flat)
    return _run(call, upstream)[1]


@_kd_loss_backward.register_fake
def _(upstream: Tensor, *flat: object) -> tuple[Tensor, ...]:
    call = Call.of(flat)
    return _fake_gradients(call.student, call.computation.wanted)


class _Context(Protocol):
    """What is kept from the forward pass for the backward one."""

    saved_tensors: tuple[Tensor | None, ...]  # at the head of the call
    rest: tuple[object, ...]  # of the call
    wanted: Wanted
    gradients: list[Tensor] | None  # formed in the forward pass, and not handed over yet

    def save_for_backward(self, *tensors: object) -> None:
        """Keep tensors."""


def _keep(ctx: _Context, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.rest, ctx.wanted = inputs[TENSORS:], Computation._make(inputs[-3:]).wanted
    formed = any(ctx.wanted) and output[0].dim() == 0  # one loss of all rows, not one of each
    # detached: an output that is kept on its own graph node would keep that node alive
    ctx.gradients = [g.detach() for g in output[3:]] if formed else None


def _backward(context: _Context, upstream: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    gradients = _formed(context, upstream)
    if gradients is None:
        gradients = _kd_loss_backward(upstream, *context.saved_tensors, *context.rest)
    kept = [g if w else None for g, w in zip(gradients, context.wanted, strict=True)]
    return (*kept, *[None] * (len(ARGUMENTS) - len(kept)))


def _formed(context: _Context, upstream: Tensor) -> list[Tensor] | None:
    """The gradients formed in the forward pass, times `upstream`; None after the first time.

    They are handed over, not copied: autograd may make one a parameter's .grad and add to it in
    place. A second backward through the same graph therefore forms them anew.
    """
    gradients, context.gradients = context.gradients, None
    if gradients is None:
        return None
    if type(upstream) is not Tensor:  # traced: a graph's saved values must not be written over
        return [(g * upstream).to(g.dtype) for g in gradients]
    for gradient in gradients:
        _scale_(gradient, upstream)
    return gradients


def _scale_(values: Tensor, factor: Tensor) -> None:
    """In place values · factor, a scalar that usually is 1; a device is not asked whether it is."""
    if values.device.type == "cpu":
        if factor != 1.0:
            values.mul_(factor)
    elif importlib.util.find_spec("triton") is None:
        values.mul_(factor)
    else:
        from rekindle.kernels.triton_rows import scale_unless_one

        scale_unless_one(values, factor)


_kd_loss.register_autograd(_backward, setup_context=_keep)
