"""Compute loss and exact gradient of a block of logits, overwriting it. No autograd, no products.

Outside a row's k ids all entries share one coefficient, so a row costs one softmax over the
complement of its ids plus k special entries. With s = softmax over the complement, p =
softmax(z/τ), r the complement's mass and φ = ∂D/∂p, the gradient with respect to z/τ is

    outside   r (φ_r − φ̄) · s_j       inside   p_k (φ_k − φ̄)       φ̄ = Σ p_k φ_k + r φ_r

Its factors stay finite where r itself underflows. Shapes: C rows of the block, V vocabulary, K kept
ids.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rekindle.kernels.softmax import Slots, Softmax, may_read, softmax_, squared, times_line_
from rekindle.kernels.targets import LOG_OF_ZERO, KernelTargets, LossSettings, target_masses


class BlockLosses(NamedTuple):
    """CE and D of each row, unweighted; 0 where a row has no label or no target."""

    ce: Tensor  # [C]
    kd: Tensor  # [C,T] for T > 1 teachers


class Coefficients(NamedTuple):
    """The factors of each row's CE and D in the quantity that is differentiated."""

    ce: Tensor  # [C]
    kd: Tensor  # as in `BlockLosses`

    def take(self, rows: Tensor | slice) -> "Coefficients":
        """Return the coefficients of some rows."""
        if isinstance(rows, slice) and rows == slice(0, len(self.ce)):
            return self
        return Coefficients(self.ce[rows], self.kd[rows])


def block_buffers(settings: LossSettings, has_labels: bool) -> int:
    """Return the most [C,V] blocks that `loss_block` holds at once, the logits included."""
    second_softmax = settings.temperature != 1.0 and has_labels
    return 1 + second_softmax + (settings.softcap is not None)


def loss_block(
    z: Tensor, targets: KernelTargets, settings: LossSettings, coefficients: Coefficients | None
) -> BlockLosses:
    """Return the losses of each row of raw logits z [C,V], a private float32 or float64 buffer.

    z is overwritten: with coefficients by the gradient of Σ coefficients.ce·CE + coefficients.kd·D
    with respect to the raw logits, without them by scratch values. ids and labels must lie in [0,
    V) where they count.
    """
    needs_gradient = coefficients is not None
    slope = transform_(z, settings.logit_scale, settings.softcap, keep_slope=needs_gradient)
    slots = Slots.gather(z, targets.ids)
    label = _Label.gather(z, targets, settings.ignore_index)
    tau, squares, second = settings.temperature, None, None
    if tau == 1.0:
        tempered = at_one = softmax_(z, slots, 1.0)
    elif label is None:
        tempered = at_one = softmax_(z.div_(tau), slots, tau)
    elif tau == 2.0:
        tempered = softmax_(z.div_(tau), slots, tau)
        at_one, squares = squared(z, tempered, slots)
    else:
        second = z / tau
        tempered = softmax_(second, slots, tau)
        at_one = softmax_(z, slots, 1.0, tempered.finite)
    scale = None if coefficients is None else _scaled(coefficients.kd, settings.logit_scale / tau)
    if targets.probs.dim() == 3:
        kd, gradient = _several_teachers(targets, tempered.log_p, settings, scale)
    else:
        is_full = slots.listed is None
        kd, gradient = _one_teacher(targets, tempered.log_p, settings, scale, is_full)
    ce = torch.zeros_like(z[:, 0]) if label is None else label.cross_entropy(at_one)
    if coefficients is None:
        return BlockLosses(ce, kd)
    if label is None:
        z.mul_(gradient[:, -1:])
        slots.write_(z, gradient[:, :-1])
    else:
        a = coefficients.ce[:, None]
        if label.possible is not None:
            a = torch.where(label.possible, a, 0.0)
        a = _scaled(a, settings.logit_scale)
        at_one_gradient = a * at_one.log_p.exp()
        rest, gradient = gradient[:, -1:], gradient + at_one_gradient
        if second is not None:
            z.mul_(at_one_gradient[:, -1:]).addcmul_(second, rest)
        elif squares is not None:
            times_line_(z, at_one_gradient[:, -1:] / squares, rest)
        else:
            z.mul_(gradient[:, -1:])
        slots.write_(z, gradient[:, :-1])
        z.scatter_add_(1, label.ids, -a)
    if slope is not None:
        z.mul_(slope)
    return BlockLosses(ce, kd)


