"""Check the arguments of a distillation loss: types, shapes, and values that are distributions.

Values are checked on CPU tensors only, because reading them would wait for a device. None of a
loss's arithmetic is here.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rekindle.kernels.call import StudentLogits
from rekindle.kernels.encoded import EncodedTargets
from rekindle.kernels.hidden import HiddenTargets, WholeTargets
from rekindle.kernels.targets import (
    DecodedTargets,
    KernelTargets,
    LossSettings,
    SparseTriple,
    check_tensor,
    read_number,
)

# targets that carry all a loss needs
TargetObjects = EncodedTargets | DecodedTargets | WholeTargets
Sums = tuple[float, float]  # the least and the largest that a row's ids and tail may have

# A row's probabilities may sum to 1 + SUM_TOLERANCE: rounding sixty of them to bfloat16 adds less.
SUM_TOLERANCE = 0.01
TAIL_ROUNDING = 1e-5  # a tail between -TAIL_ROUNDING and 0 comes of rounding 1 - sum in float32
FLOAT32_MAX = torch.finfo(torch.float32).max
MAX_LIST_SIZE = 1024  # up to this many numbers are checked as Python lists

CandidateTargets = EncodedTargets | DecodedTargets  # what several teachers may have in one call


def check_kinds(all_targets: Sequence[object], several: bool) -> None:
    """Raise ValueError for targets that no loss takes, alone or, if `several`, in a list."""
    if several and not all_targets:
        raise ValueError(
            "target_ids is an empty list; it must hold the targets of at least one teacher"
        )
    for number, targets in enumerate(all_targets):
        if several and not isinstance(targets, CandidateTargets):
            raise ValueError(
                f"target_ids[{number}] is a {_type_name(targets)}; a list holds EncodedTargets or "
                "DecodedTargets, one for each teacher. Give other targets alone, in a call of "
                "their own"
            )
        check_kind(targets)


def weights_of(kd_weight: float | Sequence[float], teachers: int, several: bool) -> Sequence[float]:
    """Return each teacher's weight of D [T]."""
    if not isinstance(kd_weight, Sequence):
        return (kd_weight,) * teachers
    if not several or len(kd_weight) != teachers:
        owner = f"a list of {teachers} teachers'" if several else "one teacher's"
        advice = "give a number, or a list with one for each" if several else "give a number"
        raise ValueError(f"kd_weight is {list(kd_weight)}, but the targets are {owner}; {advice}")
    return tuple(kd_weight)


def check_kind(targets: object) -> None:
    """Raise ValueError for targets that are neither a tensor nor a type that carries its own
    values.
    """
    if isinstance(targets, Tensor | TargetObjects):
        return
    advice = "rekindle.train.to_device.to_device makes such targets from a batch of a cache"
    if isinstance(targets, tuple):
        advice = "target_ids, target_probs and tail_prob are three arguments, not a tuple"
    raise ValueError(
        f"target_ids is a {_type_name(targets)}; it must be a torch tensor [N,K], or "
        f"EncodedTargets, DecodedTargets, HiddenTargets or DenseTargets: {advice}"
    )


def check_student(student: StudentLogits) -> None:
    """Raise ValueError if logits, or hidden and weight, are not matrices that fit each other."""
    inputs, weight, bias = student
    matrices = {"logits": inputs} if weight is None else {"hidden": inputs, "weight": weight}
    for name, matrix in matrices.items():
        if not isinstance(matrix, Tensor):
            raise ValueError(f"{name} is a {_type_name(matrix)}; it must be a torch tensor")
        if matrix.dim() != 2 or not matrix.is_floating_point():
            advice = " (one row per token: flatten(0, 1) joins all sequences)"
            raise ValueError(
                f"{name} is {matrix.dtype} {tuple(matrix.shape)}; it must be a floating-point "
                f"matrix{advice if matrix.dim() == 3 else ''}"
            )
    shapes = "of hidden [N,H], weight [V,H] and bias [V]"
    check_tensor("weight", weight, ("V", inputs.shape[1]), shapes, inputs.device)
    check_tensor("bias", bias, (student.vocabulary,), shapes, inputs.device)


