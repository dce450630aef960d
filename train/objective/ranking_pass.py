"""What ranking terms must know of a whole step before it is split: the mean error of each group.

A step of one micro-batch on one process finds it on the way. Any other costs one more forward pass
of the student, without gradient, for the ranking experts alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rekindle.data.batch import Batch
from rekindle.train.config import DistillTerm
from rekindle.train.device_batch import language_rows
from rekindle.train.distributed import World
from rekindle.train.objective.ranking_loss import centres_of, group_keys
from rekindle.train.objective.selection import Counts
from rekindle.train.objective.step_plan import StepPlan
from rekindle.train.objective.task_pass import inputs_of, run_heads, taught_rows
from rekindle.train.student import Student

Run = Callable[..., Tensor]


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
    ranking = [term for term in plan.distilled if term.ranking is not None]
    if not ranking:
        return counts
    found = {}
    for term in ranking:
        assert term.ranking is not None
        for name in term.teachers:
            keys = np.concatenate([group_keys(p, name, term.ranking.group) for p in parts])
            if world.size == 1 and len(parts) == 1:
                found[name] = centres_of(keys, None)
                continue
            with torch.no_grad():
                each = [run(_errors, task, p, term, name, world.device) for p in parts]
            errors = torch.cat(each).double().cpu().numpy()
            every = zip(*world.gather((keys, errors)), strict=True)  # by process
            found[name] = centres_of(*map(np.concatenate, every))
    return replace(counts, centres=found)


def _errors(
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
        inputs = inputs_of(student, batch, target.info.view, device)
    logits = run_heads(student, inputs, batch, {name: target}).logits[name]
    own, wanted = taught_rows(logits, target)
    return (own.float() - wanted)[:, 0]
