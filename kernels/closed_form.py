"""Loss and exact gradient of a block of logits, written over it; no autograd, no products.

Outside a row's k ids all entries share one coefficient, so a row costs one softmax over the
complement of its ids plus k special entries. With s = softmax over the complement, p =
softmax(z/τ), r the complement's mass and φ = ∂D/∂p, the gradient with respect to z/τ is

    outside   r (φ_r − φ̄) · s_j       inside   p_k (φ_k − φ̄)       φ̄ = Σ p_k φ_k + r φ_r

whose factors stay finite where r itself underflows. Shapes: C rows of the block, V vocabulary, K
kept ids.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rekindle.kernels.targets import LOG_OF_ZERO, LossSettings, SparseTargets, target_masses


class BlockLosses(NamedTuple):
    """CE and D of each row, [C], without any weight; 0 where a row has no label or no target."""

    ce: Tensor
    kd: Tensor


class Coefficients(NamedTuple):
    """What each row's CE and D are multiplied by in the quantity to be differentiated, [C] each."""

    ce: Tensor
    kd: Tensor

    def take(self, rows: Tensor | slice) -> "Coefficients":
        """Those of some rows only."""
        return Coefficients(self.ce[rows], self.kd[rows])


def block_buffers(settings: LossSettings, has_labels: bool) -> int:
    """How many [C,V] blocks `loss_block` holds at once, the logits included."""
    second_softmax = settings.temperature != 1.0 and has_labels
    return 1 + second_softmax + (settings.softcap is not None)


def loss_block(
    z: Tensor, targets: SparseTargets, settings: LossSettings, coefficients: Coefficients | None
) -> BlockLosses:
    """Per-row losses of raw logits z [C,V], a private float32 or float64 buffer, overwritten.

    With coefficients, z becomes the gradient of Σ coefficients.ce·CE + coefficients.kd·D with
    respect to the raw logits; without, z is left as scratch. ids and labels must lie in [0, V)
    where they count.
    """
    wanted = coefficients is not None
    slope = transform_(z, settings.logit_scale, settings.softcap, keep_slope=wanted)
    slots = _Slots.gather(z, targets.ids)
    label = _Label.gather(z, targets, settings.ignore_index)
    tau = settings.temperature
    if tau == 1.0:
        tempered = at_one = _softmax_(z, slots, 1.0)
    elif label is None:
        tempered = at_one = _softmax_(z.div_(tau), slots, tau)
    else:
        tempered, at_one = _softmax_(z / tau, slots, tau), _softmax_(z, slots, 1.0)
    q, q_rest, has_target = target_masses(targets, settings.tail, z.dtype)
    parts = divergence_parts(q, q_rest, tempered.log_p, tempered.log_rest, settings)
    kd = torch.where(has_target, parts.value, 0.0)
    ce = torch.zeros_like(kd) if label is None else label.cross_entropy(at_one)
    if coefficients is None:
        return BlockLosses(ce, kd)
    b = torch.where(has_target, coefficients.kd, 0.0)[:, None] * (settings.logit_scale / tau)
    rest, inside = b * parts.rest[:, None], b * parts.inside
    if label is None:
        z.mul_(rest)
        slots.write_(z, inside)
    else:
        a = torch.where(label.possible, coefficients.ce, 0.0)[:, None] * settings.logit_scale
        rest_at_one = a * at_one.log_rest.exp()[:, None]
        if tempered is at_one:
            z.mul_(rest + rest_at_one)
        else:
            z.mul_(rest_at_one).addcmul_(tempered.shares, rest)
        slots.write_(z, inside + a * at_one.log_p.exp())
        z.scatter_add_(1, label.ids[:, None], -a)
    if slope is not None:
        z.mul_(slope)
    return BlockLosses(ce, kd)


class DivergenceParts(NamedTuple):
    """D [C]; its gradient with respect to z/τ: a factor of the shares [C], a value per id [C,K]."""

    value: Tensor
    rest: Tensor
    inside: Tensor


def divergence_parts(
    q: Tensor, q_rest: Tensor, log_p: Tensor, log_p_rest: Tensor, settings: LossSettings
) -> DivergenceParts:
    """D over the k listed ids and the rest, with its gradient in closed form.

    q [C,K] (0 at padding), q_rest [C]; log_p [C,K] and log_p_rest [C] may be -inf: padding, ids
    that the student cannot produce (their term is a constant), an empty rest (no outcome at all).
    """
    q_rest = torch.where(log_p_rest == -math.inf, 0.0, q_rest)
    q = torch.cat([q, q_rest[:, None]], 1)
    log_p = torch.cat([log_p, log_p_rest[:, None]], 1)
    possible = log_p != -math.inf
    p = log_p.exp()
    log_p = torch.where(possible, log_p, LOG_OF_ZERO)
    log_q = torch.where(q > 0, q.log(), LOG_OF_ZERO)
    terms, p_phi = _TERMS[settings.divergence](q, log_q, p, log_p, **settings.of_divergence)
    p_phi = torch.where(possible, p_phi, 0.0)
    gradient = p_phi - p * p_phi.sum(1, keepdim=True)
    return DivergenceParts(terms.sum(1), gradient[:, -1], gradient[:, :-1])


