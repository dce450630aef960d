"""What one training step learns from: a pure function of the objective and the step."""

from collections.abc import Sequence
from dataclasses import dataclass

from rekindle.train.config import DistillTerm, ObjectiveConfig
from rekindle.train.method import Method
from rekindle.train.schedules import weight_at


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


def plan_step(
    config: ObjectiveConfig, methods: Sequence[Method], step: int, steps: int
) -> StepPlan:
    """Return the plan of ``step`` (0-based) of ``steps``."""
    hard = weight_at(config.hard.weight, step, steps)
    terms = [(term, weight_at(term.weight, step, steps)) for term in config.distill]
    weighted = [(method, weight_at(method.settings.weight, step, steps)) for method in methods]
    return StepPlan(
        step,
        hard,
        tuple((term, weight) for term, weight in terms if weight > 0),
        tuple((method, weight) for method, weight in weighted if weight > 0),
        (hard, *(weight for _, weight in terms), *(weight for _, weight in weighted)),
    )