def _scaled(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1.0 else values * factor


def _one_teacher(
    targets: KernelTargets,
    log_p: Tensor,
    settings: LossSettings,
    scale: Tensor | None,
    is_full: bool,
) -> tuple[Tensor, Tensor]:
    """Return D [C] and its gradient [C,K+1] as in `DivergenceParts`, times `scale` [C] if given."""
    q, has_target = target_masses(targets, settings.tail, log_p.dtype, is_full)
    value, gradient = divergence_parts(q, log_p, settings)
    if has_target is not None:
        value = torch.where(has_target, value, 0.0)
        scale = None if scale is None else torch.where(has_target, scale, 0.0)
    return value, gradient if scale is None else scale[:, None] * gradient


def _several_teachers(
    targets: KernelTargets, log_p: Tensor, settings: LossSettings, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return each teacher's D [C,T], and the sum of their gradients [C,K+1] by `scale` [C,T].

    log_p covers the union of all ids and, last, all ids outside the union. A teacher's own rest is
    that last outcome plus the ids that only other teachers list; its gradient is divided among them
    by their probabilities within the rest.
    """
    values, total = [], torch.zeros_like(log_p)
    assert targets.tail is not None
    for t in range(targets.probs.shape[1]):
        probs = targets.probs[:, t]
        own_targets = KernelTargets(
            torch.where(probs >= 0, targets.ids, -1), probs, targets.tail[:, t]
        )
        listed = own_targets.ids >= 0
        log_rest_of = log_p.masked_fill(F.pad(listed, (0, 1)), -math.inf)
        log_rest = log_rest_of.logsumexp(1, keepdim=True)
        log_own = torch.where(listed, log_p[:, :-1], -math.inf)
        weight = None if scale is None else scale[:, t]
        value, gradient = _one_teacher(
            own_targets, torch.cat([log_own, log_rest], 1), settings, weight, False
        )
        values.append(value)
        shares = (log_rest_of - log_rest.masked_fill(log_rest == -math.inf, 0.0)).exp_()
        total += F.pad(gradient[:, :-1], (0, 1)) + gradient[:, -1:] * shares
    return torch.stack(values, 1), total


class DivergenceParts(NamedTuple):
    """D [C], and its gradient with respect to z/τ [C,K+1]: a value per id, and a factor of the
    shares.
    """

    value: Tensor
    gradient: Tensor


def divergence_parts(q: Tensor, log_p: Tensor, settings: LossSettings) -> DivergenceParts:
    """Return D over the k listed ids and, in the last place, the rest, with its closed-form
    gradient.

    q [C,K+1] is 0 at padding. log_p [C,K+1] may be -inf for padding, for ids that the student
    cannot produce (their term is a constant) and for an empty rest (no outcome at all).
    """
    possible = None
    if not (may_read(log_p) and float(log_p.amin()) > -math.inf):
        possible = log_p != -math.inf
        q = torch.cat([q[:, :-1], torch.where(possible[:, -1:], q[:, -1:], 0.0)], 1)
    p = log_p.exp()
    if possible is not None:
        log_p = torch.where(possible, log_p, LOG_OF_ZERO)
    return parts_of(q, p, log_p, settings, possible)


def parts_of(
    q: Tensor, p: Tensor, log_p: Tensor, settings: LossSettings, possible: Tensor | None = None
) -> DivergenceParts:
    """Compute `divergence_parts` from finite log_p and its p; ``possible``: the outcomes with p >
    0.
    """
    log_q = q.log()
    if not (may_read(q) and float(q.amin()) > 0):
        log_q = torch.where(q > 0, log_q, LOG_OF_ZERO)
    terms, p_phi = _TERMS[settings.divergence](q, log_q, p, log_p, **settings.of_divergence)
    if possible is not None:
        p_phi = torch.where(possible, p_phi, 0.0)
    return DivergenceParts(terms.sum(1), p_phi - p * p_phi.sum(1, keepdim=True))


def _forward_kl(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    return q * (log_q - log_p), -q


def _reverse_kl(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    # Any constant may be subtracted from φ = 1 + log p/q, since Σp = 1. Subtracting the likeliest
    # outcome's φ keeps φ − φ̄ from being the difference of two large numbers in peaked rows.
    phi = log_p - log_q
    likeliest = phi.gather(1, p.argmax(1, keepdim=True))
    return p * phi, p * (phi - likeliest)


def _jensen_shannon(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_q, log_p) - math.log(2.0)
    p_phi = 0.5 * p * (log_p - log_m)
    return 0.5 * q * (log_q - log_m) + p_phi, p_phi


def _total_variation(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    difference = p - q
    return 0.5 * difference.abs(), 0.5 * p * difference.sign()  # sign(0) = 0


def _skew_kl(
    q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor, skew: float
) -> tuple[Tensor, Tensor]:
    # With s = (1−α)p / (αq + (1−α)p), the student's share of the mixture, a term is q·log((1−s)/α)
    # and p·φ is −q·s; neither is a difference of large logarithms.
    odds = log_p - log_q - logit(skew)  # log s/(1−s)
    log_of_other = -torch.logaddexp(odds, torch.zeros_like(odds[:, :1]))
    return q * (log_of_other - math.log(skew)), -q * torch.sigmoid(odds)


_TERMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jensen_shannon,
    "tvd": _total_variation,
    "skew_kl": _skew_kl,
}


def logit(share: float) -> float:
    """Return log(share / (1 − share))."""
    return math.log(share) - math.log1p(-share)


class _Label(NamedTuple):
    """The hard labels of a block; ids of rows without a label point at column 0."""

    ids: Tensor  # [C,1] int64
    logits: Tensor  # [C,1]
    counts: Tensor | None  # [C,1] bool; None: all count
    possible: Tensor | None  # [C,1] bool: counts and has a finite logit; None: all are

    @staticmethod
    def gather(z: Tensor, targets: KernelTargets, ignore_index: int) -> "_Label | None":
        if targets.labels is None:
            return None
        ids = targets.labels[:, None]
        counts = ids != ignore_index
        all_count = may_read(ids) and bool(counts.all())
        if not all_count:
            ids = torch.where(counts, ids, 0)
        logits = z.gather(1, ids)
        if all_count and float(logits.amin()) > -math.inf:
            return _Label(ids, logits, None, None)
        return _Label(ids, logits, counts, counts & (logits != -math.inf))

    def cross_entropy(self, at_one: Softmax) -> Tensor:
        """Return CE [C]."""
        ce = -(self.logits - at_one.shift - at_one.log_norm)
        if self.counts is not None and self.possible is not None:
            ce = torch.where(self.counts, torch.where(self.possible, ce, -LOG_OF_ZERO), 0.0)
        return ce[:, 0]


def transform_(
    z: Tensor, logit_scale: float, softcap: float | None, keep_slope: bool = False
) -> Tensor | None:
    """Set z to cap·tanh(scale·z/cap) in place; return dz'/d(scale·z) if wanted and not 1.

    A logit of -inf stays -inf under a softcap: an excluded id stays excluded.
    """
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is None:
        return None
    ruled_out = z == -math.inf
    z.div_(softcap).tanh_()
    slope = 1.0 - z.square() if keep_slope else None
    z.mul_(softcap).masked_fill_(ruled_out, -math.inf)
    return slope
