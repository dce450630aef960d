"""Count what a run was trained with: KD, cross-entropy only, or neither; and check what it may
lack.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from rekindle.data.batch import Batch, TokenTargetBatch
from rekindle.data.errors import InputError
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.train.config import MIXED, DistillTerm
from rekindle.train.objective.selection import (
    StepPlan,
    common_rows,
    count_rows,
    taught_per_sequence,
)

NAMES = tuple(
    f"{unit}_{kind}"
    for unit in ("sequences", "positions")
    for kind in ("with_kd", "ce_only", "neither")
)


def check_covered(
    teachers: Mapping[str, TeacherReader], allowed: Collection[str], setting: str
) -> None:
    """Raise InputError for a teacher that lacks targets without being ``allowed`` to; ``setting``
    names the setting that allows it.
    """
    for name, teacher in teachers.items():
        if teacher.coverage < 1 and name not in allowed:
            raise InputError(
                f"teacher {name!r} has targets for {teacher.coverage:.1%} of the cache. Finish it "
                f"with {teacher.info.made_by}, or name it in {setting} to train the rest without "
                "KD"
            )


class Coverage:
    """Counts over all steps. A sequence has KD if any of its targets is used, by a distillation
    term or a method; a position (among those with an LM loss) if a vocabulary teacher has a target
    there.
    """

    def __init__(self, earlier: Mapping[str, int] | None = None):
        self._earlier = dict(earlier or {})
        self._counts: Counter[str] = Counter()

    def count(self, batch: Batch, task: str, plan: StepPlan) -> None:
        """Add this process's share of a step, with its targets selected."""
        terms = plan.users
        without_kd = "ce_only" if plan.hard > 0 else "neither"
        sequences, kd_sequences = len(batch.index), _sequences_with_kd(batch, terms)
        positions = count_rows(batch, task, terms).labels
        kd_positions = _positions_with_kd(batch, terms)
        self._counts["sequences_with_kd"] += kd_sequences
        self._counts[f"sequences_{without_kd}"] += sequences - kd_sequences
        self._counts["positions_with_kd"] += kd_positions
        self._counts[f"positions_{without_kd}"] += positions - kd_positions

    def sum_over_processes(
        self, sum_values: Callable[[Sequence[float]], Sequence[float]]
    ) -> dict[str, int]:
        """Return the counts of all processes since the run began; ``sum_values`` sums a list over
        processes.
        """
        summed = sum_values([self._counts[name] for name in NAMES])
        counts = zip(NAMES, summed, strict=True)
        return {name: self._earlier.get(name, 0) + round(value) for name, value in counts}


def _sequences_with_kd(batch: Batch, terms: Sequence[DistillTerm]) -> int:
    covered = np.zeros(len(batch.index), bool)
    for term in terms:
        targets = [batch.targets[name] for name in term.teachers]
        if term.combine in MIXED:
            covered[common_rows(targets)] = True
            continue
        for target in targets:
            covered[target.rows] = True
    return int(covered.sum())


def _positions_with_kd(batch: Batch, terms: Sequence[DistillTerm]) -> int:
    """Count positions with KD. Where the student's entropy chooses positions, only their number is
    known here. All teachers choose among the same positions of a sequence, so the largest choice
    contains the others, and its number is counted.
    """
    width = batch.input_ids.shape[1]
    position_keys = [np.zeros(0, np.int64)]
    picked = np.zeros(len(batch.index), np.int64)
    for term in terms:
        for target in [batch.targets[name] for name in term.teachers]:
            if not isinstance(target, TokenTargetBatch):
                continue
            if term.entropy_fraction is None:
                position_keys.append(target.rows * width + target.positions)
            else:
                taught = taught_per_sequence(target.rows, term.entropy_fraction)
                np.maximum.at(picked, target.rows, taught)
    sequences = np.unique(np.concatenate(position_keys)) // width
    counts = np.bincount(sequences, minlength=len(picked))
    return int(np.maximum(counts, picked).sum())
