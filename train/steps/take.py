"""Take one optimiser step, and read what it measured once the device has finished.

A step is judged where it is computed, so nothing is waited for before the optimiser's step: a loss
or gradient that is not finite, or a loss that explodes, leaves weights and moments unchanged, and
so do all steps after it, until the loop has read why. On a GPU that is one step later, while the
next one runs; on a CPU, where nothing runs in parallel, at once.
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import write_json
from rekindle.train.config import TrainConfig
from rekindle.train.distributed import ParallelStudent
from rekindle.train.objective.ranking import with_groups
from rekindle.train.objective.ready import PreparedBatch
from rekindle.train.objective.selection import StepPlan
from rekindle.train.objective.term_gradients import with_norms
from rekindle.train.objective.vector_loss import with_vectors
from rekindle.train.optimizer import set_learning_rate
from rekindle.train.precision import autocast
from rekindle.train.prepare import Prepared
from rekindle.train.record.watch import LATEST, LossWatch, Usual, Weights


@dataclass(frozen=True)
class Training:
    """Everything that a step of a run needs."""

    out: Path
    cache: Cache
    config: TrainConfig
    student: ParallelStudent
    optimizer: torch.optim.Optimizer
    prepared: Prepared
    lineage: list[dict[str, object]]  # the student's, as its files have it


class PendingNumbers:
    """Numbers [n] on their way from the device: ``read`` waits for them, and for nothing else."""

    def __init__(self, values: Tensor):
        self._values = values
        self._arrival: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._arrival = torch.cuda.Event()
            # The copy runs on the stream of the numbers' device, which need not be the current one.
            self._arrival.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """Wait for the numbers and return them."""
        if self._arrival is not None:
            self._arrival.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


@dataclass
class PendingStep:
    """A step given to the device; its values may not be known yet."""

    plan: StepPlan
    names: list[str]  # of the losses that are logged
    rate: float
    head_alone: bool
    began: float
    usual: Usual
    values: PendingNumbers  # norm of the gradient, loss, those of `names`, tokens
    other_values: dict[str, float] = field(default_factory=dict)  # other values logged for it

    @property
    def steps_done(self) -> int:
        """Return the number of steps done after it."""
        return self.plan.step + 1


class Judge:
    """Decides which steps count: on the device before the optimiser's step, and later for the loop.

    ``recent``: losses of a resumed run (``recent_losses``). ``late``: whether a step is read only
    after the next one was given to the device.
    """

    def __init__(
        self,
        training: Training,
        recent: Iterable[tuple[float, Weights]] = (),
        late: bool | None = None,
    ):
        device = training.student.world.device
        self.training = training
        self.late = int(device.type == "cuda" if late is None else late) * LATEST
        self.watch = LossWatch(training.config.explosion_factor, recent, self.late)
        self._stopped = torch.zeros((), device=device)  # 1 from the first step that does not count
        self._unread: deque[PendingStep] = deque()
        self._read = 0.0  # when the latest step was read

    def apply(self, loss: Tensor, norm: Tensor, usual: Usual) -> None:
        """Take the optimiser's step if this one and all before it count; waits for nothing."""
        counts = torch.isfinite(loss) & torch.isfinite(norm) & (loss <= usual.limit)
        self._stopped = torch.maximum(self._stopped, (~counts).float())
        optimizer: Any = self.training.optimizer
        optimizer.found_inf = self._stopped  # as torch's GradScaler tells a fused optimiser
        optimizer.step()

    def add(self, pending: PendingStep) -> None:
        """Keep a step until it is read."""
        self._unread.append(pending)

    def finished_steps(self, everything: bool = False) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield the steps done and each one's logged values, in order, except those the device may
        still be working on. ``everything``: wait for these too.

        Raises InputError at the first step that does not count.
        """
        while len(self._unread) > (0 if everything else self.late):
            pending = self._unread.popleft()
            yield pending.steps_done, self._values(pending)

    def _values(self, pending: PendingStep) -> dict[str, float]:
        norm, loss, *values, tokens = pending.values.read()
        read_at = time.perf_counter()
        # A step given to the device while another ran began when that one ended.
        seconds, self._read = read_at - max(pending.began, self._read), read_at
        problem = self.watch.complaint(loss, norm, pending.plan.weights, pending.usual)
        if problem is not None:
            refused_step = (self.training, pending.plan.step, problem)
            self.training.student.world.decide(lambda: _refuse_step(*refused_step))
        return (
            {"loss": loss, "learning_rate": pending.rate, "grad_norm": norm}
            | with_norms(dict(zip(pending.names, values, strict=True)))
            | ({"head_alone": 1.0} if pending.head_alone else {})
            | {"tokens_per_second": tokens / seconds, "tokens": tokens}
            | pending.other_values
        )


def take_step(training: Training, ready: PreparedBatch, judge: Judge) -> PendingStep:
    """Take an optimiser step on this process's share of a batch.

    Gradients are averaged over the processes, so each share is multiplied by their number.
    """
    began = time.perf_counter()
    config, world, objective = training.config, training.student.world, training.prepared.objective
    plan, batch, parts = ready.plan, ready.batch, ready.parts
    step, run = plan.step, training.student.run
    head_alone = step < config.warm_head_steps
    training.student.student.train_head_alone(head_alone)
    # Dropout depends only on (seed, step, process), so a resumed run draws the same.
    torch.manual_seed((config.seed * 1_000_003 + step + 7_919 * world.rank) % 2**63)
    rate = set_learning_rate(training.optimizer, config, step)
    counts = objective.counts(batch, plan).over(world.sum)
    loss = zero = torch.zeros((), device=world.device)
    terms: dict[str, Tensor] = {}
    with autocast(config.precision, world.device):
        counts = with_groups(counts, objective.task, parts, plan, world, run)
        counts = with_vectors(counts, objective.task, parts, plan, world, run)
    for number, part in enumerate(parts):
        with training.student.accumulating(last=number == len(parts) - 1):
            with autocast(config.precision, world.device):
                total, term_losses = run(objective.loss, part, counts, plan, world.device)
            (total * world.size).backward()
        loss = loss + total.detach()
        for name, value in term_losses.items():
            terms[name] = terms.get(name, zero) + value
    norm = training.student.clip(config.max_grad_norm or math.inf).double()
    names = objective.loss_names(counts, plan)
    losses = [loss, *(terms.get(name, zero) for name in names)]
    own_sums = torch.stack([value.float() for value in losses]).double()
    tokens = own_sums.new_full((1,), int(batch.lengths.sum()))
    summed = world.sum_on_device(torch.cat([own_sums, tokens]))
    usual = judge.watch.usual(plan.weights)
    judge.apply(summed[0], norm, usual)
    training.optimizer.zero_grad(set_to_none=True)
    values = PendingNumbers(torch.cat([norm[None], summed]))
    pending = PendingStep(plan, names, rate, head_alone, began, usual, values)
    judge.add(pending)
    return pending


def _refuse_step(training: Training, step: int, problem: str) -> None:
    """Write the ids of the step's examples to a file; raise the InputError that names it."""
    index = training.prepared.stream.order.at(step)
    digests = [str(digest) for digest in training.cache.gather(index, []).digests]
    path = training.out / f"stopped-at-step-{step + 1:08d}.json"
    content = {"step": step + 1, "reason": problem}
    write_json(path, content | {"sequences": index.tolist(), "digests": digests})
    raise InputError(
        f"{problem} at step {step + 1}. Its {len(index)} examples are listed in {path}; look at "
        f"one with `pipeline inspect {training.cache.store.location} --example {index[0]}`. Try a "
        "lower learning rate or a longer warm-up in another --out; with a finite loss you can "
        "continue with --resume and train.explosion_factor: null"
    )
