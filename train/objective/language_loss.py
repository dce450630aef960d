"""The LM side of a step's loss: cross-entropy and vocabulary teachers, from one forward pass.

Each position goes through the output matrix once if possible: its cross-entropy is formed in the
call for its first distillation loss. P rows of the LM loss, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.batch import Batch, TokenTargetBatch
from rekindle.data.errors import InputError
from rekindle.kernels.checks import CandidateTargets, TargetObjects
from rekindle.kernels.hidden import row_entropy
from rekindle.kernels.losses import KDLoss, LossOptions, linear_kd_loss, merge_targets
from rekindle.kernels.targets import MAX_KEPT, DecodedTargets
from rekindle.train.config import DistillTerm
from rekindle.train.device_batch import (
    LanguageRows,
    kd_targets,
    match_keys,
    send,
    sparse_targets,
)
from rekindle.train.model.split_model import OutputHead
from rekindle.train.objective.selection import Add, Counts, names_of, taught_per_sequence
from rekindle.train.order.ahead import made

Rows = NDArray[np.int64]
IGNORED = -100  # the label of a row without cross-entropy


def head_loss(
    hidden: Tensor,
    head: OutputHead,
    targets: TargetObjects | list[CandidateTargets] | None,
    **options: Unpack[LossOptions],
) -> KDLoss:
    """Return `linear_kd_loss` of hidden states [N,H] and the student's output matrix, summed over
    the rows; without targets only the cross-entropy.
    """
    if targets is None:
        no_ids = torch.full((len(hidden), 1), -1, device=hidden.device)
        no_probs = torch.zeros(no_ids.shape, device=hidden.device)
        targets = DecodedTargets(no_ids, no_probs, no_probs[:, 0])
        options["kd_weight"] = 0.0
    options |= {"reduction": "sum", "softcap": head.softcap, "logit_scale": head.logit_scale}
    return linear_kd_loss(hidden, head.weight, targets, bias=head.bias, **options)


@dataclass(frozen=True)
class Lesson:
    """What a teacher (or a mixture) teaches: targets, and the LM rows that they belong to."""

    name: str  # the name under which the loss is shown
    term: DistillTerm
    weight: float
    targets: TargetObjects
    rows: Rows  # [n] of the P rows, ascending
    row_weight: Tensor | None = None  # [n] 1 or 0: which of them are taught

    @property
    def ids_per_row(self) -> int:
        """Return the number of ids per row that the targets list."""
        return self.targets.ids.shape[1] if isinstance(self.targets, CandidateTargets) else 0

    def joins(self, other: "Lesson") -> bool:
        """Return whether both can be taught in one call, which reads the logits once for both."""
        settings = ((t.temperature, t.divergence, t.tail, t.skew) for t in (self.term, other.term))
        return (
            len(set(settings)) == 1
            and self.row_weight is other.row_weight is None
            and isinstance(self.targets, CandidateTargets)
            and isinstance(other.targets, CandidateTargets)
            and np.array_equal(self.rows, other.rows)
        )


def group_calls(lessons: Sequence[Lesson]) -> list[list[Lesson]]:
    """Group lessons into calls: in order, but each joins the first call that it can. A call has at
    most as many ids as the kernels take.
    """
    calls: list[list[Lesson]] = []
    for lesson in lessons:
        for call in calls:
            if (
                call[0].joins(lesson)
                and sum(each.ids_per_row for each in (*call, lesson)) <= MAX_KEPT
            ):
                call.append(lesson)
                break
        else:
            calls.append([lesson])
    return calls


class LanguageLoss:
    """The LM rows of one micro-batch and their hidden states [P,H]."""

    def __init__(
        self, batch: Batch, rows: LanguageRows, hidden: Tensor, head: OutputHead, counts: Counts
    ):
        self.batch, self.rows, self.hidden, self.head = batch, rows, hidden, head
        self.counts, self.device = counts, hidden.device
        self.width = batch.input_ids.shape[1]

    def add_all(
        self,
        hard: float,
        terms: Sequence[tuple[DistillTerm, float]],
        add: Add,
        separate: bool = False,
    ) -> None:
        """Call ``add(name, loss, shown)`` for each distillation loss, and for the cross-entropy
        with weight ``hard``; ``separate``: each in a call of its own.
        """
        # rows whose cross-entropy is still to be formed
        open_rows = np.full(len(self.rows.keys), hard > 0)
        label_count = max(self.counts.labels, 1)
        lessons = [lesson for term, weight in terms for lesson in self._lessons(term, weight)]
        for call in [[each] for each in lessons] if separate else group_calls(lessons):
            lesson = call[0]
            joined = lesson.row_weight is None and not separate
            with_ce = open_rows[lesson.rows] if joined else np.zeros(1, bool)
            loss = self._call_loss(call, with_ce, hard / label_count)
            for number, each in enumerate(call):
                shown = (loss.kd[number] if len(call) > 1 else loss.kd) / self._row_count(each)
                add(each.name, None if number else loss.loss, shown)
            if with_ce.any():
                add("ce", None, loss.ce / label_count)
                open_rows[lesson.rows] = False
        if hard > 0 and (open_rows.any() or not terms):
            hidden, labels = self._select(np.flatnonzero(open_rows), self.hidden, self.rows.labels)
            loss = head_loss(hidden, self.head, None, labels=labels, ce_weight=hard / label_count)
            add("ce", loss.loss, loss.ce / label_count)

    def _row_count(self, lesson: Lesson) -> int:
        return max(self.counts.rows[lesson.name], 1)

    def _call_loss(
        self, call: Sequence[Lesson], with_ce: NDArray[np.bool_], ce_weight: float
    ) -> KDLoss:
        """Return the loss of lessons in one call; rows of ``with_ce`` add their cross-entropy."""
        lesson, weights = call[0], [each.weight / self._row_count(each) for each in call]
        joined_targets = [
            each.targets for each in call if isinstance(each.targets, CandidateTargets)
        ]
        hidden, row_labels = self._select(lesson.rows, self.hidden, self.rows.labels)
        labels = None
        if with_ce.any():
            labels = row_labels
            if not with_ce.all():
                labels = row_labels.masked_fill(send(~with_ce, self.device), IGNORED)
        return head_loss(
            hidden,
            self.head,
            joined_targets if len(call) > 1 else lesson.targets,
            labels=labels,
            ce_weight=ce_weight if with_ce.any() else 0.0,
            kd_weight=weights if len(call) > 1 else weights[0],
            temperature=lesson.term.temperature,
            divergence=lesson.term.divergence,
            skew=lesson.term.skew,
            tail=lesson.term.tail,
            row_weight=lesson.row_weight,
        )

    def _select(self, rows: Rows, *values: Tensor) -> list[Tensor]:
        """Return ``values`` [P,…] at the rows; all rows without a copy."""
        if len(rows) == len(self.rows.keys):
            return list(values)
        index = send(rows, self.device)
        return [value[index] for value in values]

    def _lessons(self, term: DistillTerm, weight: float) -> list[Lesson]:
        loss_names = names_of(term)
        if term.combine == "mixture" and len(term.teachers) > 1:
            targets, rows = self._mixture(term)
            return [Lesson(loss_names[term.teachers[0]], term, weight, targets, rows)]
        lessons = []
        for name in term.teachers:
            target = self._target(term, name)
            rows = taught_rows(self.batch, name, self.rows.keys)
            decoded = kd_targets(target, term.temperature, term.k, self.device)
            row_weight = None
            if term.entropy_fraction is not None:
                row_weight = self._least_certain(name, rows, term.entropy_fraction)
            lessons.append(Lesson(loss_names[name], term, weight, decoded, rows, row_weight))
        return lessons

    def _target(self, term: DistillTerm, name: str) -> TokenTargetBatch:
        """Return the targets of a teacher, as the term reads them."""
        target = self.batch.targets[name]
        assert isinstance(target, TokenTargetBatch)
        return target.interpolating(term.interpolates)

    def _mixture(self, term: DistillTerm) -> tuple[TargetObjects, Rows]:
        batches = [self._target(term, name) for name in term.teachers]
        places = [taught_rows(self.batch, name, self.rows.keys) for name in term.teachers]
        if any(not np.array_equal(place, places[0]) for place in places):
            raise InputError(
                f"the mixture of {', '.join(term.teachers)} needs all of them at the same "
                "positions, but one has holes where another has none. Finish them with `pipeline "
                "cache-teachers`, or give each its own term"
            )
        decoded = [sparse_targets(t, term.temperature, term.k, self.device) for t in batches]
        weights = torch.full((len(decoded),), 1.0 / len(decoded), device=self.device)
        return merge_targets(decoded, weights), places[0]

    def _least_certain(self, name: str, rows: Rows, fraction: float) -> Tensor:
        """Mark with 1 the fraction of each sequence's positions with the highest entropy of the
        student.

        Costs one more product with the output matrix, without gradient. With equal entropies the
        first position wins.
        """
        head = self.head
        with torch.no_grad():
            (hidden,) = self._select(rows, self.hidden)
            entropy = row_entropy(
                hidden, head.weight, head.bias, softcap=head.softcap, logit_scale=head.logit_scale
            )
            by_entropy = torch.sort(entropy, descending=True, stable=True).indices
            owner = send(owners(self.batch, name), self.device)
            order = by_entropy[torch.sort(owner[by_entropy], stable=True).indices]
            is_taught = send(taught_places(self.batch, name, fraction), self.device)
            return torch.zeros_like(entropy).index_copy_(0, order, is_taught.to(entropy.dtype))


def taught_rows(batch: Batch, name: str, keys: Rows) -> Rows:
    """Return which of the LM rows, whose ``keys`` [P] ascend, a teacher's targets [n] belong to."""
    target = batch.targets[name]
    assert isinstance(target, TokenTargetBatch)
    return made(
        batch, f"rows of {name}", lambda: match_keys(keys, target, batch.input_ids.shape[1])
    )


def owners(batch: Batch, name: str) -> Rows:
    """Return the sequence of each of a teacher's targets [n], ascending."""
    return made(batch, f"sequences of {name}", lambda: batch.targets[name].rows)


def taught_places(batch: Batch, name: str, fraction: float) -> NDArray[np.bool_]:
    """Return which of a teacher's targets [n] are taught, once those of each sequence are in the
    order of the student's entropy: their places in it are known on the host.
    """

    def make() -> NDArray[np.bool_]:
        sequences = batch.targets[name].rows
        first = np.searchsorted(sequences, sequences)
        is_taught: NDArray[np.bool_] = np.arange(len(sequences)) - first < taught_per_sequence(
            sequences, fraction
        )
        return is_taught

    return made(batch, f"taught of {name}", make)
