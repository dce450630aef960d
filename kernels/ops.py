"""The losses as registered operators: what autograd, autocast and torch.compile see of them.

`kd_logits` and `kd_linear` return (loss, ce, kd) and, formed in the same go, the gradients of the
loss. Their `…_backward` form the gradients for an upstream gradient instead: for reduction
"none", and when a graph is walked backward twice. No arithmetic of a loss is here.
"""

import dataclasses
import importlib.util
from typing import Any

import torch
from torch import Tensor

from rekindle.kernels.chunked import Gradients, compute_dtype, linear_blockwise, logits_blockwise
from rekindle.kernels.closed_form import BlockLosses, Coefficients
from rekindle.kernels.targets import Objective, SparseTargets, loss_scales

SETTINGS = (  # the fields of Objective
    "float temperature, float ce_weight, float kd_weight, str divergence, str tail_rule, "
    "int ignore_index, str reduction, float? softcap, float logit_scale, int kept, int planes"
)
_CALL = (
    "Tensor ids, Tensor probs, Tensor? tail, Tensor? labels, Tensor? row_weight, Tensor? high, "
    f"{SETTINGS}, str impl"
)
_HEAD = f"Tensor hidden, Tensor weight, Tensor? bias, {_CALL}, ScalarType product_dtype"
_LOSSES = "Tensor, Tensor, Tensor"
TENSORS = len(SparseTargets._fields)
ARGUMENTS = _CALL.count(",") + 2  # of an operator past its inputs: _CALL and `wanted`


def logits_losses(
    logits: Tensor, targets: SparseTargets, objective: Objective, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kd) of logits [N,V]: scalars, or [N] for "none"; `loss` carries the gradient."""
    wanted = torch.is_grad_enabled() and logits.requires_grad
    loss, ce, kd, _ = _kd_logits(logits, *_packed(targets, objective, impl), wanted)
    return loss, ce.detach(), kd.detach()


def linear_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: SparseTargets,
    objective: Objective,
    impl: str,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kd) of hidden @ weight.T + bias; as `logits_losses`."""
    needs = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
    wanted = [torch.is_grad_enabled() and n for n in needs]
    loss, ce, kd, *_ = _kd_linear(
        hidden, weight, bias, *_packed(targets, objective, impl), product_dtype, wanted
    )
    return loss, ce.detach(), kd.detach()


def _packed(targets: SparseTargets, objective: Objective, impl: str) -> tuple[Any, ...]:
    return (*targets, *dataclasses.astuple(objective), impl)


def _unpacked(call: tuple[Any, ...]) -> tuple[SparseTargets, Objective, str]:
    return SparseTargets(*call[:TENSORS]), Objective(*call[TENSORS:-1]), call[-1]


def reduced(
    losses: BlockLosses, targets: SparseTargets, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kd) of unweighted losses [N]."""
    ce_scale, kd_scale = loss_scales(targets, objective, losses.kd.dtype)
    ce, kd = losses.ce * ce_scale, losses.kd * kd_scale
    if objective.reduction != "none":
        ce, kd = ce.sum(), kd.sum()
    return objective.ce_weight * ce + objective.kd_weight * objective.temperature**2 * kd, ce, kd


def loss_factors(
    targets: SparseTargets, objective: Objective, dtype: torch.dtype, upstream: Tensor | None
) -> Coefficients:
    """What each row's CE and D are multiplied by in the loss, times the upstream gradient."""
    ce, kd = loss_scales(targets, objective, dtype)
    if upstream is not None:
        ce, kd = ce * upstream, kd * upstream
    return Coefficients(
        ce * objective.ce_weight, kd * (objective.kd_weight * objective.temperature**2)
    )


def fake_losses(reference: Tensor, objective: Objective, *inputs: Tensor) -> list[Tensor]:
    """(loss, ce, kd) as the compiler sees them; N is the reference's first size."""
    shape = reference.shape[:1] if objective.reduction == "none" else ()
    return [reference.new_empty(shape, dtype=compute_dtype(*inputs)) for _ in range(3)]


# ---- from logits
# -------------------------------------------------------------------------------------------


def _run_logits(
    logits: Tensor, call: tuple[Any, ...], wanted: bool, upstream: Tensor | None
) -> tuple[BlockLosses, Tensor]:
    targets, objective, impl = _unpacked(call)
    dtype = compute_dtype(logits)
    factors = loss_factors(targets, objective, dtype, upstream) if wanted else None
    if impl == "triton":
        from rekindle.kernels.fused import losses_of_rows

        gradient = _gradient_like(logits, True)
        return losses_of_rows(logits, gradient, targets, objective, factors), gradient
    losses, gradient_or_none = logits_blockwise(logits, targets, objective, factors)
    return losses, logits.new_empty(0) if gradient_or_none is None else gradient_or_none


def _gradient_like(logits: Tensor, wanted: bool) -> Tensor:
    """Memory for a gradient, laid out as the logits are, so that both are read in aligned steps."""
    if not wanted:
        return logits.new_empty(0)
    return torch.empty_strided(
        logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device
    )


