"""The objective on held-out sequences: the training loss, with the weights of the last step, over
all of them at once.

With the weights of the step at which it is measured, it would change although the student does not.
With those of the last step it is what the run ends on, and comparable throughout. Every term is
summed up batch by batch and divided at the end by its rows in all batches: how they are cut changes
only rounding. Terms are added in the configuration's order: in the order of a set the last bit
would differ between processes, and between a resumed run and an uninterrupted one. The
load-balancing loss of routers belongs to training only and is left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.batch import Batch, TokenTargetBatch
from rekindle.train.config import DistillTerm
from rekindle.train.distributed import World
from rekindle.train.objective.objective import Objective
from rekindle.train.objective.ranking import RankedRows, groups_of, ranking_loss, score_sequences
from rekindle.train.objective.selection import names_of
from rekindle.train.objective.vector_loss import HeldOutVectors
from rekindle.train.student import Student

Sums = dict[str, tuple[float, int]]  # by name: the sum, and over how many rows
Scored = tuple[RankedRows, NDArray[np.float64]]  # rows of a ranking expert, the student's scores
Key = TypeVar("Key")


def is_plain(term: DistillTerm, target: TokenTargetBatch) -> bool:
    """Return whether a vocabulary term's divergence is the one that an evaluation reports."""
    default = DistillTerm(teachers=term.teachers)
    same = ("combine", "positions", "entropy_fraction", "divergence", "tail")
    return term.temperature == target.kind.readable_temperature and all(
        getattr(term, name) == getattr(default, name) for name in same
    )