def label_weight(labels: Tensor | None, ce_weight: float | None) -> float:
    """Return the weight of CE; raise ValueError for labels without one, or one without labels."""
    weight = 0.0 if ce_weight is None else read_number("ce_weight", ce_weight)
    if labels is None and weight:
        raise ValueError(
            f"ce_weight is {ce_weight} and there are no labels, so there is no cross-entropy. Give "
            "labels [N], or leave ce_weight out"
        )
    if labels is not None and ce_weight is None:
        raise ValueError(
            "labels are given without ce_weight: set ce_weight=1.0 to train on them, or 0.0 to "
            "get their cross-entropy (.ce) only"
        )
    return weight


def prepare_targets(
    targets: KernelTargets,
    student: StudentLogits,
    settings: LossSettings,
    impl: str,
    sums_to_one: bool = False,
) -> tuple[KernelTargets, bool]:
    """Check the targets, and return them without gradient (with ids and labels as int64 for
    PyTorch), and whether they are known to be full: every slot lists an id and every label counts.

    Raise ValueError for targets that do not match the student's N rows or its device, and on a CPU
    for invalid values. With `sums_to_one`, ids and tail of a row with ids must sum to 1, not less.
    """
    rows, device, encoded = len(student.inputs), student.inputs.device, settings.kept > 0
    ids, probs, tail, labels, weight = targets[:5]

    def shapes() -> str:
        return f"for target_ids and target_probs [N,K], all else [N], with N = {rows} rows"

    check_tensor("target_ids", ids, (rows, "K"), shapes, device)
    check_tensor("target_probs", probs, tuple(ids.shape), shapes, device)
    for name, tensor in {"tail_prob": tail, "labels": labels, "row_weight": weight}.items():
        check_tensor(name, tensor, (rows,), shapes, device)
    _check_integers("target_ids", ids)
    _check_integers("labels", labels)
    if any(t is not None and t.requires_grad for t in targets):
        targets = KernelTargets(*(None if t is None else t.detach() for t in targets))  # type: ignore[arg-type]
    reads_values = device.type == "cpu" and not encoded and not torch.compiler.is_compiling()
    if reads_values or impl == "torch":  # the kernel takes any integer dtype
        if not encoded and ids.dtype != torch.int64:
            targets = targets._replace(ids=targets.ids.long())
        if labels is not None and labels.dtype != torch.int64:
            targets = targets._replace(labels=labels.long())
    if reads_values and weight is not None:
        _raise_for_first(
            ~torch.isfinite(weight),
            lambda row: f"row_weight holds {float(weight[row]):g} in row {row}; it must be finite",
        )
    least = 1 - SUM_TOLERANCE if sums_to_one else 0.0
    sums = least, 1 + SUM_TOLERANCE if settings.tail == "bucket" else FLOAT32_MAX
    return targets, reads_values and _raise_or_find_full(
        targets, student.vocabulary, settings, sums
    )


def _check_integers(name: str, integers: Tensor | None) -> None:
    if integers is None or not (integers.is_floating_point() or integers.dtype == torch.bool):
        return
    raise ValueError(f"{name} is {integers.dtype}; it must hold integers")


def check_whole_values(targets: WholeTargets, active: Tensor) -> None:
    """Raise ValueError, naming the row, if an ``active`` row [N] of ``targets`` is not a
    distribution. Checks CPU tensors only.
    """
    values = targets.states if isinstance(targets, HiddenTargets) else targets.log_probs
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if isinstance(targets, HiddenTargets):
        largest = values.float().abs().amax(1) if values.shape[1] else values.new_zeros(len(values))
        largest = largest if targets.scale is None else largest * targets.scale
        _raise_for_first(
            ~torch.isfinite(largest) & active,
            lambda row: (
                f"the teacher's states of row {row} hold NaN or inf, before or after they are "
                "multiplied by scale"
            ),
        )
        return
    best = values.amax(1) if values.shape[1] else values.new_zeros(len(values))
    invalid = ~torch.isfinite(best) | values.isnan().any(1)
    _raise_for_first(
        invalid & active,
        lambda row: (
            f"the teacher's log_probs of row {row} hold NaN or +inf, or are all -inf: that is not "
            "a distribution"
        ),
    )


