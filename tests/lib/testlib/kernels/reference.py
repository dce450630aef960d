"""The loss as plain differentiable PyTorch: the definition by which faster paths are judged.

Written to be read and trusted, not to be fast: it may hold several [N,V] tensors, and must not
share arithmetic with the closed forms it judges. Gradients come from autograd.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rekindle.kernels.targets import (
    LOG_OF_ZERO,
    KernelTargets,
    LossSettings,
    loss_scales,
    target_masses,
)


def loss_settings(kd_weight: float = 1.0, **options: Any) -> LossSettings:
    """Return the settings of a call with one teacher and these arguments of `kd_loss`."""
    return LossSettings(kd_weights=(kd_weight,), **options)


def reference_losses(
    logits: Tensor, targets: KernelTargets, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, ce, kd): scalars, or [N] each for reduction "none"; `loss` has the gradient.

    logits [N,V] in float64 are computed in float64, everything else in float32. Rows of weight 0
    are left out before any arithmetic, so whatever they contain (NaN, too) has a gradient of
    exactly zero.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ce_scale, kd_scale = loss_scales(targets, settings, dtype)
    rows = targets.active().nonzero()[:, 0]
    kept = targets.take(rows)
    z = _transformed(logits[rows].to(dtype), settings)
    ce_rows = _cross_entropy(z, kept, settings) * ce_scale[rows]
    kd_rows = _divergence(z, kept, settings) * kd_scale[rows]
    (kd_weight,) = settings.kd_weights
    kd_factor = kd_weight * settings.temperature**2
    loss_rows = settings.ce_weight * ce_rows + kd_factor * kd_rows
    if settings.reduction != "none":
        return loss_rows.sum(), ce_rows.sum().detach(), kd_rows.sum().detach()
    empty = z.new_zeros(logits.shape[0])
    return (
        empty.index_add(0, rows, loss_rows),
        empty.index_add(0, rows, ce_rows.detach()),
        empty.index_add(0, rows, kd_rows.detach()),
    )


def _transformed(z: Tensor, settings: LossSettings) -> Tensor:
    if settings.logit_scale != 1.0:
        z = z * settings.logit_scale
    if settings.softcap is not None:
        # an excluded id stays excluded
        capped = settings.softcap * torch.tanh(z / settings.softcap)
        z = torch.where(z == -math.inf, z, capped)
    return z


def _cross_entropy(z: Tensor, targets: KernelTargets, settings: LossSettings) -> Tensor:
    if targets.labels is None:
        return z.new_zeros(z.shape[0])
    labelled = targets.labelled(settings.ignore_index)
    label = torch.where(labelled, targets.labels, 0).long()
    log_p = _without_infinity(F.log_softmax(z, 1).gather(1, label[:, None])[:, 0])
    return torch.where(labelled, -log_p, 0.0)


def _divergence(z: Tensor, targets: KernelTargets, settings: LossSettings) -> Tensor:
    q, has_target = target_masses(targets, settings.tail, z.dtype)
    assert has_target is not None
    q, q_rest = q[:, :-1], q[:, -1]
    log_p, log_p_rest = _student(z / settings.temperature, targets.ids)
    # If every possible id is listed, the rest is no outcome: any target mass there is rounding.
    q_rest = torch.where(log_p_rest == -math.inf, 0.0, q_rest)
    q = torch.cat([q, q_rest[:, None]], 1)
    log_p = torch.cat([log_p, log_p_rest[:, None]], 1)
    listed = F.pad(targets.ids >= 0, (0, 1), value=True)
    possible = (log_p != -math.inf) & listed
    log_p = _without_infinity(log_p)
    p = torch.where(possible, log_p.exp(), 0.0)
    own = (settings.skew,) if settings.divergence == "skew_kl" else ()
    terms = _TERMS[settings.divergence](q, _log_of_target(q), p, log_p, *own)
    return torch.where(has_target, torch.where(listed, terms, 0.0).sum(1), 0.0)


def _student(scaled: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p of the listed ids [N,K] (-inf at padding) and of all others together [N]."""
    columns = torch.where(ids >= 0, ids, scaled.shape[1]).long()
    padded = F.pad(scaled, (0, 1), value=-math.inf)
    log_p = F.log_softmax(padded, 1).gather(1, columns)
    others = padded.scatter(1, columns, -math.inf)
    reachable = (others != -math.inf).any(1)
    others = torch.where(reachable[:, None], others, 0.0)
    log_rest = others.logsumexp(1) - padded.logsumexp(1)
    return log_p, torch.where(reachable, log_rest, -math.inf)


def _without_infinity(log_p: Tensor) -> Tensor:
    """Replace −inf by a constant: an impossible outcome has no gradient."""
    return torch.where(log_p == -math.inf, LOG_OF_ZERO, log_p)


def _log_of_target(q: Tensor) -> Tensor:
    return torch.where(q > 0, torch.where(q > 0, q, 1.0).log(), LOG_OF_ZERO)


def _forward_kl(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> Tensor:
    return q * (log_q - log_p)


def _reverse_kl(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> Tensor:
    return p * (log_p - log_q)


def _jensen_shannon(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> Tensor:
    # log of the midpoint without the midpoint: q + p underflows while both logarithms are still
    # exact
    log_m = torch.logaddexp(log_q, log_p) - math.log(2.0)
    return 0.5 * (q * (log_q - log_m) + p * (log_p - log_m))


def _total_variation(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> Tensor:
    return 0.5 * (p - q).abs()  # autograd's sign(0) is 0


def _skew_kl(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor, skew: float) -> Tensor:
    # KL(q ‖ αq + (1−α)p): Ko et al. 2024, whose p is the teacher and q the student
    log_m = torch.logaddexp(log_q + math.log(skew), log_p + math.log1p(-skew))
    return q * (log_q - log_m)


_TERMS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jensen_shannon,
    "tvd": _total_variation,
    "skew_kl": _skew_kl,
}
