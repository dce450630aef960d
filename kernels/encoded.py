"""Targets as a cache stores them (8-bit values, 16-bit ids), decoded where they are used.

The Triton kernel decodes a row in its registers, so the host sends only these integers; `decode` is
its PyTorch twin and defines it. Nothing here reads files. Shapes: N rows, K candidates a row by
falling probability, Q bytes of id planes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rekindle.kernels.targets import DecodedTargets, KernelTargets, check_tensor

STEP = 1024.0  # fixed point: units per nat
PRECISE_STEP = 2048.0  # units per nat of 16-bit values
NO_TAIL = 32767  # value of tail_log_odds if no mass lies outside the ids


@dataclass(frozen=True)
class EncodedTargets:
    """Sparse targets of N rows as integers, at one temperature τ.

    The candidates' log-probabilities at τ are, up to a constant per row, −values/255 ·
    (log_prob_min − log_prob_max)/1024/τ; for 16-bit values, which no Triton kernel decodes,
    −values/2048/τ. tail_log_odds/1024 is log(kept mass / tail mass) at τ and fixes the constant.
    """

    ids: Tensor  # [N,K] uint16: low bits of the ids, distinct within a row
    values: Tensor  # [N,K] uint8; uint16 where log_prob_min is None
    log_prob_max: Tensor  # [N] uint16, negated, in 1/1024 nat
    log_prob_min: Tensor | None  # [N] uint16
    tail_log_odds: Tensor  # [N] int16
    ids_high: Tensor | None = None  # [N,Q] uint8: bits 16 and up, a little-endian plane per bit
    planes: int = 0  # number of planes
    k: int | None = None  # use only the first k; the mass of the others joins the tail
    temperature: float | None = None  # τ, which the loss must use; None: not known
    sampled: bool = False  # an unbiased sample: only a divergence that is linear in it may be used

    @property
    def kept(self) -> int:
        """Return the number of candidates in use."""
        stored = self.ids.shape[1]
        return stored if self.k is None else min(self.k, stored)

    def packed(self) -> KernelTargets:
        """Return the same memory as the Triton kernels take it: uint16 as int16 bit patterns."""
        low, highest = self.ids.view(torch.int16), self.log_prob_max.view(torch.int16)
        lowest = None if self.log_prob_min is None else self.log_prob_min.view(torch.int16)
        return KernelTargets(
            low,
            self.values,
            self.tail_log_odds,
            ids_high=self.ids_high,
            log_prob_max=highest,
            log_prob_min=lowest,
        )


def check_encoded(targets: EncodedTargets, rows: int, device: torch.device) -> None:
    """Raise ValueError if dtypes or shapes are not a cache's, or not of the student's rows, or if
    a tensor is not on its device.
    """
    types = {"ids": torch.uint16, "values": torch.uint8, "log_prob_max": torch.uint16}
    types |= {"log_prob_min": torch.uint16, "tail_log_odds": torch.int16, "ids_high": torch.uint8}
    if targets.log_prob_min is None:
        types["values"] = torch.uint16

    def requirement() -> str:
        return f"as a cache stores N = {rows} rows of targets"

    for name, dtype in types.items():
        tensor = getattr(targets, name)
        if tensor is None and name in ("log_prob_min", "ids_high"):
            continue
        shape = {"ids": (rows, "K"), "values": (rows, "K"), "ids_high": (rows, "Q")}
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"the targets' {name} is {type(tensor).__qualname__}; give {requirement()}"
            )
        check_tensor(f"the targets' {name}", tensor, shape.get(name, (rows,)), requirement, device)
        if tensor.dtype != dtype:
            raise ValueError(
                f"the targets' {name} is {tensor.dtype}; it must be {dtype}, {requirement()}"
            )
    kept, high = targets.ids.shape[1], targets.ids_high
    if targets.values.shape[1] != kept:
        raise ValueError(f"the targets have {kept} ids a row and {targets.values.shape[1]} values")
    bits = 0 if high is None else 8 * high.shape[1]
    if not 0 <= bits - kept * targets.planes < 8:
        raise ValueError(
            f"the targets' ids_high has {bits} bits a row and planes is {targets.planes}; it must "
            f"have {kept} for each, in whole bytes"
        )
    if targets.k is not None and targets.k < 1:
        raise ValueError(f"the targets' k is {targets.k}; it must be at least 1")


def decode(targets: EncodedTargets, temperature: float) -> DecodedTargets:
    """Return ids [N,k] int64, probabilities [N,k] float32 at `temperature`, and tail mass [N].

    `temperature` must be the one that tail_log_odds was stored for.
    """
    relative = relative_log_probs(targets, temperature)
    ids, kept = _ids(targets.ids, targets.ids_high, targets.planes), targets.kept
    return DecodedTargets(ids[:, :kept], *_masses(relative, targets.tail_log_odds, kept))


def relative_log_probs(targets: EncodedTargets, temperature: float) -> Tensor:
    """Return all candidates' log-probabilities [N,K] at any `temperature`, up to a row constant."""
    values = targets.values.float()
    if targets.log_prob_min is None:
        return values * (-1.0 / (PRECISE_STEP * temperature))
    span = (targets.log_prob_min.float() - targets.log_prob_max.float()) / STEP
    return values * (-span / (255.0 * temperature))[:, None]


def _masses(relative: Tensor, log_odds: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the first k candidates' probabilities, and the tail including the others' mass."""
    odds = torch.where(log_odds == NO_TAIL, torch.inf, log_odds.float() / STEP)
    probs = torch.softmax(relative, dim=1) * torch.sigmoid(odds)[:, None]
    tail = torch.sigmoid(-odds)
    if k < probs.shape[1]:
        tail = tail + probs[:, k:].sum(1)
    return probs[:, :k], tail


def odds_at(
    targets: EncodedTargets,
    tail_log_odds: Tensor,
    at: Sequence[float],
    weights: Sequence[float],
    temperature: float,
) -> EncodedTargets:
    """Return ``targets`` with the log-odds [N] of their kept mass at ``temperature``.

    ``tail_log_odds`` [N,3] int16 are stored for the three temperatures ``at``, which have the
    ``weights`` in the parabola. The result is rounded to 1/1024 nat, as stored odds are. The twin
    in NumPy (rekindle.data.targets.interpolation) states the formula and its error.
    """
    odds = _log_sum(targets, temperature)
    for slot, (tau, weight) in enumerate(zip(at, weights, strict=True)):
        odds = odds - weight * (_log_sum(targets, tau) - tail_log_odds[:, slot].float() / STEP)
    stored = (odds * STEP).round().clamp(1 - NO_TAIL, NO_TAIL - 1).to(torch.int16)
    has_no_tail = (tail_log_odds == NO_TAIL).all(dim=1)
    return replace(targets, tail_log_odds=stored.masked_fill(has_no_tail, NO_TAIL))


def _log_sum(targets: EncodedTargets, temperature: float) -> Tensor:
    return torch.logsumexp(relative_log_probs(targets, temperature), dim=1)


def _ids(low: Tensor, high: Tensor | None, planes: int) -> Tensor:
    ids = low.to(torch.int64)
    if high is None:
        return ids
    k = ids.shape[1]
    bit = torch.arange(k * planes, device=ids.device)
    bits = (high[:, bit // 8].to(torch.int64) >> (bit % 8)) & 1
    for plane in range(planes):
        ids = ids | (bits[:, plane * k : (plane + 1) * k] << (16 + plane))
    return ids