class HeldOutLoss:
    """Sums up the objective over the batches given to ``add``."""

    def __init__(self, objective: Objective):
        self.objective, self.plan = objective, objective.last
        self._sums: dict[str, NDArray[np.float64]] = {}  # weighted loss, rows
        self._vectors = HeldOutVectors()
        self._ranked: dict[str, list[Scored]] = {}  # by term, the rows of the parts

    def add(self, student: Student, batch: Batch, device: torch.device, known_sums: Sums) -> None:
        """Add a batch that has all its targets. ``known_sums``: sums of unweighted losses that the
        evaluation has formed anyway; they are not computed again.
        """
        objective, plan = self.objective, self.plan
        batch = objective.select_targets(batch, plan)
        counts = objective.counts(batch, plan)
        if plan.hard > 0:
            self._add_sum("ce", plan.hard * known_sums["ce"][0], known_sums["ce"][1])
        other_terms: list[tuple[DistillTerm, float]] = []
        for term, weight in plan.terms:
            names = dict.fromkeys(names_of(term).values())
            if term.ranking is not None:
                self._add_ranked(student, batch, term, device)
            elif self._compares_rows(term):
                self._vectors.add(student, objective.task, batch, term, device)
            elif names.keys() <= known_sums.keys():
                for name in names:
                    self._add_sum(
                        name,
                        weight * term.temperature**2 * known_sums[name][0],
                        known_sums[name][1],
                    )
            else:
                other_terms.append((term, weight))
        sums = self._term_sums(student, batch, other_terms, device)
        for method, weight in plan.methods:
            if method.evaluates_losses:
                names = dict.fromkeys(f"{method.name}/{name}" for name in method.count(batch))
                sums |= {name: weight * known_sums[name][0] for name in names}
                continue
            for name, loss, _ in method.losses(student, batch, plan.step, device):
                sums[f"{method.name}/{name}"] = weight * float(loss)
        for name, total in sums.items():
            self._add_sum(name, total, counts.rows[name])

    def join(self, world: World) -> None:
        """Add the sums of the other processes."""
        gathered = world.gather((self._sums, self._ranked, self._vectors))
        self._sums = add_sums(sums for sums, _, _ in gathered)
        names = dict.fromkeys(name for _, ranked, _ in gathered for name in ranked)
        ranked_by_process = [ranked for _, ranked, _ in gathered]
        self._ranked = {
            n: [r for ranked in ranked_by_process for r in ranked.get(n, ())] for n in names
        }
        self._vectors.join([vectors for _, _, vectors in gathered])

    def mean(self) -> float | None:
        """Return the objective over all batches; None if none of its terms had a row."""
        losses = [total / rows for total, rows in self._sums.values() if rows]
        for term, weight in self.plan.terms:
            if self._compares_rows(term) and (mean := self._vectors.mean(term)) is not None:
                losses.append(weight * mean)
            for name in term.teachers:
                if term.ranking is not None and name in self._ranked:
                    losses.append(weight * ranked_loss(self._ranked[name], term))
        return float(sum(losses)) if losses else None

    def _compares_rows(self, term: DistillTerm) -> bool:
        """Return whether a loss of vectors compares the sequences with each other."""
        info = self.objective.teachers[term.teachers[0]]
        return info.kind == "embedding" and term.of_vectors.compares_rows

    def _term_sums(
        self,
        student: Student,
        batch: Batch,
        terms: list[tuple[DistillTerm, float]],
        device: torch.device,
    ) -> dict[str, float]:
        """Return the weighted loss of each of the terms, summed over its rows in a batch."""
        if not terms:
            return {}
        plan = replace(self.plan, hard=0.0, terms=tuple(terms), methods=())
        counts = self.objective.counts(batch, plan)
        ones = replace(counts, labels=1, rows=dict.fromkeys(counts.rows, 1))
        # For a vocabulary teacher the loss may be joined with the cross-entropy's.
        factors = {
            name: weight * term.temperature**2
            for term, weight in terms
            if self.objective.teachers[term.teachers[0]].is_vocabulary
            for name in names_of(term).values()
        }
        sums: dict[str, float] = {}

        def add(name: str, loss: Tensor | None, shown: Tensor) -> None:
            value = shown * factors[name] if name in factors else loss
            sums[name] = sums.get(name, 0.0) + (0.0 if value is None else float(value))

        self.objective.add_terms(student, batch, ones, plan, device, add)
        return sums

    def _add_ranked(
        self, student: Student, batch: Batch, term: DistillTerm, device: torch.device
    ) -> None:
        """Add the scores to be compared with each other."""
        assert term.ranking is not None
        for name in term.teachers:
            rows = RankedRows.of(batch, name, term.ranking.group)
            scores = score_sequences(student, self.objective.task, batch, term, name, device)
            if len(rows.keys):
                values = scores.double().cpu().numpy()
                self._ranked.setdefault(name, []).append((rows, values))

    def _add_sum(self, name: str, total: float, rows: int) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + np.array([total, rows], np.float64)


def add_sums(parts: Iterable[Mapping[Key, NDArray[np.float64]]]) -> dict[Key, NDArray[np.float64]]:
    """Return the sums of the values under each name."""
    total: dict[Key, NDArray[np.float64]] = {}
    for part in parts:
        for name, values in part.items():
            total[name] = total.get(name, 0.0) + values
    return total


def ranked_loss(parts: Sequence[Scored], term: DistillTerm) -> float:
    """Return a term's ranking loss over all scored rows, as if they were one step."""
    assert term.ranking is not None
    rows = RankedRows.joined([rows for rows, _ in parts])
    student_scores = torch.from_numpy(np.concatenate([scores for _, scores in parts]))
    groups, teacher_scores = (
        groups_of(rows, term.temperature),
        torch.from_numpy(rows.teacher_scores),
    )
    return float(
        ranking_loss(
            student_scores,
            teacher_scores,
            rows,
            groups,
            len(student_scores),
            term.ranking,
            term.temperature,
        )
    )


def known_term(terms: Mapping[str, DistillTerm], name: str, target: TokenTargetBatch) -> str | None:
    """Return the objective's name for the divergence from teacher ``name`` that an evaluation
    reports; None if it trains another one.
    """
    term = terms.get(name)
    return names_of(term)[name] if term is not None and is_plain(term, target) else None
