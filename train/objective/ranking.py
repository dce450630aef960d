"""Regression experts whose scores are an order: pointwise and pairwise squared errors.

Source: UEGP (Findings of NAACL 2024), its loss of ranking tasks. With the error e = s − t of each
row, the error of a difference of two scores is eᵢ − eⱼ, and in a group of n rows

    Σ_{i<j} (eᵢ − eⱼ)² = n · Σᵢ (eᵢ − ē)²,

whose gradient takes ē for a constant, as Σᵢ (eᵢ − ē) = 0. So all that a row must know of the other
rows of the step is their number and their mean error: a step may be split among micro-batches and
processes. A step of one micro-batch on one process finds the mean error on the way. Any other costs
one more forward pass of the student, without gradient, for the ranking experts alone. R rows, G
groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.batch import Batch, Ints
from rekindle.train.config import DistillTerm, RankingConfig
from rekindle.train.device_batch import inputs_of, language_rows, send
from rekindle.train.distributed import World
from rekindle.train.objective.selection import Centres, Counts, StepPlan
from rekindle.train.objective.task_pass import run_heads, taught_rows
from rekindle.train.student import Student

Run = Callable[..., Tensor]
KEY_BITS = 48  # of a group's key


def group_keys(batch: Batch, teacher: str, group: str) -> Ints:
    """Return the group's key of each sequence that has a target of the teacher [R]: equal for
    equal groups, in every process.
    """
    rows = batch.targets[teacher].rows
    if group == "batch":
        return np.zeros(len(rows), np.int64)
    names = batch.domains if group == "domain" else batch.documents
    if len(names) != len(batch.index):
        raise ValueError(f"the batch does not say which {group} its sequences are of")
    keys = [xxhash.xxh3_64_intdigest((name or "").encode()) >> (64 - KEY_BITS) for name in names]
    return np.array(keys, np.int64)[rows]


def centres_of(keys: Ints, errors: NDArray[np.float64] | None) -> Centres:
    """Group rows with ``keys`` [R] and ``errors`` [R]."""
    found, inverse, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    means = None
    if errors is not None:
        sums = np.bincount(inverse, errors, minlength=len(found))
        means = tuple((sums / sizes).tolist())
    return Centres(tuple(found.tolist()), tuple(sizes.tolist()), means)


def ranking_loss(
    errors: Tensor, keys: Ints, centres: Centres, rows: int, config: RankingConfig
) -> Tensor:
    """Return the share of a micro-batch in pointwise·mean e² + pairwise·mean over pairs of (eᵢ −
    eⱼ)².

    ``errors`` [R] of rows in the groups ``keys`` [R]; ``rows``: of the whole step.
    """
    loss = config.pointwise / max(rows, 1) * errors.square().sum()
    if not config.pairwise or not centres.pairs:
        return loss
    place = np.searchsorted(np.array(centres.keys, np.int64), keys)
    group = send(place, errors.device)
    sizes = send(np.array(centres.sizes, np.float32), errors.device)
    if centres.means is None:
        assert len(errors) == sum(centres.sizes), "a part of a step needs the step's mean errors"
        sums = torch.zeros_like(sizes).index_add_(0, group, errors.detach())
        means = sums / sizes
    else:
        means = send(np.array(centres.means, np.float32), errors.device)
    apart = sizes[group] * (errors - means[group]).square()
    return loss + config.pairwise / centres.pairs * apart.sum()


def with_centres(
    counts: Counts,
    task: str,
    parts: Sequence[Batch],
    plan: StepPlan,
    world: World,
    run: Run,
) -> Counts:
    """Return ``counts`` with the groups of every ranking teacher of the step.

    ``parts``: this process's micro-batches. ``run(work, …)`` calls ``work(student, …)`` where the
    student's weights are whole; every process makes the same passes.
    """
    found: dict[str, Centres] = {}
    for term in plan.distilled:
        if term.ranking is None:
            continue
        for name in term.teachers:
            keys = np.concatenate([group_keys(p, name, term.ranking.group) for p in parts])
            if world.size == 1 and len(parts) == 1:
                found[name] = centres_of(keys, None)
                continue
            with torch.no_grad():
                each = [run(score_errors, task, p, term, name, world.device) for p in parts]
            errors = torch.cat(each).double().cpu().numpy()
            every = zip(*world.gather((keys, errors)), strict=True)  # by process
            found[name] = centres_of(*map(np.concatenate, every))
    return replace(counts, centres=found)


def score_errors(
    student: Student,
    task: str,
    batch: Batch,
    term: DistillTerm,
    name: str,
    device: torch.device,
) -> Tensor:
    """Return the student's score less the expert's [R], of the sequences that have a target."""
    target = batch.targets[name]
    if term.view == "masked":
        inputs = language_rows(batch, task, device).inputs
    else:
        inputs = inputs_of(batch, target.info.view, device)
    logits = run_heads(student, inputs, batch, {name: target}).logits[name]
    own, wanted = taught_rows(logits, target)
    return (own.float() - wanted)[:, 0]
