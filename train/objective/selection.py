"""What a step learns from: which of a batch's targets, and how many rows each mean is over.

Decided once per step on the host, before the batch is split: gradient accumulation and the world
size then change only rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.batch import (
    Batch,
    Ints,
    SequenceTargetBatch,
    TargetBatch,
    TokenTargetBatch,
)
from rekindle.train.config import MIXED, DistillTerm
from rekindle.train.device_batch import masked_only
from rekindle.train.method import Method
from rekindle.train.objective.pseudo_labels import confident_only

Add = Callable[[str, Tensor | None, Tensor], None]  # a term's name, its loss, and the value to show


@dataclass(frozen=True)
class StepPlan:
    """What a step reads, and the parts of its loss.

    ``weights`` are those of the cross-entropy, of every distillation term and of every method, in
    the configuration's order; ``terms`` and ``methods`` are those with a weight above 0, each with
    its weight.
    """

    step: int
    hard: float  # weight of the cross-entropy
    terms: tuple[tuple[DistillTerm, float], ...]
    methods: tuple[tuple[Method, float], ...]
    weights: tuple[float, ...]

    @property
    def users(self) -> tuple[DistillTerm, ...]:
        """Return the users of targets: the terms, and each method as if it were one."""
        read = [tuple(method.teachers_at(self.step)) for method, _ in self.methods]
        return *self.distilled, *(DistillTerm(teachers=names) for names in read if names)

    @property
    def distilled(self) -> tuple[DistillTerm, ...]:
        """Return the distillation terms without their weights."""
        return tuple(term for term, _ in self.terms)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Return the teachers whose targets are read, each once."""
        return tuple(dict.fromkeys(name for user in self.users for name in user.teachers))


class StudentSums(NamedTuple):
    """What a step's groups give when summed over the student's scores."""

    mean_errors: Tensor  # [G]
    best_errors: Tensor  # [G] of the rows that the expert scores best
    log_sums: Tensor  # [G] log Σ exp(s/τ)


