"""The losses against whole distributions, as registered operators; the twin of `ops`.

`kd_whole` takes logits, or hidden states and a matrix, and returns (loss, ce, kd) and, formed in
the same go, the gradients of the loss; `kd_whole_backward` forms them for an upstream gradient
instead. No arithmetic of a loss is here.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rekindle.kernels.chunked import compute_dtype, linear_blockwise, logits_blockwise
from rekindle.kernels.closed_form import BlockLosses
from rekindle.kernels.hidden import DenseTargets, HiddenTargets, TeacherBlocks, WholeTargets
from rekindle.kernels.ops import (
    SETTINGS,
    fake_gradients,
    fake_losses,
    loss_factors,
    reduced,
    stored_gradients,
)
from rekindle.kernels.targets import Objective, SparseTargets

_INPUTS = "Tensor inputs, Tensor? weight, Tensor? bias"  # without a weight, inputs are logits
_CALL = (
    "Tensor states, Tensor? scale, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? labels, "
    "Tensor? row_weight, float? teacher_softcap, float teacher_scale, "
    f"{SETTINGS}, ScalarType product_dtype"
)
TENSORS = 6  # at the head of _CALL
ARGUMENTS = _CALL.count(",") + 2  # past the inputs: _CALL and `wanted`


def whole_losses(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    teacher: WholeTargets,
    rows: SparseTargets,
    objective: Objective,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kd) of logits [N,V], or of inputs [N,H] @ weight.T + bias.

    Scalars, or [N] for "none"; `loss` carries the gradient. `rows` hold labels and weights.
    """
    needs = [t is not None and t.requires_grad for t in (inputs, weight, bias)]
    wanted = [torch.is_grad_enabled() and n for n in needs]
    if isinstance(teacher, DenseTargets):
        teacher = HiddenTargets(teacher.log_probs, None, None)  # type: ignore[arg-type]
    tensors = (teacher.states, teacher.scale, teacher.weight, teacher.bias)
    call = (
        *(None if t is None else t.detach() for t in tensors),
        rows.labels,
        rows.weight,
        teacher.softcap,
        float(teacher.logit_scale),
        *dataclasses.astuple(objective),
        product_dtype,
    )
    loss, ce, kd, *_ = _kd_whole(inputs, weight, bias, *call, wanted)
    return loss, ce.detach(), kd.detach()


def _unpacked(call: tuple[Any, ...]) -> tuple[WholeTargets, SparseTargets, Objective]:
    states, scale, weight, bias, labels, row_weight, softcap, logit_scale, *settings, _ = call
    none = torch.empty(len(states), 0, dtype=torch.int64, device=states.device)
    rows = SparseTargets(none, none, None, labels, row_weight)
    if weight is None:
        return DenseTargets(states), rows, Objective(*settings)
    teacher = HiddenTargets(states, scale, weight, bias, softcap, logit_scale)
    return teacher, rows, Objective(*settings)


def _run(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    call: tuple[Any, ...],
    wanted: list[bool],
    upstream: Tensor | None,
) -> tuple[BlockLosses, list[Tensor]]:
    targets, rows, objective = _unpacked(call)
    dtype = compute_dtype(inputs) if weight is None else compute_dtype(inputs, weight)
    factors = loss_factors(rows, objective, dtype, upstream) if any(wanted) else None
    teacher = TeacherBlocks(targets, dtype, call[-1])
    gradients: tuple[Tensor | None, ...]
    if weight is None:
        losses, gradient = logits_blockwise(inputs, rows, objective, factors, teacher)
        gradients = (gradient, None, None)
    else:
        flags = (wanted[0], wanted[1], wanted[2])
        losses, gradients = linear_blockwise(
            inputs, weight, bias, rows, objective, factors, flags, teacher, call[-1]
        )
    return losses, [inputs.new_empty(0) if g is None else g for g in gradients]


def _at_once(objective: Objective, wanted: list[bool]) -> list[bool]:
    """Which gradients the forward pass forms: none where the upstream differs from row to row."""
    return wanted if objective.reduction != "none" else [False] * 3


@torch.library.custom_op(
    "rekindle::kd_whole",
    mutates_args=(),
    schema=f"({_INPUTS}, {_CALL}, bool[] wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _kd_whole(
    inputs: Tensor, weight: Tensor | None, bias: Tensor | None, *call: Any
) -> tuple[Tensor, ...]:
    *call_, wanted = call
    _, rows, objective = _unpacked(tuple(call_))
    now = _at_once(objective, wanted)
    losses, gradients = _run(inputs, weight, bias, tuple(call_), now, None)
    return *reduced(losses, rows, objective), *gradients


@_kd_whole.register_fake
def _(inputs: Tensor, weight: Tensor | None, bias: Tensor | None, *call: Any) -> tuple[Tensor, ...]:
    *call_, wanted = call
    _, _, objective = _unpacked(tuple(call_))
    losses = fake_losses(inputs, objective, inputs, *([] if weight is None else [weight]))
    now = _at_once(objective, wanted)
    return *losses, *fake_gradients(inputs, weight, bias, now)


@torch.library.custom_op(
    "rekindle::kd_whole_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {_INPUTS}, {_CALL}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def _kd_whole_backward(
    upstream: Tensor, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, *call: Any
) -> tuple[Tensor, ...]:
    *call_, wanted = call
    return tuple(_run(inputs, weight, bias, tuple(call_), wanted, upstream)[1])


@_kd_whole_backward.register_fake
def _(
    upstream: Tensor, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, *call: Any
) -> tuple[Tensor, ...]:
    return tuple(fake_gradients(inputs, weight, bias, call[-1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *call, wanted = inputs
    ctx.wanted = tuple(wanted)
    ctx.settings = call[3 + TENSORS :]
    ctx.save_for_backward(*call[: 3 + TENSORS])
    at_once = any(wanted) and Objective(*ctx.settings[2:-1]).reduction != "none"
    # detached: an output that is kept on its own graph node would keep that node alive
    ctx.gradients = [g.detach() for g in output[3:]] if at_once else None


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = stored_gradients(ctx, upstream)
    if gradients is None:
        call = (*ctx.saved_tensors, *ctx.settings, list(ctx.wanted))
        gradients = list(_kd_whole_backward(upstream, *call))
    kept = [g if w else None for g, w in zip(gradients, ctx.wanted, strict=True)]
    return (*kept, *[None] * ARGUMENTS)


_kd_whole.register_autograd(_backward, setup_context=_setup)
