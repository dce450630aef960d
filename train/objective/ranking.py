"""Losses for experts whose scores rank sequences: on scores, on their differences, on groups.

A row has the student's score s, the expert's score t and the error e = s − t; the difference of two
rows' scores has the error eᵢ − eⱼ. A step's loss has three parts, each with a weight:

- pointwise: the mean over rows of e²;
- pairwise: the mean over pairs of rows of a group of (eᵢ − eⱼ)² (MarginMSE, Hofstätter et al. 2020;
  UEGP, Findings of NAACL 2024), over all pairs, or only over those of
  the row that the expert scores best with each other row of its group;
- listwise: τ² times the mean over groups of KL(q ‖ p), with q = softmax(t/τ) and p = softmax(s/τ)
  over a group's rows (ListNet's top-one probabilities, Cao et al. 2007).

A group may lie in several micro-batches and processes. To compute a row's part of the whole step's
loss, and its exact gradient, a few numbers of its group are enough: the count n, the mean error ē,
the best row's error e_b, and log Σ exp(·/τ) of s and of t:

  Σ_{i<j} (eᵢ − eⱼ)² = n · Σᵢ (eᵢ − ē)², whose gradient treats ē as a constant;
  Σ_{j≠b} (e_b − eⱼ)² has the gradient 2 (eⱼ − e_b) at j, and 2 n (e_b − ē) at b;
  τ² KL(q ‖ p) has the gradient τ (pᵢ − qᵢ) at i.

A step of one micro-batch on one process takes the student's numbers from its own forward pass. Any
other step runs the student once more, without gradient, for the ranking experts only. R is the
number of rows, G of groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.batch import Batch, Ints, SequenceTargetBatch
from rekindle.train.config import DistillTerm
from rekindle.train.device_batch import inputs_of, language_rows, send
from rekindle.train.distributed import World
from rekindle.train.objective.selection import Counts, Groups, StepPlan, StudentSums
from rekindle.train.objective.task_pass import align_with_targets, run_heads
from rekindle.train.ranking.config import RankingConfig
from rekindle.train.student import Student

Run = Callable[..., Tensor]
Doubles = NDArray[np.float64]
KEY_BITS = 48  # of a group's key


@dataclass(frozen=True)
class RankedRows:
    """The sequences that a ranking expert has scored: their groups, numbers, and its scores."""

    keys: Ints  # [R] equal for equal groups, in every process
    index: Ints  # [R] the sequences' numbers in the cache
    teacher_scores: Doubles  # [R]

    @classmethod
    def of(cls, batch: Batch, teacher: str, group: str) -> "RankedRows":
        """Return the rows of a batch."""
        target = batch.targets[teacher]
        assert isinstance(target, SequenceTargetBatch)
        teacher_scores = target.logits[target.rows, 0].astype(np.float64)
        return cls(group_keys(batch, teacher, group), batch.index[target.rows], teacher_scores)

    @classmethod
    def joined(cls, parts: Sequence["RankedRows"]) -> "RankedRows":
        """Return the rows of all parts."""
        columns = ((one.keys, one.index, one.teacher_scores) for one in parts)
        return cls(*map(np.concatenate, zip(*columns, strict=True)))


def group_keys(batch: Batch, teacher: str, group: str) -> Ints:
    """Return the group key of each sequence that has a target of the teacher [R]: equal for equal
    groups, in every process.
    """
    rows = batch.targets[teacher].rows
    if group == "batch":
        return np.zeros(len(rows), np.int64)
    names_by_group = {"domain": batch.domains, "document": batch.documents, "group": batch.groups}
    names = names_by_group[group]
    if len(names) != len(batch.index):
        raise ValueError(f"the batch does not give the {group} of its sequences")
    keys = [xxhash.xxh3_64_intdigest((name or "").encode()) >> (64 - KEY_BITS) for name in names]
    return np.array(keys, np.int64)[rows]


def groups_of(rows: RankedRows, temperature: float, student_scores: Tensor | None = None) -> Groups:
    """Return the groups of a whole step's rows. ``student_scores`` [R]: given if the step is more
    than one micro-batch of one process.
    """
    keys, group_index, sizes = np.unique(rows.keys, return_inverse=True, return_counts=True)
    # The best score first; among equal ones, the sequence with the lowest number.
    order = np.lexsort((rows.index, -rows.teacher_scores, group_index))
    best = rows.index[order[np.unique(group_index[order], return_index=True)[1]]]
    copies = np.bincount(group_index[rows.index == best[group_index]], minlength=len(keys))
    log_sums = _log_sums(
        torch.from_numpy(rows.teacher_scores / temperature), group_index, len(keys)
    )
    groups = Groups(
        tuple(keys.tolist()),
        tuple(sizes.tolist()),
        tuple(best.tolist()),
        tuple(copies.tolist()),
        tuple(log_sums.tolist()),
    )
    if student_scores is None:
        return groups
    student_scores = student_scores.double()
    errors = student_scores - send(rows.teacher_scores, student_scores.device)
    sums = _student_sums(student_scores, errors, rows, groups, temperature)
    return replace(groups, student_sums=StudentSums(*sums))


def ranking_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    rows: RankedRows,
    groups: Groups,
    count: int,
    config: RankingConfig,
    temperature: float = 1.0,
) -> Tensor:
    """Return a micro-batch's share of pointwise·mean e² + pairwise·mean over pairs of (eᵢ − eⱼ)² +
    listwise·τ²·mean over groups of KL(q ‖ p).

    ``student_scores`` and ``teacher_scores`` [R] are those of ``rows``; ``groups`` and ``count``
    (of rows) are the whole step's.
    """
    errors = student_scores - teacher_scores
    loss = config.pointwise / max(count, 1) * errors.square().sum()
    pair_count = groups.pair_count(config.pairs)
    has_pairs, has_lists = (
        config.pairwise > 0 and pair_count > 0,
        config.listwise > 0 and groups.list_count > 0,
    )
    if not len(errors) or not (has_pairs or has_lists):
        return loss
    group_index = _group_index(rows, groups)
    row_groups = send(group_index, student_scores.device)
    if groups.student_sums is None:
        assert len(student_scores) == sum(groups.sizes), (
            "a part of a step needs the step's mean errors"
        )
        detached = student_scores.detach()
        mean_errors, best_errors, log_sums = _student_sums(
            detached, detached - teacher_scores, rows, groups, temperature
        )
    else:
        dtype = torch.promote_types(student_scores.dtype, torch.float32)
        mean_errors, best_errors, log_sums = (sums.to(dtype) for sums in groups.student_sums)
    sizes = _to_tensor(groups.sizes, student_scores)
    if has_pairs and config.pairs == "all":
        row_losses = sizes[row_groups] * (errors - mean_errors[row_groups]).square()
        loss = loss + config.pairwise / pair_count * row_losses.sum()
    elif has_pairs:
        share = sizes / _to_tensor(groups.copies, student_scores)
        is_best = send(_is_best(rows, groups, group_index), student_scores.device)
        gradients = 2.0 * (share * (best_errors - mean_errors))[row_groups] * _gradient_only(errors)
        row_losses = torch.where(is_best, gradients, (errors - best_errors[row_groups]).square())
        loss = loss + config.pairwise / pair_count * row_losses.sum()
    if has_lists:
        log_q = (
            teacher_scores / temperature - _to_tensor(groups.log_sums, student_scores)[row_groups]
        )
        log_p = student_scores / temperature - log_sums[row_groups]
        row_losses = log_q.exp() * (log_q - log_p) + log_p.detach().exp() * _gradient_only(log_p)
        row_losses = torch.where((sizes > 1)[row_groups], row_losses, torch.zeros_like(row_losses))
        loss = loss + config.listwise / groups.list_count * temperature**2 * row_losses.sum()
    return loss


def _gradient_only(values: Tensor) -> Tensor:
    """Return zeros that have the gradient of ``values``."""
    return values - values.detach()


def _to_tensor(values: Sequence[float], like: Tensor) -> Tensor:
    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    return send(np.array(values, dtype), like.device)


def _group_index(rows: RankedRows, groups: Groups) -> Ints:
    """Return the index of each row's group [R]."""
    index: Ints = np.searchsorted(np.array(groups.keys, np.int64), rows.keys)
    return index


