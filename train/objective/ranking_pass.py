"""What ranking terms must know of a whole step before it is split: the mean error of each group.

A step of one micro-batch on one process finds it on the way. Any other costs one more forward pass
of the student, without gradient, for the ranking experts alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rekindle.data.batch import Batch, Ints, SequenceTargetBatch
from rekindle.train.config import DistillTerm
from rekindle.train.device_batch import language_rows, send
from rekindle.train.distributed import World
from rekindle.train.objective.objective import Objective, inputs_of
from rekindle.train.objective.ranking import centres_of, group_keys
from rekindle.train.objective.selection import Counts
from rekindle.train.student import Student

Run = Callable[..., Any]


def with_centres(
    counts: Counts,
    objective: Objective,
    parts: Sequence[Batch],
    step: int,
    world: World,
    run: Run,
) -> Counts:
    """``counts`` with the groups of every ranking teacher of ``step``.

    ``parts``: this process's micro-batches. ``run(work, …)`` calls ``work(student, …)`` where the
    student's weights are whole; every process makes the same passes.
    """
    ranking = [term for term in objective.terms(step) if term.ranking is not None]
    if not ranking:
        return counts
    found = {}
    for term in ranking:
        assert term.ranking is not None
        for name in term.teachers:
            keys = np.concatenate([present_keys(p, name, term.ranking.group) for p in parts])
            if world.size == 1 and len(parts) == 1:
                found[name] = centres_of(keys, None)
                continue
            with torch.no_grad():
                each = [run(_errors, objective, p, term, name, world.device) for p in parts]
            errors = torch.cat(each).double().cpu().tolist()
            every = np.array(gathered(world, keys.tolist()), np.int64)
            found[name] = centres_of(every, gathered(world, errors))
    return replace(counts, centres=found)


def present_keys(batch: Batch, teacher: str, group: str) -> Ints:
    """The group keys [R] of the sequences that have a target of the teacher."""
    target = batch.targets[teacher]
    assert isinstance(target, SequenceTargetBatch)
    return group_keys(batch, group)[target.present]


def gathered(world: World, values: Sequence[float]) -> list[float]:
    """The ``values`` of all processes, one process after another; the same everywhere."""
    sizes = [len(values) if rank == world.rank else 0 for rank in range(world.size)]
    lengths = [round(size) for size in world.sum(sizes)]
    before = sum(lengths[: world.rank])
    after = sum(lengths) - before - len(values)
    return world.sum([0.0] * before + list(values) + [0.0] * after)


def _errors(
    student: Student,
    objective: Objective,
    batch: Batch,
    term: DistillTerm,
    name: str,
    device: torch.device,
) -> Tensor:
    """The student's score less the expert's [R], of the sequences that have a target."""
    target = batch.targets[name]
    assert isinstance(target, SequenceTargetBatch)
    if term.view == "masked":
        inputs = language_rows(batch, objective.task, device).inputs
    else:
        inputs = dict(inputs_of(student, batch, target.info.view, device))
    shown = student.with_domains(inputs, batch.domains)
    logits = student(shown, sequence_heads=[name]).logits[name]
    keep = send(np.flatnonzero(target.present), device)
    wanted = send(target.logits[target.present], device)
    return (logits[keep].float() - wanted)[:, 0]
