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
from rekindle.train.objective.selection import Counts, Groups, OwnSums, StepPlan
from rekindle.train.objective.task_pass import run_heads, taught_rows
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
    wanted: Doubles  # [R]

    @classmethod
    def of(cls, batch: Batch, teacher: str, group: str) -> "RankedRows":
        """Return the rows of a batch."""
        target = batch.targets[teacher]
        assert isinstance(target, SequenceTargetBatch)
        wanted = target.logits[target.rows, 0].astype(np.float64)
        return cls(group_keys(batch, teacher, group), batch.index[target.rows], wanted)

    @classmethod
    def joined(cls, parts: Sequence["RankedRows"]) -> "RankedRows":
        """Return the rows of all parts."""
        columns = ((one.keys, one.index, one.wanted) for one in parts)
        return cls(*map(np.concatenate, zip(*columns, strict=True)))


def group_keys(batch: Batch, teacher: str, group: str) -> Ints:
    """Return the group key of each sequence that has a target of the teacher [R]: equal for equal
    groups, in every process.
    """
    rows = batch.targets[teacher].rows
    if group == "batch":
        return np.zeros(len(rows), np.int64)
    named = {"domain": batch.domains, "document": batch.documents, "group": batch.groups}
    names = named[group]
    if len(names) != len(batch.index):
        raise ValueError(f"the batch does not give the {group} of its sequences")
    keys = [xxhash.xxh3_64_intdigest((name or "").encode()) >> (64 - KEY_BITS) for name in names]
    return np.array(keys, np.int64)[rows]


def groups_of(rows: RankedRows, temperature: float, own: Tensor | None = None) -> Groups:
    """Return the groups of a whole step's rows. ``own``: the student's scores [R], if the step is
    more than one micro-batch of one process.
    """
    found, place, sizes = np.unique(rows.keys, return_inverse=True, return_counts=True)
    # The best score first; among equal ones, the sequence with the lowest number.
    order = np.lexsort((rows.index, -rows.wanted, place))
    best = rows.index[order[np.unique(place[order], return_index=True)[1]]]
    copies = np.bincount(place[rows.index == best[place]], minlength=len(found))
    log_sums = _log_sums(torch.from_numpy(rows.wanted / temperature), place, len(found))
    groups = Groups(
        tuple(found.tolist()),
        tuple(sizes.tolist()),
        tuple(best.tolist()),
        tuple(copies.tolist()),
        tuple(log_sums.tolist()),
    )
    if own is None:
        return groups
    own = own.double()
    sums = _own_sums(own, own - torch.from_numpy(rows.wanted), rows, groups, temperature)
    return replace(groups, own=OwnSums(*(tuple(one.tolist()) for one in sums)))


def ranking_loss(
    own: Tensor,
    wanted: Tensor,
    rows: RankedRows,
    groups: Groups,
    count: int,
    config: RankingConfig,
    temperature: float = 1.0,
) -> Tensor:
    """Return a micro-batch's share of pointwise·mean e² + pairwise·mean over pairs of (eᵢ − eⱼ)² +
    listwise·τ²·mean over groups of KL(q ‖ p).

    ``own`` [R] and ``wanted`` [R]: the student's and the expert's scores of ``rows``; ``groups``
    and ``count`` (of rows) are the whole step's.
    """
    errors = own - wanted
    loss = config.pointwise / max(count, 1) * errors.square().sum()
    pairs = groups.pairs(config.pairs)
    paired, listed = config.pairwise > 0 and pairs > 0, config.listwise > 0 and groups.lists > 0
    if not len(errors) or not (paired or listed):
        return loss
    place = _places(rows, groups)
    group = send(place, own.device)
    if groups.own is None:
        assert len(own) == sum(groups.sizes), "a part of a step needs the step's mean errors"
        held = own.detach()
        means, best, log_sums = _own_sums(held, held - wanted, rows, groups, temperature)
    else:
        means, best, log_sums = (_sent(one, own) for one in groups.own)
    sizes = _sent(groups.sizes, own)
    if paired and config.pairs == "all":
        apart = sizes[group] * (errors - means[group]).square()
        loss = loss + config.pairwise / pairs * apart.sum()
    elif paired:
        share = sizes / _sent(groups.copies, own)
        is_best = send(_is_best(rows, groups, place), own.device)
        pulled = 2.0 * (share * (best - means))[group] * _nothing_but_gradient(errors)
        apart = torch.where(is_best, pulled, (errors - best[group]).square())
        loss = loss + config.pairwise / pairs * apart.sum()
    if listed:
        log_q = wanted / temperature - _sent(groups.log_sums, own)[group]
        log_p = own / temperature - log_sums[group]
        apart = log_q.exp() * (log_q - log_p) + log_p.detach().exp() * _nothing_but_gradient(log_p)
        apart = torch.where((sizes > 1)[group], apart, torch.zeros_like(apart))
        loss = loss + config.listwise / groups.lists * temperature**2 * apart.sum()
    return loss


def _nothing_but_gradient(values: Tensor) -> Tensor:
    """Return zeros that have the gradient of ``values``."""
    return values - values.detach()


def _sent(values: Sequence[float], like: Tensor) -> Tensor:
    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    return send(np.array(values, dtype), like.device)


def _places(rows: RankedRows, groups: Groups) -> Ints:
    """Return the index of each row's group [R]."""
    found: Ints = np.searchsorted(np.array(groups.keys, np.int64), rows.keys)
    return found


def _is_best(rows: RankedRows, groups: Groups, place: Ints) -> NDArray[np.bool_]:
    """Return which rows are their group's best by the expert [R]."""
    found: NDArray[np.bool_] = rows.index == np.array(groups.best, np.int64)[place]
    return found


def _own_sums(
    own: Tensor, errors: Tensor, rows: RankedRows, groups: Groups, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean error, the best row's error and log Σ exp(s/τ) of each group [G], from the
    student's scores ``own`` [R] and their ``errors`` for all the step's rows.
    """
    place = _places(rows, groups)
    group, nothing = send(place, own.device), own.new_zeros(len(groups.keys))
    means = nothing.index_add(0, group, errors) / _sent(groups.sizes, own)
    is_best = send(_is_best(rows, groups, place), own.device)
    best = nothing.index_add(0, group, errors * is_best) / _sent(groups.copies, own)
    return means, best, _log_sums(own / temperature, place, len(groups.keys))


def _log_sums(values: Tensor, place: Ints, count: int) -> Tensor:
    """Return log Σ exp of the ``values`` [R] of each of ``count`` groups [G]."""
    group = send(place, values.device)
    top = values.new_full((count,), -torch.inf).scatter_reduce(0, group, values, "amax")
    shifted = (values - top[group]).exp()
    return top + values.new_zeros(count).index_add(0, group, shifted).log()


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
    found: dict[str, Groups] = {}
    for term in plan.distilled:
        if term.ranking is None:
            continue
        for name in term.teachers:
            rows = RankedRows.joined([RankedRows.of(p, name, term.ranking.group) for p in parts])
            if world.size == 1 and len(parts) == 1:
                found[name] = groups_of(rows, term.temperature)
                continue
            with torch.no_grad():
                each = [run(own_scores, task, p, term, name, world.device) for p in parts]
            scores = torch.cat(each).double().cpu().numpy()
            every, own = zip(*world.gather((rows, scores)), strict=True)  # by process
            joined = torch.from_numpy(np.concatenate(own))
            found[name] = groups_of(RankedRows.joined(every), term.temperature, joined)
    return replace(counts, groups=found)


def own_scores(
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
    return taught_rows(logits, target)[0].float()[:, 0]
