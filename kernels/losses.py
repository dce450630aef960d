"""Distillation losses from teachers' targets: entry points, checks and dispatch; no arithmetic.

Shapes: N rows (tokens), V vocabulary, K kept ids a row, H hidden size, T teachers.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from rekindle.kernels.call import Call, Computation, StudentLogits
from rekindle.kernels.checks import (
    CandidateTargets,
    check_kinds,
    check_mixed,
    check_student,
    check_whole_values,
    label_weight,
    prepare_targets,
    weights_of,
)
from rekindle.kernels.choice import AnyTargets, choose
from rekindle.kernels.divergences import LINEAR_DIVERGENCES, skew_of
from rekindle.kernels.encoded import EncodedTargets, check_encoded, decode
from rekindle.kernels.hidden import (
    WholeLogits,
    WholeTargets,
    block_product_dtype,
    check_whole,
)
from rekindle.kernels.ops import losses
from rekindle.kernels.targets import (
    DecodedTargets,
    KernelTargets,
    LossSettings,
    SparseTriple,
    check_tensor,
    merge_rows,
    read_number,
    union_rows,
)


class KDLoss(NamedTuple):
    """loss = ce_weight·ce + kd_weight·τ²·kd. Only `loss` carries a gradient.

    kd is [T] or [N,T] if the targets were a list of T teachers'.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor


def kd_loss(
    logits: Tensor | StudentLogits,
    target_ids: AnyTargets | list[CandidateTargets],
    target_probs: Tensor | None = None,
    *,
    tail_prob: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    ce_weight: float | None = None,
    kd_weight: float | Sequence[float] = 1.0,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
    skew: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> KDLoss:
    """Return cross-entropy on labels plus a divergence from a teacher's targets, computed from
    logits.

        loss = ce_weight·CE(labels, z) + kd_weight·τ²·D(q ‖ softmax(z/τ))
        z    = cap·tanh(logit_scale·logits / cap)

    The gradient is exactly the derivative of the returned loss. Targets and row_weight get none.
    Numbers may be NumPy scalars or tensors of no dimension, too; they are read, so the host waits
    for one that is on a GPU. torch.compile compiles anew for another number, not for other rows.

    Args:
        logits: [N,V] float64 (computed and returned in float64), float32, bfloat16 or float16
            (computed in float32). Or StudentLogits of a linear head: see `linear_kd_loss`.
        target_ids: ids, or an object that holds all targets. Ids are [N,K] integers in [0,V),
            distinct within a row; -1 is padding, in any place.
            - DecodedTargets or EncodedTargets hold everything at once; leave target_probs and
              tail_prob out. EncodedTargets are as a cache stores them; the Triton kernels decode
              them in registers.
            - HiddenTargets or DenseTargets (hidden.py) give the exact D over the whole vocabulary,
              from a bounded block of the teacher's logits at a time. `tail` is ignored in that
              case. PyTorch computes them, on any device.
            - A list of T DecodedTargets or EncodedTargets, one per teacher. They share all other
              arguments but kd_weight: the logits are read once for all of them, loss =
              ce_weight·CE + Σ_t kd_weight_t·τ²·D_t, and kd has a last axis [T].
        target_probs: [N,K] probabilities at this temperature; ignored at padding.
        tail_prob: [N] target mass outside the ids, for tail bucket only; None takes
            1 − Σ target_probs (not below 0). In a row with ids the two must sum to 1;
            DecodedTargets may sum to less, like a mixture in which a teacher has no target.
        labels: [N] integers in [0,V) or `ignore_index`. None: no cross-entropy.
        temperature: τ > 0, applied after scale and softcap; the labels use τ = 1.
        ce_weight: weight of CE. Required with labels (0.0: report `ce` only); without labels only
            None or 0.0.
        kd_weight: weight of τ²·D; for several teachers one number for all, or one each.
        divergence: forward_kl KL(q‖p) | reverse_kl KL(p‖q) | jsd (β = ½) | tvd (½ Σ|q − p|) |
            skew_kl KL(q ‖ αq + (1−α)p), at most −log α. For a sample (kinds threshold and random,
            or ids drawn in any other way) use forward_kl only: it is linear in q, so its mean over
            draws teaches q. The others give an id that was not drawn probability zero, and have
            another minimum. EncodedTargets of a sample are refused; plain ids and probabilities
            cannot be checked for this.
        tail: how the target outside its ids is treated. bucket: one more outcome, "any other
            id", compares tail_prob with the student's mass there. renormalise: q/Σq on the ids and
            zero elsewhere. none: q as it is on the ids and zero elsewhere (unbiased samples).
        row_weight: [N], multiplies the row's ce and kd. Weight 0 ignores the row entirely: its
            logits may hold anything, even NaN, and get a gradient of zero.
        ignore_index: the label that does not count.
        reduction: mean: D over the rows with weight ≠ 0 (a row without target counts and adds
            nothing), CE over those of them whose label counts; sum; none: [N], 0 in ignored rows.
            Without any such row: 0.
        impl: auto | triton | torch.
        skew: α of skew_kl, in (0, 1); None: 0.1. Refused with another divergence.
        softcap: final logit softcapping as in Gemma 2 (-inf stays -inf); None: off.
        logit_scale: > 0, multiplies the logits first.

    A target probability of zero counts as 2^-126 where its logarithm is needed (reverse KL outside
    the ids). So does the student's probability of an id whose logit is -inf, as a constant without
    gradient. If all unlisted ids have logit -inf, or there is none, the bucket is left out of D.
    Losses are finite for every logit that is not NaN or +inf.

    Returns: KDLoss(loss, ce, kd), scalars or [N] by `reduction`; ce and kd are CE and D, with row
        weights applied, detached.

    Raises: ValueError, naming the row, for arguments that break these rules. Values are checked on
        CPU tensors only, because reading them would wait for a device: the Triton kernels give
        a row with an id or label outside [0,V) a loss of NaN.

    Sources: Hinton et al. 2015 (τ²); Anshumann et al., ACL 2025 (tails); Ko et al., ICML 2024
        (DistiLLM: skew_kl, where p is the teacher).
    """
    student = logits if isinstance(logits, StudentLogits) else StudentLogits(logits)
    several = isinstance(target_ids, list)
    all_targets: list[AnyTargets] = [*target_ids] if isinstance(target_ids, list) else [target_ids]
    check_kinds(all_targets, several)
    settings = LossSettings(
        temperature=temperature,
        ce_weight=label_weight(labels, ce_weight),
        kd_weights=weights_of(kd_weight, len(all_targets), several),
        divergence=divergence,
        tail=tail,
        ignore_index=ignore_index,
        reduction=reduction,
        softcap=softcap,
        logit_scale=logit_scale,
        skew=skew_of(divergence, None if skew is None else read_number("skew", skew)),
    ).checked()
    check_student(student)
    whole = WholeLogits()
    if isinstance(target_ids, WholeTargets):
        check_whole(target_ids, len(student.inputs), student.vocabulary, student.inputs.device)
        whole = WholeLogits.of(target_ids)
    for teacher_targets in all_targets:
        if isinstance(teacher_targets, EncodedTargets):
            check_encoded(teacher_targets, len(student.inputs), student.inputs.device)
    implementation = choose(impl, student, all_targets)
    if len(all_targets) == 1:
        targets, settings = _pack_or_decode(
            all_targets[0], target_probs, tail_prob, settings, implementation
        )
        targets = targets._replace(labels=labels, weight=row_weight)
        targets, is_known_full = prepare_targets(
            targets, student, settings, implementation, sums_to_one=tail_prob is not None
        )
        if is_known_full:
            settings = settings._replace(full=True)
    else:
        all_sparse = []
        for teacher_targets in all_targets:
            sparse, settings = _pack_or_decode(
                teacher_targets, target_probs, tail_prob, settings, "torch"
            )
            sparse = sparse._replace(labels=labels, weight=row_weight)
            all_sparse.append(prepare_targets(sparse, student, settings, "torch")[0])
        targets = union_rows(all_sparse)
    is_whole = whole.states is not None
    if isinstance(target_ids, WholeTargets):
        check_whole_values(target_ids, targets.active())
    if student.weight is None:  # the gradient has the logits' layout
        if not _rows_are_dense(student.inputs):
            # contiguous() would keep a single row's stride as it is, however large
            student = StudentLogits(student.inputs.clone(memory_format=torch.contiguous_format))
        elif is_whole:
            student = StudentLogits(student.inputs.contiguous())
    product_dtype = None
    if student.weight is not None and is_whole:
        product_dtype = block_product_dtype(student.inputs, student.weight, exactly=impl == "torch")
    elif student.weight is not None and implementation == "triton":
        product_dtype = student.fused_dtype
    reduced = losses(
        Call(student, targets, whole, settings, Computation(implementation, product_dtype))
    )
    loss = KDLoss(*reduced)
    return loss._replace(kd=loss.kd[..., None]) if several and len(all_targets) == 1 else loss


class LossOptions(TypedDict, total=False):
    """The options of both losses, for callers that pass them on; see `kd_loss`."""

    tail_prob: Tensor | None
    labels: Tensor | None
    temperature: float
    ce_weight: float | None
    kd_weight: float | Sequence[float]
    divergence: str
    tail: str
    row_weight: Tensor | None
    ignore_index: int
    reduction: str
    impl: str
    skew: float | None
    softcap: float | None
    logit_scale: float


def linear_kd_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: AnyTargets | list[CandidateTargets],
    target_probs: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    tail_prob: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    ce_weight: float | None = None,
    kd_weight: float | Sequence[float] = 1.0,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
    skew: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> KDLoss:
    """Return `kd_loss` of logits = hidden @ weight.T + bias, holding only a bounded block of them.

    The gradient is formed in the forward pass, block by block (float32 sums, or float64 for float64
    inputs); under `no_grad` none is formed. A call's blocks take at most 256 MiB on CPU; on a GPU a
    sixteenth of its memory and at least 2 GiB (but at least one row), and the weight is copied if V
    ids do not fill 16 bytes.

    On CPU, rows with weight 0 and rows with neither label nor target are dropped before the first
    product. On a GPU all rows are kept, so that the host never waits for the device.

    With impl torch the products are in float32, also under autocast. With impl triton they are in
    the autocast dtype, or the inputs' common one, and dW is still summed in float32. Products with
    HiddenTargets are in float32 too, except on a GPU where impl triton's would be in bfloat16.

    hidden is [N,H], weight [V,H] (the output embedding), bias [V] or None; every other argument
    follows the rules of `kd_loss`.

    Returns, Raises: as for `kd_loss`.
    """
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight is {weight!r}; it must be the output embedding [V,H]")
    # Arguments are spelled out here and above so that help() and editors show them.
    return kd_loss(
        StudentLogits(hidden, weight, bias),
        target_ids,
        target_probs,
        tail_prob=tail_prob,
        labels=labels,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        divergence=divergence,
        tail=tail,
        row_weight=row_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        impl=impl,
        skew=skew,
        softcap=softcap,
        logit_scale=logit_scale,
    )


def merge_targets(
    teachers: Sequence[SparseTriple], weights: Tensor | Sequence[float]
) -> DecodedTargets:
    """Return the mixture Σ_t w_t·q_t of several teachers' sparse targets as one sparse target.

    Args:
        teachers: (ids [N,K_t] with -1 padding, probs [N,K_t], tail [N] or None = 1 − Σ) per
            teacher, all at the same temperature.
        weights: [T], or [N,T] for weights per row; ≥ 0, used as given (1/T each for the plain
            mean). A teacher with weight 0 in a row, or without ids there, adds neither ids nor
            tail to it.

    If one teacher lists an id and another does not, the second one's probability of it is an
    unknown part of its tail and stays there. The merged probability of that id is then a lower
    bound, the merged tail Σ_t w_t·tail_t an upper bound, and the total mass is exact.

    Returns: DecodedTargets (ids [N,ΣK_t] int64, probs [N,ΣK_t], tail [N]): distinct ids by falling
        probability (ties by id), padding -1 with probability 0 last; float64 if any probs are, else
        float32.

    Raises: ValueError for shapes that do not fit, and (on CPU tensors), naming the row, for weights
        and probabilities that are negative, NaN or inf.
    """
    if not teachers:
        raise ValueError(
            "merge_targets was given no teacher; it needs at least one (ids, probs, tail)"
        )
    for t, teacher in enumerate(teachers):
        if not (isinstance(teacher, tuple | list) and len(teacher) == 3):
            raise ValueError(
                f"teacher {t} is a {type(teacher).__qualname__}; it must be (ids, probs, tail) at "
                "the temperature, which `rekindle.kernels.encoded.decode` makes of EncodedTargets"
            )
    rows = len(teachers[0][0])

    def shapes() -> str:
        return f"for ids and probs [N,K] and tail [N] with N = {rows}"

    for t, (ids, probs, tail) in enumerate(teachers):
        check_tensor(f"teacher {t}'s ids", ids, (rows, "K"), shapes)
        check_tensor(f"teacher {t}'s probs", probs, tuple(ids.shape), shapes)
        check_tensor(f"teacher {t}'s tail", tail, (rows,), shapes)
    weights = torch.as_tensor(weights)
    if weights.shape not in ((len(teachers),), (rows, len(teachers))):
        raise ValueError(
            f"weights are {tuple(weights.shape)}; they must be [T] = [{len(teachers)}] "
            f"or [N,T] = [{rows},{len(teachers)}]"
        )
    weights = weights.expand(rows, len(teachers))
    check_mixed(teachers, weights)
    return merge_rows(teachers, weights)


def _rows_are_dense(logits: Tensor) -> bool:
    """Return whether a row's logits are contiguous and the rows not far apart."""
    size = logits.shape[1]
    return logits.stride(1) == 1 and size <= logits.stride(0) <= 2 * size


def _pack_or_decode(
    given: AnyTargets,
    probs: Tensor | None,
    tail: Tensor | None,
    settings: LossSettings,
    implementation: str,
) -> tuple[KernelTargets, LossSettings]:
    """Return the targets packed for the Triton kernels or decoded for PyTorch; plain ones
    unchanged; without ids for whole distributions.
    """
    if isinstance(given, Tensor):
        if probs is None:
            raise ValueError("target_probs is missing; ids alone are no target")
        if tail is not None and settings.tail != "bucket":
            raise ValueError(
                f"tail_prob is given, but tail={settings.tail!r} ignores it: leave it out, or set "
                "tail='bucket'"
            )
        return KernelTargets(given, probs, tail), settings
    if probs is not None or tail is not None:
        type_name = type(given).__name__
        raise ValueError(
            f"{type_name} carry their own probabilities and tail; leave target_probs and tail_prob "
            "out"
        )
    if isinstance(given, WholeTargets):
        empty = given[0].new_empty(len(given[0]), 0, dtype=torch.int64)
        return KernelTargets(empty, empty, None), settings
    if isinstance(given, EncodedTargets) and given.temperature not in (None, settings.temperature):
        raise ValueError(
            f"temperature is {settings.temperature}, but the targets are for {given.temperature}: "
            "the mass outside their ids is known at that temperature only. Give the loss the "
            "targets' temperature"
        )
    is_sample = isinstance(given, EncodedTargets) and given.sampled
    if is_sample and settings.divergence not in LINEAR_DIVERGENCES:
        raise ValueError(
            f"divergence is {settings.divergence!r}, which is not linear in the target, and the "
            "targets are a sample: an id that was not drawn would count as impossible. Use "
            f"{', '.join(LINEAR_DIVERGENCES)}, or targets of another kind (topk, dense, hidden)"
        )
    if isinstance(given, EncodedTargets) and implementation == "triton":
        return given.packed(), settings._replace(kept=given.kept, planes=given.planes)
    decoded = decode(given, settings.temperature) if isinstance(given, EncodedTargets) else given
    if decoded.probs is None:
        raise ValueError("the probs of DecodedTargets are missing; ids alone are no target")
    return KernelTargets(*decoded), settings
