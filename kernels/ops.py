"""The loss for autograd, autocast and torch.compile: a function and a registered operator.

An eager call runs an autograd.Function; under tracing the operator stands in the graph instead.
`rekindle::kd_loss` returns (loss, ce, kd) and the gradients of the loss, formed in the same pass.
`rekindle::kd_loss_backward` forms the gradients for an upstream gradient: for reduction "none", and
when backward runs twice through a graph. None of a loss's arithmetic is here.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rekindle.kernels.blocks import Gradients, rows_apart
from rekindle.kernels.blockwise import blockwise, fused_head
from rekindle.kernels.call import (
    ARGUMENTS,
    SCHEMA,
    TENSORS,
    Call,
    Computation,
    GradientFlags,
    StudentLogits,
)
from rekindle.kernels.closed_form import BlockLosses, Coefficients
from rekindle.kernels.small import is_small, small_losses
from rekindle.kernels.targets import TRITON_INSTALLED, LossSettings, loss_scales


def losses(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, ce, kd): scalars, or [N] for "none"; only `loss` carries a gradient."""
    enabled = torch.is_grad_enabled()
    call = call.with_needs_grad(
        [enabled and t is not None and t.requires_grad for t in call.student]
    )
    if _is_traced(call):
        loss, ce, kd, *_ = _kd_loss(*call.flat())
        return loss, ce.detach(), kd.detach()
    if not any(call.computation.needs_grad):
        return _compute(call, None)[0]
    loss, ce, kd = _Loss.apply(*call.student, call)
    return loss, ce, kd


_EAGER_TYPES = {Tensor, torch.nn.Parameter, float, int, type(None)}


def _is_traced(call: Call) -> bool:
    """Return whether the call is traced or transformed: only then is the operator worth its cost.

    A call of thirty arguments through `torch.library` takes half a millisecond longer.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return not {type(value) for part in call[:3] for value in part} <= _EAGER_TYPES


# ---- what it does -------------------------------------------------------------------------------

Losses = tuple[Tensor, Tensor, Tensor]  # loss, ce, kd


def _compute(call: Call, upstream: Tensor | None) -> tuple[Losses, Gradients]:
    """Return the reduced losses and the gradients that are needed; with an upstream,
    only the latter matter.
    """
    dtype = call.student.compute_dtype
    if call.computation.impl == "triton":
        reduced, gradients = _compute_fused(call, upstream)
        if reduced is None:
            return (upstream, upstream, upstream), gradients  # type: ignore[return-value]
        if dtype != torch.float32:  # for float64 inputs under autocast
            reduced = reduced[0].to(dtype), reduced[1].to(dtype), reduced[2].to(dtype)
        return reduced, gradients
    if is_small(call):
        small = small_losses(call)
        if small is not None:
            if upstream is not None:
                _scale_([g for g in small[1] if g is not None], upstream)
            return small
    scales = loss_scales(call.targets, call.settings, dtype)
    factors = None
    if any(call.computation.needs_grad):
        row_scales = scales if upstream is None else (scales[0] * upstream, scales[1] * upstream)
        factors = _coefficients(call.settings, *row_scales)
    losses, gradients = blockwise(call, factors)
    return _reduce(losses, scales, call), gradients


def _compute_fused(call: Call, upstream: Tensor | None) -> tuple[Losses | None, Gradients]:
    if call.student.weight is not None:
        return fused_head(call, upstream)
    from rekindle.kernels.triton_rows import RowKernel

    inputs, needs_grad = call.student.inputs, any(call.computation.needs_grad)
    gradient = _like(inputs)  # scratch if no gradient is needed
    kernel = RowKernel(call.targets, call.settings, needs_grad, upstream)
    kernel.run(inputs, gradient, slice(0, len(inputs)))
    reduced = kernel.losses() if upstream is None else None
    return reduced, (gradient if needs_grad else None, None, None)


def _coefficients(settings: LossSettings, ce: Tensor, kd: Tensor) -> Coefficients:
    """Return each row's factors of CE and D in the loss, from its factors in the reported ce and
    kd.
    """
    kds = [kd * factor for factor in settings.kd_factors]
    return Coefficients(ce * settings.ce_weight, kds[0] if len(kds) == 1 else torch.stack(kds, 1))


def _reduce(row_losses: BlockLosses, scales: tuple[Tensor, Tensor], call: Call) -> Losses:
    """Return (loss, ce, kd) from the unweighted losses of N rows."""
    settings, labelled = call.settings, call.targets.labels is not None
    (ce, kd), (ce_scale, kd_scale) = row_losses, scales
    several = kd.dim() == 2
    kd = kd * (kd_scale[:, None] if several else kd_scale)
    ce = ce * ce_scale if labelled else ce
    if settings.reduction != "none":
        ce, kd = ce.sum(), kd.sum(0) if several else kd.sum()
    factors = settings.kd_factors
    kds_per_teacher = kd.unbind(-1) if several else [kd]
    loss = kds_per_teacher[0] * factors[0]
    for value, factor in zip(kds_per_teacher[1:], factors[1:], strict=True):
        loss = loss + value * factor
    return settings.ce_weight * ce + loss if labelled else loss, ce, kd


def _like(logits: Tensor) -> Tensor:
    """Return memory for a gradient with the logits' layout, so both are read in aligned steps."""
    rows, size = logits.shape
    return rows_apart(rows, size, logits.stride(0), logits.dtype, logits.device)


def _grads_in_forward(call: Call) -> GradientFlags:
    """Return the gradients formed in the forward pass: none if each row has its own
    upstream value.
    """
    return call.computation.needs_grad if call.settings.reduction != "none" else [False] * 3