def check_mixed(teachers: Sequence[SparseTriple], weights: Tensor) -> None:
    """Raise ValueError for targets that weights [N,T] cannot mix; values on CPU tensors only."""
    if weights.device.type == "cpu" and not bool(((weights >= 0) & torch.isfinite(weights)).all()):
        raise ValueError("weights hold a negative value, NaN or inf; a mixture's weights are ≥ 0")
    for number, teacher in enumerate(teachers):
        _check_integers(f"teacher {number}'s ids", teacher[0])
        if teacher[0].device.type == "cpu" and not torch.compiler.is_compiling():
            _check_mixed_values(number, *teacher, weights[:, number].cpu() != 0)


def _check_mixed_values(
    number: int, ids: Tensor, probs: Tensor, tail: Tensor | None, active: Tensor
) -> None:
    _raise_for_first(
        (ids < -1).any(1) & active,
        lambda row: f"teacher {number}'s ids hold a value below -1 (-1 is padding) in row {row}",
    )
    invalid = (~((probs >= 0) & torch.isfinite(probs)) & (ids >= 0)).any(1)
    _raise_for_first(
        invalid & active,
        lambda row: (
            f"teacher {number}'s probs hold a negative value, NaN or inf in row {row}; they are "
            "probabilities"
        ),
    )
    if tail is not None:
        _raise_for_first(
            ~((tail >= 0) & torch.isfinite(tail)) & (ids >= 0).any(1) & active,
            lambda row: (
                f"teacher {number}'s tail holds {float(tail[row]):g} in row {row}; it is a "
                f"probability: not negative, and a number{_clamp_advice(float(tail[row]))}"
            ),
        )


