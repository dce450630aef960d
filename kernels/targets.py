"""What one distillation call is about: targets and settings; no arithmetic on logits.

Shapes: N rows, V vocabulary, K kept ids a row.
"""

import importlib.util
import math
from collections.abc import Sequence
from numbers import Real
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

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
MAX_KEPT = 4096  # ids a row that the Triton kernels take: a row's ids live in registers


def check_number(name: str, number: object) -> None:
    """ValueError for what is no real number, and for a tensor that a gradient is expected of."""
    if isinstance(number, Tensor) and number.requires_grad:
        raise ValueError(
            f"{name} is a tensor that requires a gradient, which the loss gives to the student "
            "alone; give a number, and form what is learnt of it beside the loss"
        )
    if not (isinstance(number, Real) or (isinstance(number, Tensor) and number.dim() == 0)):
        raise ValueError(f"{name} is {number!r}; it must be a number")


def check_factors(whose: str = "", **factors: float | None) -> None:
    """ValueError for one that is not positive and finite; no softcap is none."""
    for name, factor in factors.items():
        if factor is None and name == "softcap":
            continue
        check_number(whose + name, factor)
        if not 0 < factor < math.inf:  # type: ignore[operator]
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
    if tensor.shape == shape and (device is None or tensor.device == device):
        return
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
    shares: Sequence[float] = (1.0,)  # of kd_weight, of each of T teachers
    full: bool = False  # it was seen: every slot lists an id, every label counts, tails are ≥ 0

    @property
    def kd_factors(self) -> list[float]:
        """What each teacher's D is multiplied by in the loss [T]."""
        return [share * self.kd_weight * self.temperature**2 for share in self.shares]

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
        weights = [("ce_weight", self.ce_weight), ("kd_weight", self.kd_weight)]
        for name, weight in weights + [("kd_weight", share) for share in self.shares]:
            check_number(name, weight)
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
    uint8 values, tail the int16 scalars [N,3], high the planes of the ids. Of T > 1 teachers the
    union of their ids (`union_rows`).
    """

    ids: Tensor  # [N,K]
    probs: Tensor  # [N,K]; of T teachers [N,T,K], -1 where one does not list an id
    tail: Tensor | None  # [N]; of T teachers [N,T], and not None
    labels: Tensor | None = None  # [N] int64
    weight: Tensor | None = None  # [N]
    high: Tensor | None = None  # [N,Q]

    def take(self, rows: Tensor | slice) -> "SparseTargets":
        """The same targets for some rows only."""
        if isinstance(rows, slice) and rows == slice(0, len(self.ids)):
            return self
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
    targets: SparseTargets, tail: str, dtype: torch.dtype, whole: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The target as probabilities over k + 1 outcomes: the listed ids and, last, the rest.

    Returns probs [N,K+1] (0 at padding; rest ≥ 0) and `has_target` [N]; None: every row has one. A
    row has a target if it lists an id and, under "renormalise", gives its ids any mass. Without a
    tail ("renormalise", "none") the rest is 0: the target is the sparse one, zero elsewhere.
    `whole` says that every slot lists an id.
    """
    probs, has_target = targets.probs.to(dtype), None
    if not whole:
        listed = targets.ids >= 0
        probs, has_target = torch.where(listed, probs, 0.0), listed.any(1)
    if tail == "renormalise":
        total = probs.sum(1, keepdim=True)
        some = total[:, 0] > 0
        has_target = some if has_target is None else has_target & some
        probs = probs / torch.where(total > 0, total, 1.0)
    if tail == "bucket":
        rest = 1.0 - probs.sum(1) if targets.tail is None else targets.tail.to(dtype)
        rest = rest.clamp(min=0)[:, None]
    else:
        rest = probs.new_zeros(len(probs), 1)
    return torch.cat([probs, rest], 1), has_target


def loss_scales(
    targets: SparseTargets, settings: LossSettings, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What each row's CE and D are multiplied by to give the *reported* ce and kd, [N] each.

    The row weight, and for "mean" one over the number of rows that count: CE over rows with
    weight ≠ 0 whose label counts, D over all rows with weight ≠ 0 (a row of weight ≠ 0 without
    target counts and adds nothing).
    """
    rows, mean = len(targets.ids), settings.reduction == "mean"
    if targets.weight is None:
        active, weight = None, targets.ids.new_ones((), dtype=dtype)
        kd = targets.ids.new_full((rows,), 1.0 / max(rows, 1) if mean else 1.0, dtype=dtype)
    else:
        active = targets.active()
        weight = kd = torch.where(active, targets.weight.to(dtype), 0.0)
        if mean:
            kd = kd / active.sum().clamp(min=1)
    if targets.labels is None:
        return kd, kd  # there is no CE to be scaled
    labelled = targets.labelled(settings.ignore_index)
    if labelled.device.type == "cpu" and bool(labelled.all()):
        return kd, kd
    ce = torch.where(labelled, weight, 0.0)
    if mean:
        ce = ce / (labelled if active is None else active & labelled).sum().clamp(min=1)
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


def union_rows(teachers: Sequence[SparseTargets]) -> SparseTargets:
    """The targets of T teachers over the union of their ids [N,ΣK], and what each says of it; the
    first one's labels and weights.

    All shapes follow from the inputs' shapes, as those of `merge_rows` do.
    """
    places, order, distinct = _distinct(torch.cat([t.ids for t in teachers], 1))
    rows, size = distinct.shape
    dtype = torch.promote_types(torch.float32, teachers[0].probs.dtype)
    probs = torch.cat([torch.where(t.ids >= 0, t.probs.to(dtype), -1.0) for t in teachers], 1)
    owners = torch.cat([torch.full_like(t.ids, n) for n, t in enumerate(teachers)], 1)
    said = probs.new_full((rows, len(teachers) * size), -1.0)
    said.scatter_(1, owners.gather(1, order) * size + places, probs.gather(1, order))
    tails = [
        1.0 - torch.where(t.ids >= 0, t.probs.to(dtype), 0.0).sum(1)
        if t.tail is None
        else t.tail.to(dtype)
        for t in teachers
    ]
    said = said.view(rows, len(teachers), size)
    labels, weight = teachers[0].labels, teachers[0].weight
    return SparseTargets(distinct, said, torch.stack(tails, 1), labels, weight)


def _distinct(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order [N,K] that sorts ids, each one's place among the distinct ones, and these [N,K].

    Distinct ids stand first, of which -1 may be one, and then -1 as padding.
    """
    ids, order = ids.sort(dim=1, stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    places = first.long().cumsum(1) - 1
    return places, order, torch.full_like(ids, -1).scatter_(1, places, ids)


def _sum_duplicates(ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids [N,K] with their summed probabilities, by falling probability, padding last."""
    places, order, distinct = _distinct(ids)
    probs = probs.gather(1, order)
    summed = torch.zeros_like(probs).scatter_add_(1, places, probs)
    rank = torch.where(distinct >= 0, summed, -1.0)
    order = rank.argsort(dim=1, descending=True, stable=True)
    return distinct.gather(1, order), summed.gather(1, order)