@torch.library.custom_op(
    "rekindle::kd_logits",
    mutates_args=(),
    schema=f"(Tensor logits, {_CALL}, bool wanted) -> ({_LOSSES}, Tensor)",
)
def _kd_logits(logits: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *call_, wanted = call
    targets, objective, _ = _unpacked(tuple(call_))
    now = wanted and objective.reduction != "none"
    losses, gradient = _run_logits(logits, tuple(call_), now, None)
    return *reduced(losses, targets, objective), gradient if now else logits.new_empty(0)


@_kd_logits.register_fake
def _(logits: Tensor, *call: Any) -> tuple[Tensor, ...]:
    *call_, wanted = call
    _, objective, _ = _unpacked(tuple(call_))
    now = wanted and objective.reduction != "none"
    return *fake_losses(logits, objective, logits), _gradient_like(logits, now)


@torch.library.custom_op(
    "rekindle::kd_logits_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor logits, {_CALL}) -> Tensor",
)
def _kd_logits_backward(upstream: Tensor, logits: Tensor, *call: Any) -> Tensor:
    return _run_logits(logits, call, True, upstream)[1]


@_kd_logits_backward.register_fake
def _(upstream: Tensor, logits: Tensor, *call: Any) -> Tensor:
    return _gradient_like(logits, True)


def _setup_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, *call, wanted = inputs
    _stash(ctx, (logits,), call, (wanted,), output[3:])


def _backward_logits(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = stored_gradients(ctx, upstream)
    if gradients is None:
        (logits,), call = _restored(ctx, 1)
        gradients = [_kd_logits_backward(upstream, logits, *call)]
    return (*gradients, *[None] * ARGUMENTS)


_kd_logits.register_autograd(_backward_logits, setup_context=_setup_logits)


# ---- from hidden states
# ------------------------------------------------------------------------------------


def _run_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: tuple[Any, ...],
    product_dtype: torch.dtype,
    wanted: list[bool],
    upstream: Tensor | None,
) -> tuple[BlockLosses, list[Tensor]]:
    targets, objective, impl = _unpacked(call)
    dtype = compute_dtype(hidden, weight)
    factors = loss_factors(targets, objective, dtype, upstream) if any(wanted) else None
    gradients: Gradients
    flags = (wanted[0], wanted[1], wanted[2])
    if impl == "triton":
        from rekindle.kernels.fused_linear import linear_fused

        losses, gradients = linear_fused(
            hidden, weight, bias, targets, objective, factors, flags, product_dtype
        )
    else:
        losses, gradients = linear_blockwise(
            hidden, weight, bias, targets, objective, factors, flags
        )
    return losses, [hidden.new_empty(0) if g is None else g for g in gradients]


def fake_gradients(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: list[bool]
) -> list[Tensor]:
    """The gradients of a head's inputs as the compiler sees them; empty where not wanted."""
    return [
        t.new_empty(t.shape) if w and t is not None else hidden.new_empty(0)
        for t, w in zip((hidden, weight, bias), wanted, strict=True)
    ]


@torch.library.custom_op(
    "rekindle::kd_linear",
    mutates_args=(),
    schema=f"({_HEAD}, bool[] wanted) -> ({_LOSSES}, Tensor, Tensor, Tensor)",
)
def _kd_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *call: Any
) -> tuple[Tensor, ...]:
    *call_, product_dtype, wanted = call
    targets, objective, _ = _unpacked(tuple(call_))
    now = wanted if objective.reduction != "none" else [False] * 3
    losses, gradients = _run_linear(hidden, weight, bias, tuple(call_), product_dtype, now, None)
    return *reduced(losses, targets, objective), *gradients


@_kd_linear.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *call: Any) -> tuple[Tensor, ...]:
    *call_, _, wanted = call
    _, objective, _ = _unpacked(tuple(call_))
    now = wanted if objective.reduction != "none" else [False] * 3
    losses = fake_losses(hidden, objective, hidden, weight)
    return *losses, *fake_gradients(hidden, weight, bias, now)


@torch.library.custom_op(
    "rekindle::kd_linear_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {_HEAD}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def _kd_linear_backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *call: Any
) -> tuple[Tensor, ...]:
    *call_, product_dtype, wanted = call
    return tuple(
        _run_linear(hidden, weight, bias, tuple(call_), product_dtype, wanted, upstream)[1]
    )


@_kd_linear_backward.register_fake
def _(
    upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *call: Any
) -> tuple[Tensor, ...]:
    return tuple(fake_gradients(hidden, weight, bias, call[-1]))


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, *call, product_dtype, wanted = inputs
    ctx.product_dtype = product_dtype
    _stash(ctx, (hidden, weight, bias), call, wanted, output[3:])


def _backward_linear(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = stored_gradients(ctx, upstream)
    if gradients is None:
        inputs, call = _restored(ctx, 3)
        gradients = _kd_linear_backward(
            upstream, *inputs, *call, ctx.product_dtype, list(ctx.wanted)
        )
    kept = [g if w else None for g, w in zip(gradients, ctx.wanted, strict=True)]
    return (*kept, *[None] * (ARGUMENTS + 1))


_kd_linear.register_autograd(_backward_linear, setup_context=_setup_linear)


# ---- gradients kept between forward and backward
# -----------------------------------------------------------


def _stash(
    ctx: Any, inputs: tuple[Any, ...], call: list[Any], wanted: Any, gradients: tuple[Tensor, ...]
) -> None:
    ctx.wanted = tuple(wanted)
    ctx.settings = call[TENSORS:]
    ctx.save_for_backward(*inputs, *call[:TENSORS])
    at_once = any(wanted) and Objective(*call[TENSORS:-1]).reduction != "none"
    # detached: an output that is kept on its own graph node would keep that node alive
    ctx.gradients = [g.detach() for g in gradients] if at_once else None


def stored_gradients(ctx: Any, upstream: Tensor) -> list[Tensor] | None:
    """The gradients formed in the forward pass, times `upstream`; None after the first time.

    They are handed over, not copied: autograd may make one a parameter's .grad and add to it in
    place. A second backward through the same graph therefore forms them anew.
    """
    gradients, ctx.gradients = ctx.gradients, None
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
        from rekindle.kernels.fused import scale_unless_one

        scale_unless_one(values, factor)


def _restored(ctx: Any, inputs: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    saved = ctx.saved_tensors
    return saved[:inputs], (*saved[inputs:], *ctx.settings)
