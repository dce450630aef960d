"""What one training step learns from; ``Objective.plan`` makes it."""

from dataclasses import dataclass

from rekindle.train.config import DistillTerm
from rekindle.train.method import Method


@dataclass(frozen=True)
class StepPlan:
    """What is read for a step, and what its loss is made of.

    ``weights`` holds those of the cross-entropy, of every distillation term and of every method, in
    the configuration's order; ``terms`` and ``methods`` are those with a weight above 0, with it.
    """

    step: int
    hard: float  # weight of the cross-entropy
    terms: tuple[tuple[DistillTerm, float], ...]
    methods: tuple[tuple[Method, float], ...]
    weights: tuple[float, ...]

    @property
    def users(self) -> tuple[DistillTerm, ...]:
        """Return who uses targets: the terms, and each method as if it were one."""
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
