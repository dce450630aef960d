"""Softmax over the ids that a row's target does not list, and the probabilities of those it lists.

Blocks of logits are overwritten; no losses and no autograd here. Shapes: C rows of the block, V
vocabulary, K listed ids.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_PIECE_BYTES = 2**20  # half of the second-level cache of a core
_SQUARES_A_SUM = 256  # more are summed in parts


def may_read(values: Tensor) -> bool:
    """Return whether values may be read on the host: on a device that would mean waiting for it."""
    return values.device.type == "cpu"


class Slots(NamedTuple):
    """The k listed entries of each row: read before the block is overwritten, written after.

    Padding slots point at the row's first listed id and repeat its value, so that scattering
    through them is harmless. A row that lists nothing points at column 0 and writes back what it
    holds.
    """

    ids: Tensor  # [C,K] int64, in range
    logits: Tensor  # [C,K]
    listed: Tensor | None = None  # [C,K] bool; None: all of them
    anchor: Tensor | None = None  # [C,1] int64: the first listed slot

    @staticmethod
    def gather(z: Tensor, ids: Tensor) -> "Slots":
        """Read the logits z [C,V] of the ids [C,K]; -1 is padding."""
        if ids.shape[1] == 0:
            return Slots(ids, z[:, :0], ids >= 0)
        if may_read(ids) and int(ids.amin()) >= 0:
            return Slots(ids, z.gather(1, ids))
        listed = ids >= 0
        anchor = listed.int().argmax(1, keepdim=True)
        ids = torch.where(listed, ids, ids.gather(1, anchor)).clamp(min=0)
        return Slots(ids, z.gather(1, ids), listed, anchor)

    def write_(self, z: Tensor, values: Tensor | float) -> None:
        """Store values [C,K], or one value, at the listed ids."""
        if self.listed is None:
            z.scatter_(1, self.ids, values)
        elif self.anchor is not None:
            if isinstance(values, float):
                values = torch.full_like(self.logits, values)
            lists_any = self.listed.gather(1, self.anchor)
            values = torch.where(self.listed, values, values.gather(1, self.anchor))
            z.scatter_(1, self.ids, torch.where(lists_any, values, z.gather(1, self.ids)))


class Softmax(NamedTuple):
    """softmax(scaled logits), but for the shares of all other ids, which replace the logits."""

    log_p: Tensor  # [C,K+1], -inf at padding; the last is the complement's mass
    shift: Tensor  # [C,1]: the row's largest logit
    log_norm: Tensor  # [C,1]: log-sum-exp of the shifted logits
    peak: Tensor  # [C,1]: the complement's largest logit
    largest: Tensor  # [C,1]: the largest share
    finite: bool  # every row is known to have a possible id in its complement


def softmax_(scaled: Tensor, slots: Slots, temperature: float, finite: bool = False) -> Softmax:
    """Overwrite the scaled logits [C,V] with the shares: 0 at the listed ids, 1 in all elsewhere.

    The complement's mass is a log-sum-exp of its own, never 1 − Σ, and everything is relative to
    the row's largest logit, so |z| = 1e4 loses nothing to cancellation.
    """
    slots.write_(scaled, -math.inf)  # removes them from the softmax
    peak = scaled.amax(1, keepdim=True)
    finite = finite or (may_read(peak) and float(peak.amin()) > -math.inf)
    if scaled.device.type == "cpu":
        torch.softmax(scaled, 1, out=scaled)  # reads each row before it writes it
    else:
        scaled.copy_(torch.softmax(scaled, 1))
    if not finite:
        scaled.masked_fill_(peak == -math.inf, 0.0)
    listed = slots.logits if temperature == 1.0 else slots.logits / temperature
    return _softmax_of(scaled.amax(1, keepdim=True), peak, listed, slots.listed, finite)


def squared(shares: Tensor, tempered: Softmax, slots: Slots) -> tuple[Softmax, Tensor]:
    """Return the softmax at τ = 1 of logits whose softmax at τ = 2 is given, and Σ shares² [C,1].

    A share [C,V] at τ = 1 is shares² / Σ shares², so no second block of logits is needed.
    """
    squares = _norm(shares).square_()
    if not tempered.finite:
        squares.masked_fill_(squares == 0.0, 1.0)
    largest, peak = tempered.largest.square() / squares, tempered.peak * 2.0
    return _softmax_of(largest, peak, slots.logits, slots.listed, tempered.finite), squares


def _norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm [C,1] of rows [C,V], from norms of pieces.

    PyTorch adds the squares of a row one by one, and a sum of 150,000 equal numbers is wrong in its
    fourth digit in float32.
    """
    pieces = x.shape[1] // _SQUARES_A_SUM
    whole = x[:, : pieces * _SQUARES_A_SUM].unflatten(1, (pieces, _SQUARES_A_SUM))
    rest = x[:, pieces * _SQUARES_A_SUM :]
    norms = [torch.linalg.vector_norm(part, dim=-1) for part in (whole, rest[:, None])]
    return torch.linalg.vector_norm(torch.cat(norms, 1), dim=1, keepdim=True)


def _softmax_of(
    largest: Tensor, peak: Tensor, listed_logits: Tensor, listed: Tensor | None, finite: bool
) -> Softmax:
    """Complete a softmax from the complement's largest share and its logit, and listed logits
    [C,K].
    """
    if listed is not None:
        listed_logits = torch.where(listed, listed_logits, -math.inf)
    has_none = listed_logits.shape[1] == 0
    shift = peak if has_none else torch.maximum(peak, listed_logits.amax(1, keepdim=True))
    if not finite:
        shift = torch.where(shift == -math.inf, 0.0, shift)
    # the largest share is exactly 1 / Σ exp(z − peak)
    outside = peak - shift - largest.log()
    if not finite:
        outside = torch.where(peak == -math.inf, -math.inf, outside)
    log_p = torch.cat([listed_logits - shift, outside], 1)
    if finite:  # logsumexp without its handling of infinities
        top = log_p.amax(1, keepdim=True)
        log_norm = (log_p - top).exp_().sum(1, keepdim=True).log_().add_(top)
    else:
        log_norm = log_p.logsumexp(1, keepdim=True)
    return Softmax(log_p.sub_(log_norm), shift, log_norm, peak, largest, finite)


def times_line_(x: Tensor, slope: Tensor, start: Tensor) -> None:
    """Multiply x [C,V] by start + slope·x, in pieces of rows that stay in a CPU's cache.

    slope and start [C,1].
    """
    step = len(x)
    if x.device.type == "cpu":
        step = max(1, _PIECE_BYTES // (x.shape[1] * x.itemsize))
    for rows in (slice(first, first + step) for first in range(0, len(x), step)):
        x[rows].mul_((x[rows] * slope[rows]).add_(start[rows]))
