"""Targets and settings of a distillation call; no arithmetic on logits.

Shapes: N rows, V vocabulary, K kept ids a row.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from rekindle.kernels.divergences import DIVERGENCES, SKEW, SKEWED

TAILS = ("bucket", "renormalise", "none")
REDUCTIONS = ("mean", "sum", "none")

# A probability of exactly zero counts as 2^-126 wherever its logarithm is needed (reverse KL of a
# target without tail; an id whose logit is -inf). This is the smallest normal float32, and it is
# used in every dtype, so that float32 and float64 define the same loss.
LOG_OF_ZERO = -87.33654475055310

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
MAX_KEPT = 4096  # most ids a row for the Triton kernels, which keep them in registers


def read_number(name: str, number: object) -> float:
    """Return a real number as a float; raise ValueError for anything else.

    A NumPy scalar is one, and so is a tensor of no dimension that requires no gradient. Reading one
    from a device waits for it.
    """
    if type(number) is float:
        return number
    if isinstance(number, Tensor) and number.requires_grad:
        raise ValueError(
            f"{name} is a tensor that requires a gradient, but the loss gives a gradient to the "
            "student only; give a number, and form what is learnt from it outside the loss"
        )
    if not (isinstance(number, Real) or (isinstance(number, Tensor) and number.dim() == 0)):
        raise ValueError(f"{name} is {number!r}; it must be a number")
    return float(number)


def read_factor(name: str, number: object) -> float:
    """Return a positive, finite number as a float; raise ValueError for anything else."""
    factor = read_number(name, number)
    if not 0 < factor < math.inf:
        raise ValueError(f"{name} is {number}; it must be positive and finite")
    return factor


def _read_weight(name: str, number: object) -> float:
    weight = read_number(name, number)
    if not -math.inf < weight < math.inf:  # torch.compile knows no isfinite of a symbol
        raise ValueError(f"{name} is {number}; it must be finite")
    return weight


def _read_integer(name: str, number: object) -> int:
    if type(number) is int:
        return number
    integer = read_number(name, number)
    if not integer.is_integer():
        raise ValueError(f"{name} is {number}; it must be an integer")
    return int(integer)


def check_tensor(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int | str, ...],
    why: str | Callable[[], str],
    device: torch.device | None = None,
) -> None:
    """Raise ValueError for a tensor of another shape, or on another device than the student's.

    A word in ``shape`` fits any size. A ``why`` with sizes in it is a function: torch.compile takes
    a size in a string for a constant, and would compile anew for every number of rows.
    """
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{name} is of type {type(tensor).__qualname__}; it must be a torch tensor "
            "(torch.from_numpy makes one from an array)"
        )
    if tensor.shape == shape and (device is None or tensor.device == device):
        return
    given = tuple(tensor.shape)
    sizes = zip(given, shape, strict=False)
    if len(given) != len(shape) or any(
        actual != size for actual, size in sizes if isinstance(size, int)
    ):
        expected, why = str(shape).replace("'", ""), why if isinstance(why, str) else why()
        raise ValueError(f"{name} is {given}; it must be {expected}, {why}")
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device} and the student on {device}; all tensors of a call must "
            "be on one device"
        )


class LossSettings(NamedTuple):
    """Settings of loss = ce_weight·CE + Σ_t kd_weight_t·τ²·D_t of cap·tanh(logit_scale·z / cap)."""

    temperature: float = 1.0
    ce_weight: float = 0.0
    kd_weights: Sequence[float] = (1.0,)  # of each of T teachers
    divergence: str = "forward_kl"
    tail: str = "bucket"
    ignore_index: int = -100
    reduction: str = "mean"
    softcap: float | None = None
    logit_scale: float = 1.0
    kept: int = 0  # candidates in use, for encoded targets
    planes: int = 0  # their number of id planes
    skew: float = SKEW  # α of skew_kl
    full: bool = False  # known: every slot lists an id, every label counts, tails are ≥ 0

    @property
    def kd_factors(self) -> list[float]:
        """Return each teacher's factor of D in the loss [T]."""
        return [weight * self.temperature**2 for weight in self.kd_weights]

    @property
    def of_divergence(self) -> dict[str, float]:
        """Return the arguments of the divergence's formula besides q and p."""
        return {"skew": self.skew} if self.divergence == SKEWED else {}

    def checked(self) -> "LossSettings":
        """Return the settings with plain numbers only; raise ValueError for an invalid one."""
        choices = {"divergence": DIVERGENCES, "tail": TAILS, "reduction": REDUCTIONS}
        for name, allowed in choices.items():
            if (given := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {given!r}; it must be one of {', '.join(allowed)}")
        return self._replace(
            temperature=read_factor("temperature", self.temperature),
            logit_scale=read_factor("logit_scale", self.logit_scale),
            softcap=None if self.softcap is None else read_factor("softcap", self.softcap),
            ce_weight=_read_weight("ce_weight", self.ce_weight),
            kd_weights=tuple(_read_weight("kd_weight", weight) for weight in self.kd_weights),
            ignore_index=_read_integer("ignore_index", self.ignore_index),
        )


class DecodedTargets(NamedTuple):
    """Candidates as floats: ids [N,K], probabilities [N,K] at the temperature, tail mass [N]."""

    ids: Tensor
    probs: Tensor
    tail: Tensor


SparseTriple = tuple[Tensor, Tensor, Tensor | None]  # one teacher's ids, probabilities and tail


class KernelTargets(NamedTuple):
    """Targets of N rows; ids are int64 with -1 as padding.

    If encoded (`encoded.EncodedTargets.packed`), for the Triton kernels only: the cache's tensors,
    with int16 in place of uint16; probs are its values, tail its tail_log_odds. For T > 1 teachers
    ids are the union of theirs (`union_rows`).
    """

    ids: Tensor  # [N,K]
    probs: Tensor  # [N,K]; for T teachers [N,T,K], -1 where a teacher does not list an id
    tail: Tensor | None  # [N]; for T teachers [N,T], and not None
    labels: Tensor | None = None  # [N] int64
    weight: Tensor | None = None  # [N]
    ids_high: Tensor | None = None  # [N,Q]
    log_prob_max: Tensor | None = None  # [N]
    log_prob_min: Tensor | None = None  # [N]

    def take(self, rows: Tensor | slice) -> "KernelTargets":
        """Return the same targets for some rows."""
        if isinstance(rows, slice) and rows == slice(0, len(self.ids)):
            return self
        return KernelTargets(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]

    def active(self) -> Tensor:
        """Return [N] bool: rows that count at all (weight ≠ 0)."""
        if self.weight is None:
            return torch.ones(self.ids.shape[0], dtype=torch.bool, device=self.ids.device)
        return self.weight != 0

    def labelled(self, ignore_index: int) -> Tensor:
        """Return [N] bool: rows whose label counts."""
        if self.labels is None:
            return torch.zeros(self.ids.shape[0], dtype=torch.bool, device=self.ids.device)
        return self.labels != ignore_index


def target_masses(
    targets: KernelTargets, tail: str, dtype: torch.dtype, is_full: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the target as probabilities over k + 1 outcomes: the listed ids and, last, the rest.

    Returns probs [N,K+1] (0 at padding; rest ≥ 0) and `has_target` [N]; None: every row has one. A
    row has a target if it lists an id and, under "renormalise", its ids have any mass. Without a
    tail ("renormalise", "none") the rest is 0: the target is the sparse one, zero elsewhere.
    `is_full` says that every slot lists an id.
    """
    probs, has_target = targets.probs.to(dtype), None
    if not is_full:
        listed = targets.ids >= 0
        probs, has_target = torch.where(listed, probs, 0.0), listed.any(1)
    if tail == "renormalise":
        total = probs.sum(1, keepdim=True)
        has_mass = total[:, 0] > 0
        has_target = has_mass if has_target is None else has_target & has_mass
        probs = probs / torch.where(total > 0, total, 1.0)
    if tail == "bucket":
        rest = 1.0 - probs.sum(1) if targets.tail is None else targets.tail.to(dtype)
        rest = rest.clamp(min=0)[:, None]
    else:
        rest = probs.new_zeros(len(probs), 1)
    return torch.cat([probs, rest], 1), has_target


def loss_scales(
    targets: KernelTargets, settings: LossSettings, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return each row's factors of CE and D in the *reported* ce and kd, [N] each.

    A factor is the row weight and, for "mean", 1 / the number of rows that count: for CE, rows with
    weight ≠ 0 whose label counts; for D, all rows with weight ≠ 0 (one without a target counts and
    adds nothing).
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
        return kd, kd  # no CE to scale
    labelled = targets.labelled(settings.ignore_index)
    if labelled.device.type == "cpu" and bool(labelled.all()):
        return kd, kd
    ce = torch.where(labelled, weight, 0.0)
    if mean:
        ce = ce / (labelled if active is None else active & labelled).sum().clamp(min=1)
    return ce, kd


def merge_rows(teachers: Sequence[SparseTriple], weights: Tensor) -> DecodedTargets:
    """Return Σ_t weights[:, t]·teacher_t over the union of ids; `losses.merge_targets` has the
    rule. Never invents a probability that no teacher stored.

    All shapes follow from the inputs' shapes, so no count is read from a device.
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


def union_rows(teachers: Sequence[KernelTargets]) -> KernelTargets:
    """Return the targets of T teachers over the union of their ids [N,ΣK], with each one's
    probabilities and tail, and the first one's labels and weights.

    All shapes follow from the inputs' shapes, as in `merge_rows`.
    """
    places, order, distinct = _distinct(torch.cat([t.ids for t in teachers], 1))
    rows, size = distinct.shape
    dtype = torch.promote_types(torch.float32, teachers[0].probs.dtype)
    probs = torch.cat([torch.where(t.ids >= 0, t.probs.to(dtype), -1.0) for t in teachers], 1)
    owners = torch.cat([torch.full_like(t.ids, number) for number, t in enumerate(teachers)], 1)
    probs_by_teacher = probs.new_full((rows, len(teachers) * size), -1.0)
    probs_by_teacher.scatter_(1, owners.gather(1, order) * size + places, probs.gather(1, order))
    tails = [
        1.0 - torch.where(t.ids >= 0, t.probs.to(dtype), 0.0).sum(1)
        if t.tail is None
        else t.tail.to(dtype)
        for t in teachers
    ]
    probs_by_teacher = probs_by_teacher.view(rows, len(teachers), size)
    labels, weight = teachers[0].labels, teachers[0].weight
    return KernelTargets(distinct, probs_by_teacher, torch.stack(tails, 1), labels, weight)


def _distinct(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the order [N,K] that sorts ids, each id's place among the distinct ones, and these
    [N,K].

    Distinct ids come first (-1 may be one of them), then -1 as padding.
    """
    ids, order = ids.sort(dim=1, stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    places = first.long().cumsum(1) - 1
    return places, order, torch.full_like(ids, -1).scatter_(1, places, ids)


def _sum_duplicates(ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return distinct ids [N,K] with summed probabilities, by falling probability, padding last."""
    places, order, distinct = _distinct(ids)
    probs = probs.gather(1, order)
    summed = torch.zeros_like(probs).scatter_add_(1, places, probs)
    rank = torch.where(distinct >= 0, summed, -1.0)
    order = rank.argsort(dim=1, descending=True, stable=True)
    return distinct.gather(1, order), summed.gather(1, order)
