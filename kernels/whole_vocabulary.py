"""Compute loss and exact gradient of a block against whole-vocabulary distributions; no autograd.

The twin of `closed_form` for teachers whose every probability is known. With p = softmax(z/τ), q
the teacher's and φ = ∂D/∂p, the gradient with respect to z/τ is p_j (φ_j − φ̄), φ̄ = Σ p φ.
Everything is computed in place: a call's memory is these [C,V] buffers. Shapes: C rows of the
block, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rekindle.kernels.closed_form import BlockLosses, Coefficients, logit, transform_
from rekindle.kernels.divergences import SKEWED
from rekindle.kernels.targets import LOG_OF_ZERO, LossSettings


def whole_buffers(settings: LossSettings, has_labels: bool) -> int:
    """Return how many [C,V] blocks are held at once, both models' logits included."""
    # two models' logits, one or two terms, and masks of a byte an entry
    terms = 2 if settings.divergence in ("jsd", SKEWED) else 1
    return 3 + terms + has_labels + (settings.softcap is not None)


def whole_loss_block(
    z: Tensor,
    log_q: Tensor,
    labels: Tensor | None,
    settings: LossSettings,
    coefficients: Coefficients | None,
) -> BlockLosses:
    """Return the losses of each row of raw logits z [C,V] against log-probabilities log_q [C,V] at
    τ.

    Both are private float32 or float64 buffers and are overwritten. With coefficients, z becomes
    the gradient of Σ coefficients.ce·CE + coefficients.kd·D with respect to the raw logits. labels
    [C] must lie in [0, V) where they count.
    """
    needs_gradient = coefficients is not None
    slope = transform_(z, settings.logit_scale, settings.softcap, keep_slope=needs_gradient)
    ce, ce_gradient = torch.zeros_like(z[:, 0]), None
    tau = settings.temperature
    if labels is not None:
        log_softmax_(z)  # a softmax does not tell z/τ − c from z/τ
        scale = None if coefficients is None else coefficients.ce
        ce, ce_gradient = _cross_entropy(z, labels, settings.ignore_index, scale)
    if tau != 1.0:
        z.div_(tau)
    if tau != 1.0 or labels is None:
        log_softmax_(z)
    impossible = z == -math.inf
    z.masked_fill_(impossible, LOG_OF_ZERO)
    log_q.masked_fill_(log_q == -math.inf, LOG_OF_ZERO)
    kd = _DIVERGENCES[settings.divergence](z, log_q, impossible, **settings.of_divergence)
    if coefficients is None:
        return BlockLosses(ce, kd)
    z.masked_fill_(impossible, 0.0).mul_(coefficients.kd[:, None] / tau)
    if ce_gradient is not None:
        z.add_(ce_gradient)
    if settings.logit_scale != 1.0:
        z.mul_(settings.logit_scale)
    if slope is not None:
        z.mul_(slope)
    return BlockLosses(ce, kd)


def log_softmax_(z: Tensor) -> Tensor:
    """Apply log-softmax in place, relative to the row's largest logit, so |z| = 1e4 loses nothing.

    A row of only -inf stays so.
    """
    peak = z.amax(1, keepdim=True)
    z.sub_(peak.masked_fill_(peak == -math.inf, 0.0))
    norm = z.exp().sum(1, keepdim=True).log_()
    return z.sub_(norm.masked_fill_(norm == -math.inf, 0.0))


def _cross_entropy(
    log_p: Tensor, labels: Tensor, ignore_index: int, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return CE [C] and, if `scale` [C] is given, its scaled gradient [C,V] with respect to the
    logits.
    """
    counts = labels != ignore_index
    ids = torch.where(counts, labels, 0)[:, None]
    of_label = log_p.gather(1, ids)[:, 0]
    possible = counts & (of_label != -math.inf)
    ce = torch.where(possible, -of_label, torch.where(counts, -LOG_OF_ZERO, 0.0))
    if scale is None:
        return ce, None
    factor = torch.where(possible, scale, 0.0)[:, None]
    return ce, log_p.exp().mul_(factor).scatter_add_(1, ids, -factor)


# Each function takes finite log p and log q [C,V], returns D [C], and leaves the gradient with
# respect to z/τ in log p's memory. Where the student cannot produce an id its term is a constant.


def _forward_kl(log_p: Tensor, log_q: Tensor, impossible: Tensor) -> Tensor:
    q = log_q.exp()
    value = log_q.sub_(log_p).mul_(q).sum(1)
    q.masked_fill_(impossible, 0.0)
    log_p.exp_().mul_(q.sum(1, keepdim=True)).sub_(q)
    return value


def _reverse_kl(log_p: Tensor, log_q: Tensor, impossible: Tensor) -> Tensor:
    p = log_p.exp()
    phi = log_p.sub_(log_q)
    value = torch.mul(p, phi, out=log_q).sum(1)
    # Subtracting the likeliest outcome's φ, as in `closed_form`, keeps φ − φ̄ from being the
    # difference of two large numbers in peaked rows.
    phi.sub_(phi.gather(1, p.argmax(1, keepdim=True)))
    mean = torch.mul(p, phi, out=log_q).sum(1, keepdim=True)
    phi.sub_(mean).mul_(p)
    return value


def _jensen_shannon(log_p: Tensor, log_q: Tensor, impossible: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_q, log_p).sub_(math.log(2.0))
    q = log_q.exp()
    value = log_q.sub_(log_m).mul_(q).sum(1)
    log_ratio = torch.sub(log_p, log_m, out=log_m)
    p = log_p.exp_()
    p_phi = log_ratio.mul_(p).mul_(0.5)
    total = p_phi.sum(1, keepdim=True)
    torch.addcmul(p_phi, p, total, value=-1, out=p)
    return 0.5 * value + total[:, 0]


def _total_variation(log_p: Tensor, log_q: Tensor, impossible: Tensor) -> Tensor:
    p = log_p.exp_()
    difference = torch.sub(p, log_q.exp_(), out=log_q)
    value = 0.5 * difference.abs().sum(1)
    phi = difference.sign_().mul_(0.5)  # sign(0) = 0
    mean = (p * phi).sum(1, keepdim=True)
    torch.mul(phi.sub_(mean), p, out=p)
    return value


def _skew_kl(log_p: Tensor, log_q: Tensor, impossible: Tensor, skew: float) -> Tensor:
    # As in `closed_form`.
    odds = torch.sub(log_p, log_q).sub_(logit(skew))
    p, q = log_p.exp_(), log_q.exp_()
    logarithm = torch.logaddexp(odds, torch.zeros_like(odds[:, :1])).add_(math.log(skew))
    value = -logarithm.mul_(q).sum(1)
    p_phi = odds.sigmoid_().mul_(q).neg_().masked_fill_(impossible, 0.0)
    total = p_phi.sum(1, keepdim=True)
    torch.addcmul(p_phi, p, total, value=-1, out=p)
    return value


_DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jensen_shannon,
    "tvd": _total_variation,
    "skew_kl": _skew_kl,
}