@dataclass(frozen=True)
class Groups:
    """The groups of a whole step that a ranking expert has scored.

    ``student_sums`` is None if the step is one micro-batch of one process, which has these sums
    itself.
    """

    keys: tuple[int, ...]  # [G] ascending
    sizes: tuple[int, ...]  # [G] rows
    best: tuple[int, ...]  # [G] the sequence that the expert scores best
    copies: tuple[int, ...]  # [G] rows of this sequence: 1, or more if a step repeats it
    log_sums: tuple[float, ...]  # [G] log Σ exp(t/τ) of the expert's scores
    student_sums: StudentSums | None = field(default=None, compare=False)

    def pair_count(self, rule: str) -> int:
        """Return the number of pairs of rows in the groups: all, or those of the best row with
        another.
        """
        if rule == "all":
            return sum(size * (size - 1) // 2 for size in self.sizes)
        return sum(self.sizes) - sum(self.copies)

    @property
    def list_count(self) -> int:
        """Return the number of groups with more than one row."""
        return sum(size > 1 for size in self.sizes)


@dataclass(frozen=True)
class StepVectors:
    """The vectors of a whole step for one teacher: N rows of all micro-batches and processes, by
    ascending ``keys``; equal keys are the same sequence twice.
    """

    keys: NDArray[np.int64]  # [N] numbers of sequences
    student: Tensor  # [N,D] from a pass without gradient, on its device
    teacher: NDArray[np.float32]  # [N,D']


@dataclass(frozen=True)
class Counts:
    """How many rows each mean is over: positions with a label; rows of each distillation loss."""

    labels: int
    rows: Mapping[str, int]  # by the loss's name, see `names_of`
    groups: Mapping[str, Groups] = field(default_factory=dict)  # by ranking teacher
    # By embedding teacher whose rows are compared with each other; none if the step is one
    # micro-batch of one process, which has them all.
    vectors: Mapping[str, StepVectors] = field(default_factory=dict, compare=False)

    def over(self, total: Callable[[Sequence[float]], Sequence[float]]) -> "Counts":
        """Return the counts of all processes; ``total`` sums a list over them."""
        names = sorted(self.rows)
        totals = [round(v) for v in total([self.labels, *(self.rows[n] for n in names)])]
        return Counts(totals[0], dict(zip(names, totals[1:], strict=True)))


def names_of(term: DistillTerm) -> dict[str, str]:
    """Return teacher -> the name of its loss: its own, or one for all that share a mean."""
    shared = "kd/" + "+".join(term.teachers)
    separate = term.combine == "separate"
    return {name: f"kd/{name}" if separate else shared for name in term.teachers}


def select_targets(batch: Batch, terms: Sequence[DistillTerm]) -> Batch:
    """Return the batch with only the targets that the terms use."""
    targets = dict(batch.targets)
    for term in terms:
        for name in term.teachers:
            if term.positions == "masked" or sees_clean_text(targets[name]):
                targets[name] = masked_only(targets[name], batch)
        if term.divergence == "pseudo_label":
            for name in term.teachers:
                targets[name] = confident_only(targets[name], term.confidence)
        if term.combine == "route":
            targets |= _route({name: targets[name] for name in term.teachers}, len(batch.index))
    return replace(batch, targets=targets)


def sees_clean_text(target: TargetBatch) -> bool:
    """Return whether a masked LM made it from the whole text: then it has targets at every token,
    but a masked LM has a loss only at the masked ones (self-evolution).
    """
    return isinstance(target, TokenTargetBatch) and target.info.sees_clean_text


def at_masked_positions(batch: Batch) -> Batch:
    """Return the batch with targets of masked LMs only where the student has a loss."""
    targets = {
        name: masked_only(target, batch) if sees_clean_text(target) else target
        for name, target in batch.targets.items()
    }
    return replace(batch, targets=targets)


def count_rows(batch: Batch, task: str, terms: Sequence[DistillTerm]) -> Counts:
    """Count the rows of a batch with selected targets."""
    labels = len(batch.next_places[0])
    if task == "masked_lm":  # without masks there is no loss on the text
        labels = 0 if batch.masked is None else len(batch.masked.labels)
    rows: dict[str, int] = {}
    for term in terms:
        loss_names = names_of(term)
        if term.combine in MIXED:
            taught = common_rows([batch.targets[name] for name in term.teachers])
            rows[loss_names[term.teachers[0]]] = len(taught)
            continue
        for name in term.teachers:
            count = _row_count(batch.targets[name], term.entropy_fraction)
            rows[loss_names[name]] = rows.get(loss_names[name], 0) + count
    return Counts(labels, rows)


def common_rows(targets: Sequence[TargetBatch]) -> Ints:
    """Return where a mixture is made: sequences that all experts know, or the first one's rows."""
    common = targets[0].rows
    if isinstance(targets[0], SequenceTargetBatch):
        for target in targets[1:]:
            common = np.intersect1d(common, target.rows)
    return common


def taught_per_sequence(rows: Ints, fraction: float) -> Ints:
    """Return the number of taught positions of each position's sequence [P]: the fraction, rounded
    up, at least 1.

    ``rows`` [P], ascending: the sequence of each position.
    """
    _, inverse, counts = np.unique(rows, return_inverse=True, return_counts=True)
    # 0.1 · 30 is slightly above 3: that is 3, not 4.
    taught = np.maximum(np.ceil(counts * fraction - 1e-9), 1).astype(np.int64)
    per_position: Ints = taught[inverse]
    return per_position


def _row_count(target: TargetBatch, fraction: float | None) -> int:
    if fraction is None:
        return len(target.rows)
    first = np.unique(target.rows, return_index=True)[1]
    return int(taught_per_sequence(target.rows, fraction)[first].sum())


def _route(targets: Mapping[str, TargetBatch], sequences: int) -> dict[str, TargetBatch]:
    """Give each sequence to the first teacher that has targets for it."""
    free = np.ones(sequences, bool)
    routed: dict[str, TargetBatch] = {}
    for name, target in targets.items():
        routed[name] = target.keep(free[target.rows])
        free[target.rows] = False
    return routed