def _forward_kl(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    return q * (log_q - log_p), -q


def _reverse_kl(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    # Any constant may be taken off φ = 1 + log p/q, since Σp = 1. Taking off that of the likeliest
    # outcome keeps φ − φ̄ from being the difference of two large numbers in peaked rows.
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
    odds = log_p - log_q - logit(skew)  # of that share: log s/(1−s)
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
    """log(share / (1 − share))."""
    return math.log(share) - math.log1p(-share)


class _Slots(NamedTuple):
    """The k listed entries of each row: read before the block is overwritten, written after.

    Padding slots point at the row's first listed id and repeat its value, so that a scatter
    through them is harmless; a row that lists nothing points at column 0 and puts back what
    stands there.
    """

    ids: Tensor  # [C,K] int64, in range
    listed: Tensor  # [C,K] bool
    anchor: Tensor  # [C,1] int64: the first listed slot
    logits: Tensor  # [C,K]

    @staticmethod
    def gather(z: Tensor, ids: Tensor) -> "_Slots":
        listed = ids >= 0
        if ids.shape[1] == 0:
            return _Slots(ids, listed, ids, z[:, :0])
        anchor = listed.int().argmax(1, keepdim=True)
        ids = torch.where(listed, ids, ids.gather(1, anchor)).clamp(min=0)
        return _Slots(ids, listed, anchor, z.gather(1, ids))

    def write_(self, z: Tensor, values: Tensor) -> None:
        """Store values [C,K] at the listed ids."""
        if self.ids.shape[1]:
            lists_any = self.listed.gather(1, self.anchor)
            values = torch.where(self.listed, values, values.gather(1, self.anchor))
            z.scatter_(1, self.ids, torch.where(lists_any, values, z.gather(1, self.ids)))


class _Softmax(NamedTuple):
    """softmax(scaled logits): the listed ids' part, and the shares of all others in the rest."""

    shares: Tensor  # [C,V]: softmax over the complement; 0 at the listed ids
    log_p: Tensor  # [C,K], -inf at padding
    log_rest: Tensor  # [C]: log of the complement's mass
    shift: Tensor  # [C]: the row's largest logit
    log_norm: Tensor  # [C]: log-sum-exp of the shifted logits


def _softmax_(scaled: Tensor, slots: _Slots, temperature: float) -> _Softmax:
    """Overwrites the scaled logits [C,V] by the shares.

    The complement's mass is a log-sum-exp of its own, never 1 − Σ; everything is relative to the
    row's largest logit, so that |z| = 1e4 loses nothing to cancellation.
    """
    slots.write_(scaled, torch.full_like(slots.logits, -math.inf))  # they are taken out
    peak = scaled.amax(1)
    empty = peak == -math.inf
    if scaled.device.type == "cpu":
        torch.softmax(scaled, 1, out=scaled)  # reads each row before it writes it
    else:
        scaled.copy_(torch.softmax(scaled, 1))
    if scaled.device.type != "cpu" or bool(empty.any()):  # a device is not asked, it just does it
        scaled.masked_fill_(empty[:, None], 0.0)
    log_outside = -scaled.amax(1).log()  # the largest share is exactly 1 / Σ exp(z − peak)
    listed = torch.where(slots.listed, slots.logits / temperature, -math.inf)
    shift = peak if listed.shape[1] == 0 else torch.maximum(peak, listed.amax(1))
    shift = torch.where(shift == -math.inf, 0.0, shift)
    listed = listed - shift[:, None]
    outside = torch.where(empty, -math.inf, peak - shift + log_outside)
    log_norm = torch.cat([listed, outside[:, None]], 1).logsumexp(1)
    return _Softmax(scaled, listed - log_norm[:, None], outside - log_norm, shift, log_norm)


class _Label(NamedTuple):
    """The hard labels of a block; ids point at column 0 where a row has none."""

    ids: Tensor  # [C] int64
    logits: Tensor  # [C]
    counts: Tensor  # [C] bool
    possible: Tensor  # [C] bool: counts and has a finite logit

    @staticmethod
    def gather(z: Tensor, targets: SparseTargets, ignore_index: int) -> "_Label | None":
        if targets.labels is None:
            return None
        counts = targets.labelled(ignore_index)
        ids = torch.where(counts, targets.labels, 0)
        logits = z.gather(1, ids[:, None])[:, 0]
        return _Label(ids, logits, counts, counts & (logits != -math.inf))

    def cross_entropy(self, at_one: _Softmax) -> Tensor:
        log_p = self.logits - at_one.shift - at_one.log_norm
        ce = torch.where(self.possible, -log_p, -LOG_OF_ZERO)
        return torch.where(self.counts, ce, 0.0)


def transform_(
    z: Tensor, logit_scale: float, softcap: float | None, keep_slope: bool = False
) -> Tensor | None:
    """In place: z <- cap·tanh(scale·z/cap); returns dz'/d(scale·z) where it is not 1 and wanted.

    A logit of -inf stays -inf under a softcap: an id that is ruled out stays ruled out.
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