def _fake_gradients(student: StudentLogits, needs_grad: GradientFlags) -> tuple[Tensor, ...]:
    """Return the gradients as the compiler sees them; empty where not needed."""
    inputs = student.inputs
    if student.weight is None:
        return _like(inputs) if needs_grad[0] else inputs.new_empty(0), *map(
            inputs.new_empty, (0, 0)
        )
    return tuple(
        t.new_empty(t.shape) if w and t is not None else inputs.new_empty(0)
        for t, w in zip(student, needs_grad, strict=True)
    )


# ---- how it is registered -----------------------------------------------------------------------

_LOSSES, _GRADIENTS = "Tensor, Tensor, Tensor", "Tensor, Tensor, Tensor"


def _without_none(call: Call, gradients: Gradients) -> list[Tensor]:
    """Return the gradients with empty tensors for those not needed: an operator must return
    tensors.
    """
    return [call.student.inputs.new_empty(0) if g is None else g for g in gradients]


@torch.library.custom_op(
    "rekindle::kd_loss", mutates_args=(), schema=f"({SCHEMA}) -> ({_LOSSES}, {_GRADIENTS})"
)
def _kd_loss(*flat: object) -> tuple[Tensor, ...]:
    call = Call.of(flat)
    reduced, gradients = _compute(call.with_needs_grad(_grads_in_forward(call)), None)
    return *reduced, *_without_none(call, gradients)


@_kd_loss.register_fake
def _(*flat: object) -> tuple[Tensor, ...]:
    call = Call.of(flat)
    inputs, dtype = call.student.inputs, call.student.compute_dtype
    shape = inputs.shape[:1] if call.settings.reduction == "none" else ()
    teachers = len(call.settings.kd_weights)
    kd_shape = shape if teachers == 1 else (*shape, teachers)
    fakes = [inputs.new_empty(size, dtype=dtype) for size in (shape, shape, kd_shape)]
    return *fakes, *_fake_gradients(call.student, _grads_in_forward(call))


@torch.library.custom_op(
    "rekindle::kd_loss_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {SCHEMA}) -> ({_GRADIENTS})",
)
def _kd_loss_backward(upstream: Tensor, *flat: object) -> tuple[Tensor, ...]:
    call = Call.of(flat)
    return tuple(_without_none(call, _compute(call, upstream)[1]))


@_kd_loss_backward.register_fake
def _(upstream: Tensor, *flat: object) -> tuple[Tensor, ...]:
    call = Call.of(flat)
    return _fake_gradients(call.student, call.computation.needs_grad)


class _Context(Protocol):
    """What the forward pass keeps for the backward pass."""

    saved_tensors: tuple[Tensor | None, ...]  # the tensors, which come first in the call
    rest: Sequence[object]  # the call's other arguments
    needs_grad: GradientFlags
    gradients: list[Tensor | None] | None  # formed in the forward pass and not handed over yet

    def save_for_backward(self, *tensors: object) -> None:
        """Keep tensors for the backward pass."""


def _setup_context(ctx: _Context, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.rest, ctx.needs_grad = inputs[TENSORS:], Computation._make(inputs[-3:]).needs_grad
    is_scalar = any(ctx.needs_grad) and output[0].dim() == 0
    # detached: an output saved on its own graph node would keep that node alive
    ctx.gradients = [g.detach() for g in output[3:]] if is_scalar else None


def _backward(context: _Context, upstream: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    gradients: Sequence[Tensor | None] | None = _take_formed(context, upstream)
    if gradients is None:
        flat = (*context.saved_tensors, *context.rest)
        if type(upstream) is Tensor:
            gradients = _compute(Call.of(flat), upstream)[1]
        else:
            gradients = _kd_loss_backward(upstream, *flat)
    needed = [g if w else None for g, w in zip(gradients, context.needs_grad, strict=True)]
    return (*needed, *[None] * (len(ARGUMENTS) - len(needed)))


def _take_formed(context: _Context, upstream: Tensor) -> list[Tensor | None] | None:
    """Return the forward pass's gradients times `upstream`; None after the first call.

    They are handed over, not copied: autograd may make one a parameter's .grad and add to it in
    place. A second backward through the same graph must therefore form them again.
    """
    gradients, context.gradients = context.gradients, None
    if gradients is None:
        return None
    if type(upstream) is not Tensor:  # traced: values saved by a graph must not be overwritten
        return [None if g is None else (g * upstream).to(g.dtype) for g in gradients]
    _scale_([g for g in gradients if g is not None], upstream)
    return gradients


def _scale_(values: list[Tensor], factor: Tensor) -> None:
    """Multiply values by a scalar factor in place; it is usually 1, but on a device that is not
    read.
    """
    if factor.device.type != "cpu" and TRITON_INSTALLED:
        from rekindle.kernels.triton_rows import scale_unless_one

        for value in values:
            scale_unless_one(value, factor)
    elif factor.device.type != "cpu" or float(factor) != 1.0:
        for value in values:
            value.mul_(factor)


_kd_loss.register_autograd(_backward, setup_context=_setup_context)


class _Loss(torch.autograd.Function):
    """The operator's autograd without the operator; eager calls run this."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call
    ) -> Losses:
        in_forward = _grads_in_forward(call)
        needs_grad = call.computation.needs_grad
        reduced, gradients = _compute(
            call if in_forward is needs_grad else call.with_needs_grad(in_forward), None
        )
        flat = call.flat()
        ctx.save_for_backward(*flat[:TENSORS])
        ctx.rest, ctx.needs_grad = flat[TENSORS:], needs_grad
        is_scalar = call.settings.reduction != "none"
        ctx.gradients = list(gradients) if is_scalar else None
        ctx.mark_non_differentiable(*reduced[1:])
        ctx.set_materialize_grads(False)
        return reduced

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        return (None,) * 4 if upstream is None else (*_backward(ctx, upstream)[:3], None)