def _is_best(rows: RankedRows, groups: Groups, group_index: Ints) -> NDArray[np.bool_]:
    """Return which rows are their group's best by the expert [R]."""
    is_best: NDArray[np.bool_] = rows.index == np.array(groups.best, np.int64)[group_index]
    return is_best


def _student_sums(
    student_scores: Tensor, errors: Tensor, rows: RankedRows, groups: Groups, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean error, the best row's error and log Σ exp(s/τ) of each group [G], from the
    ``student_scores`` [R] and their ``errors`` for all the step's rows.
    """
    group_index = _group_index(rows, groups)
    row_groups, zeros = (
        send(group_index, student_scores.device),
        student_scores.new_zeros(len(groups.keys)),
    )
    mean_errors = zeros.index_add(0, row_groups, errors) / _to_tensor(groups.sizes, student_scores)
    is_best = send(_is_best(rows, groups, group_index), student_scores.device)
    best_errors = zeros.index_add(0, row_groups, errors * is_best) / _to_tensor(
        groups.copies, student_scores
    )
    return (
        mean_errors,
        best_errors,
        _log_sums(student_scores / temperature, group_index, len(groups.keys)),
    )


def _log_sums(values: Tensor, group_index: Ints, count: int) -> Tensor:
    """Return log Σ exp of the ``values`` [R] of each of ``count`` groups [G]."""
    row_groups = send(group_index, values.device)
    top = values.new_full((count,), -torch.inf).scatter_reduce(0, row_groups, values, "amax")
    shifted = (values - top[row_groups]).exp()
    return top + values.new_zeros(count).index_add(0, row_groups, shifted).log()


def with_groups(
    counts: Counts,
    task: str,
    parts: Sequence[Batch],
    plan: StepPlan,
    world: World,
    run: Run,
) -> Counts:
    """Return ``counts`` with the groups of every ranking teacher of the step.

    ``parts``: this process's micro-batches. ``run(work, …)`` calls ``work(student, …)`` while the
    student's weights are whole (not sharded); every process must make the same passes.
    """
    groups: dict[str, Groups] = {}
    for term in plan.distilled:
        if term.ranking is None:
            continue
        for name in term.teachers:
            rows = RankedRows.joined([RankedRows.of(p, name, term.ranking.group) for p in parts])
            if world.size == 1 and len(parts) == 1:
                groups[name] = groups_of(rows, term.temperature)
                continue
            with torch.no_grad():
                each = [run(score_sequences, task, p, term, name, world.device) for p in parts]
            by_process = world.gather(rows)
            counts_of_rows = [len(each.keys) for each in by_process]
            scores = world.gather_rows(torch.cat(each).double(), counts_of_rows)
            groups[name] = groups_of(RankedRows.joined(by_process), term.temperature, scores)
    return replace(counts, groups=groups)


def score_sequences(
    student: Student,
    task: str,
    batch: Batch,
    term: DistillTerm,
    name: str,
    device: torch.device,
) -> Tensor:
    """Return the student's score [R] of each sequence that has a target."""
    target = batch.targets[name]
    if term.view == "masked":
        inputs = language_rows(batch, task, device).inputs
    else:
        inputs = inputs_of(batch, target.info.view, device)
    logits = run_heads(student, inputs, batch, {name: target}).logits[name]
    return align_with_targets(logits, target)[0].float()[:, 0]