def _raise_or_find_full(
    targets: KernelTargets, vocabulary: int, settings: LossSettings, sums: Sums
) -> bool:
    """Raise ValueError, naming the row, for wrong values; else return `_is_valid_and_full`."""
    if _is_valid_and_full(targets, vocabulary, settings, sums):
        return True
    if _all_pass(targets, vocabulary, settings, sums):
        return False
    active = targets.active()
    ids, listed = targets.ids, (targets.ids >= 0) & active[:, None]

    def first_probs(row: int) -> str:
        return ", ".join(f"{v:g}" for v in targets.probs[row][listed[row]][:6].tolist())

    outside = (ids < -1) | (ids >= vocabulary)
    _raise_for_first(
        outside.any(1) & active,
        lambda row: (
            f"target_ids hold {int(ids[row][outside[row]][0])} in row {row}; they must lie in "
            f"[0, V) = [0, {vocabulary}), or be -1 for padding"
        ),
    )
    ordered = ids.sort(1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    _raise_for_first(
        repeated.any(1) & active,
        lambda row: (
            f"target_ids hold {int(ordered[row, 1:][repeated[row]][0])} twice in row {row}; ids "
            "must be distinct within a row (merge_targets sums duplicates)"
        ),
    )
    probs = torch.where(listed, targets.probs, 0.0)
    _raise_for_first(
        ~((probs >= 0) & torch.isfinite(probs)).all(1),
        lambda row: (
            f"target_probs hold a negative value, NaN or inf in row {row} ({first_probs(row)} …); "
            "they are probabilities"
        ),
    )
    _check_masses(targets, probs, active, sums, first_probs)
    _check_labels(targets, vocabulary, settings.ignore_index)
    return False


def _is_valid_and_full(
    targets: KernelTargets, vocabulary: int, settings: LossSettings, sums: Sums
) -> bool:
    """Return whether the call is small, its values are valid, every slot lists an id and every
    label counts.

    Uses Python lists: for few numbers they cost a tenth of tensor or array operations.
    """
    ids, probs, tail, labels = targets[:4]
    if not 0 < ids.numel() <= MAX_LIST_SIZE or torch._C._are_functorch_transforms_active():
        return False
    if any(
        len({*row}) < len(row) or min(row) < 0 or max(row) >= vocabulary for row in ids.tolist()
    ):
        return False
    tails = [0.0] * len(ids) if tail is None else tail.tolist()
    for row, tail_mass in zip(probs.tolist(), tails, strict=True):
        # a sum with NaN fails the comparison, whatever `min` returns
        mass = sum(row) + tail_mass
        if not (min(row) >= 0 and tail_mass >= 0 and sums[0] <= mass <= sums[1]):
            return False
    if labels is None:
        return True
    numbers = labels.tolist()
    return min(numbers) >= 0 and max(numbers) < vocabulary and settings.ignore_index not in numbers


def _all_pass(targets: KernelTargets, vocabulary: int, settings: LossSettings, sums: Sums) -> bool:
    """Return True if all rows are valid. False proves nothing: a row that does not count may hold
    anything.
    """
    ids, probs, tail, labels = targets[:4]
    if ids.numel() == 0:
        return False
    lowest, highest = (int(extreme) for extreme in ids.aminmax())
    ordered = ids.sort(1).values
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if lowest < 0:
        repeated &= ordered[:, 1:] >= 0
        probs = torch.where(ids >= 0, probs, 0.0)
    is_valid = lowest >= -1 and highest < vocabulary and float(probs.amin()) >= 0
    if not is_valid or bool(repeated.any()) or not (tail is None or float(tail.amin()) >= 0):
        return False
    mass = probs.sum(1, dtype=torch.float64)
    mass = mass if tail is None else mass + tail
    if not (sums[0] <= float(mass.amin()) and float(mass.amax()) <= sums[1]):
        return False
    if labels is not None:
        lowest, highest = (int(extreme) for extreme in labels.aminmax())
        if lowest < 0 or highest >= vocabulary:
            outside = (labels < 0) | (labels >= vocabulary)
            return not bool((outside & (labels != settings.ignore_index)).any())
    return True


def _check_masses(
    targets: KernelTargets,
    probs: Tensor,
    active: Tensor,
    sums: Sums,
    first_probs: Callable[[int], str],
) -> None:
    """Check that tails are probabilities, and the sums of ids and tail.

    A sum below 1 is valid where it is no pair of arguments: a mixture has one where a teacher has
    no target.
    """
    least, largest = sums
    mass = probs.sum(1, dtype=torch.float64)
    if (tail := targets.tail) is not None:
        _raise_for_first(
            ~((tail >= 0) & torch.isfinite(tail)) & active,
            lambda row: (
                f"tail_prob holds {float(tail[row]):g} in row {row}; it is a probability: it must "
                f"be a number and not negative{_clamp_advice(float(tail[row]))}"
            ),
        )
        mass = mass + torch.where((targets.ids >= 0).any(1), tail, 0.0)
    if largest < FLOAT32_MAX:
        with_tail = "" if tail is None else " and tail_prob"
        _raise_for_first(
            (mass > largest) & active,
            lambda row: (
                f"target_probs{with_tail} sum to {float(mass[row]):g} in row {row} "
                f"({first_probs(row)} …), which is no distribution: they must sum to 1 or less. "
                "Apply exp() to log-probabilities and a softmax to logits; for weights to be "
                "scaled to 1, use tail='renormalise'"
            ),
        )
    _raise_for_first(
        (mass < least) & (targets.ids >= 0).any(1) & active,
        lambda row: (
            f"target_probs and tail_prob sum to {float(mass[row]):g} in row {row}; they must sum "
            "to 1. Leave tail_prob out, and the rest counts as the tail. For a mixture in which "
            "some teacher has no target, pass the DecodedTargets that merge_targets returns"
        ),
    )


def _check_labels(targets: KernelTargets, vocabulary: int, ignore_index: int) -> None:
    if (labels := targets.labels) is None:
        return
    invalid = targets.labelled(ignore_index) & ((labels < 0) | (labels >= vocabulary))
    _raise_for_first(
        invalid & targets.active(),
        lambda row: (
            f"labels hold {int(labels[row])} in row {row}; a label lies in [0, V) = "
            f"[0, {vocabulary}) or is ignore_index = {ignore_index}"
        ),
    )


def _clamp_advice(tail: float) -> str:
    """Return what to do about a tail that only rounding can have made negative."""
    if not -TAIL_ROUNDING < tail < 0:
        return ""
    return ". One computed as 1 - probs.sum(1) is rounded: add .clamp(min=0)"


def _raise_for_first(invalid: Tensor, message: Callable[[int], str]) -> None:
    """Raise ValueError for the first wrong row, if any of the rows [N] is."""
    if bool(invalid.any()):
        raise ValueError(message(int(invalid.nonzero()[0])))


def _type_name(value: object) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
