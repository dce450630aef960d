"""What one distillation call is about: targets and settings; no arithmetic on logits.

Shapes: N rows, V vocabulary, K kept ids a row.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rekindle.kernels.divergences import DIVERGENCES, SKEW, SKEWED

TAILS = ("bucket", "renormalise", "none")
REDUCTIONS = ("mean", "sum", "none")

# A probability of exactly zero is read as 2^-126 wherever its logarithm is needed (reverse KL of
# a target without tail; an id whose logit is -inf). The value is the smallest normal float32, in
# every dtype, so that float32 and float64 define the same loss.
LOG_OF_ZERO = -87.33654475055310

MAX_KEPT = 4096  # ids a row that the Triton kernels take: a row's ids live in registers


def check_factors(whose: str = "", **factors: float | None) -> None:
    """ValueError for one that is not positive and finite; None is none."""
    for name, factor in factors.items():
        if factor is not None and not 0 < factor < math.inf:
            raise ValueError(f"{whose}{name} is {factor}; it must be positive and finite")


def check_tensor(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int | str, ...],
    why: str,
    device: torch.device | None = None,
) -> None:
    """ValueError for a tensor of another shape, or on another device than the student's.

    A word in ``shape`` fits any size.
    """
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{name} is of type {type(tensor).__qualname__}; it must be a torch tensor "
            "(torch.from_numpy makes one of an array)"
        )
    given = tuple(tensor.shape)
    sizes = zip(given, shape, strict=False)
    if len(given) != len(shape) or any(n != want for n, want in sizes if isinstance(want, int)):
        wanted = str(shape).replace("'", "")
        raise ValueError(f"{name} is {given}; it must be {wanted}, {why}")
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device} and the student on {device}; all tensors of a call must "
            "be on one device"
        )


class LossSettings(NamedTuple):
    """loss = ce_weight·CE + kd_weight·τ²·D of the logits cap·tanh(logit_scale·z / cap)."""

    temperature: float = 1.0
    ce_weight: float = 0.0
    kd_weight: float = 1.0
    divergence: str = "forward_kl"
    tail: str = "bucket"
    ignore_index: int = -100
    reduction: str = "mean"
    softcap: float | None = None
    logit_scale: float = 1.0
    kept: int = 0  # candidates in use of encoded targets
    planes: int = 0  # their id planes
    skew: float = SKEW  # α of skew_kl

    @property
    def of_divergence(self) -> dict[str, float]:
        """What the divergence's formula takes beside q and p."""
        return {"skew": self.skew} if self.divergence == SKEWED else {}

    def check(self) -> None:
        """Raise ValueError for a setting that no loss has."""
        choices = {"divergence": DIVERGENCES, "tail": TAILS, "reduction": REDUCTIONS}
        for name, allowed in choices.items():
            if (given := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {given!r}; it must be one of {', '.join(allowed)}")
        check_factors(
            temperature=self.temperature, logit_scale=self.logit_scale, softcap=self.softcap
        )
        for name, weight in (("ce_weight", self.ce_weight), ("kd_weight", self.kd_weight)):
            if not math.isfinite(weight):
                raise ValueError(f"{name} is {weight}; it must be finite")


class DecodedTargets(NamedTuple):
    """Candidates in floats: ids [N,K], probabilities [N,K] at the temperature, tail mass [N]."""

    ids: Tensor
    probs: Tensor
    tail: Tensor


SparseRow = tuple[Tensor, Tensor, Tensor | None]  # of a teacher: ids, probabilities, tail


class SparseTargets(NamedTuple):
    """Targets of N rows; ids are int64 with -1 as padding.

    Encoded (`encoded.EncodedTargets.packed`), for the Triton kernels only: ids int16, probs the
    uint8 values, tail the int16 scalars [N,3], high the planes of the ids.
    """

    ids: Tensor  # [N,K]
    probs: Tensor  # [N,K]
    tail: Tensor | None  # [N]
    labels: Tensor | None = None  # [N] int64
    weight: Tensor | None = None  # [N]
    high: Tensor | None = None  # [N,Q]

    def take(self, rows: Tensor | slice) -> "SparseTargets":
        """The same targets for some rows only."""
        return SparseTargets(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]

    def active(self) -> Tensor:
        """[N] bool: rows that count at all (weight ≠ 0)."""
        if self.weight is None:
            return torch.ones(self.ids.shape[0], dtype=torch.bool, device=self.ids.device)
        return self.weight != 0

    def labelled(self, ignore_index: int) -> Tensor:
        """[N] bool: rows whose label counts."""
        if self.labels is None:
            return torch.zeros(self.ids.shape[0], dtype=torch.bool, device=self.ids.device)
        return self.labels != ignore_index


def target_masses(
    targets: SparseTargets, tail: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The target as probabilities over k + 1 outcomes: the listed ids and the rest.

    Returns probs [N,K] (0 at padding), rest [N] ≥ 0 and `has_target` [N]. A row has a target if
    it lists an id and, under "renormalise", gives its ids any mass. Without a tail
    ("renormalise", "none") the rest is 0: the target is the sparse one, zero elsewhere.
    """
    listed = targets.ids >= 0
    probs = torch.where(listed, targets.probs.to(dtype), 0.0)
    has_target = listed.any(1)
    total = probs.sum(1)
    if tail == "renormalise":
        has_target = has_target & (total > 0)
        probs = probs / torch.where(total > 0, total, 1.0)[:, None]
    rest = torch.zeros_like(total)
    if tail == "bucket":
        rest = (1.0 - total if targets.tail is None else targets.tail.to(dtype)).clamp(min=0)
    return probs, rest, has_target


def loss_scales(
    targets: SparseTargets, settings: LossSettings, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What each row's CE and D are multiplied by to give the *reported* ce and kd, [N] each.

    The row weight, and for "mean" one over the number of rows that count: CE over rows with
    weight ≠ 0 whose label counts, D over all rows with weight ≠ 0 (a row of weight ≠ 0 without
    target counts and adds nothing).
    """
    active, labelled = targets.active(), targets.labelled(settings.ignore_index)
    weight = active.to(dtype)
    if targets.weight is not None:
        weight = torch.where(active, targets.weight.to(dtype), 0.0)
    ce, kd = torch.where(labelled, weight, 0.0), weight
    if settings.reduction == "mean":
        ce = ce / (active & labelled).sum().clamp(min=1)
        kd = kd / active.sum().clamp(min=1)
    return ce, kd


def merge_rows(teachers: Sequence[SparseRow], weights: Tensor) -> DecodedTargets:
    """Σ_t weights[:, t]·teacher_t over the union of ids; the rule is in `losses.merge_targets`.
    Never invents a probability that no teacher stored.

    All shapes follow from the inputs' shapes, so that a device is never asked for a count.
    """
    probs_of = [probs for _, probs, _ in teachers]
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in probs_of) else torch.float32
    weights = weights.to(probs_of[0].device, dtype)
    all_ids, all_probs, tail = [], [], torch.zeros_like(weights[:, 0])
    for t, (ids, probs, teacher_tail) in enumerate(teachers):
        listed = (ids >= 0) & (weights[:, t, None] != 0)
        p = torch.where(listed, probs.to(dtype), 0.0)
        rest = (1.0 - p.sum(1)).clamp(min=0) if teacher_tail is None else teacher_tail.to(dtype)
        all_ids.append(torch.where(listed, ids.long(), -1))
        all_probs.append(p * weights[:, t, None])
        tail = tail + torch.where(listed.any(1), rest * weights[:, t], 0.0)
    return DecodedTargets(*_sum_duplicates(torch.cat(all_ids, 1), torch.cat(all_probs, 1)), tail)


def _sum_duplicates(ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids [N,K] with their summed probabilities, by falling probability, padding last."""
    ids, order = ids.sort(dim=1, stable=True)
    probs = probs.gather(1, order)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    group = first.long().cumsum(1) - 1
    summed = torch.zeros_like(probs).scatter_add_(1, group, probs)
    distinct = torch.full_like(ids, -1).scatter_(1, group, ids)
    rank = torch.where(distinct >= 0, summed, -1.0)
    order = rank.argsort(dim=1, descending=True, stable=True)
    return distinct.gather(1, order), summed.gather(1, order)
