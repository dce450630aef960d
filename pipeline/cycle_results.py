"""What a cycle (`pipeline rekindle`) found: the scores of its arms on test, and their differences.

It reads what the stages leave in the cycle's directory, finished or not, and trains nothing. What
does not fit together (other seeds, other budgets, other files) is refused, never compared.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EXPERT = "expert"
SELECTED = "expert (selected)"  # the one of its seeds that is best on dev, and teaches
LONGER = "longer"  # the start model, fine-tuned with twice the epochs
MEAN = "mean"  # in the place of a task: the mean over all tasks, seed by seed
LEVEL = 0.95  # of all intervals


@dataclass(frozen=True)
class TaskFacts:
    """A task: its main metric, and the examples in each split."""

    name: str
    metric: str
    train: int
    dev: int
    test: int


@dataclass(frozen=True)
class ArmScores:
    """An arm's test scores, as fractions, by seed in the order of ``seeds``.

    ``std`` is the sample deviation, ``low`` to ``high`` the 95 % interval of the mean; None for a
    single seed. ``task`` and ``metric`` are "mean" for the mean of the tasks' main metrics. The arm
    "expert (selected)" has the one seed of the expert that teaches.
    """

    arm: str
    task: str
    metric: str
    seeds: list[int]
    scores: list[float]
    mean: float
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """``arm`` − ``against`` on a task's main metric, paired by seed; see ``significance.Paired``.

    ``p_adjusted``: Holm's, over all tests with the same ``against``: every arm on every task, and
    on the mean over tasks.
    """

    arm: str
    against: str
    task: str
    mean: float
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    n: int


@dataclass(frozen=True)
class Tried:
    """One point of a search: the settings, and the main metric on dev by seed."""

    settings: dict[str, Any]
    seeds: list[int]
    dev_scores: list[float]
    mean: float


@dataclass(frozen=True)
class Searched:
    """A search over fine-tuning settings; ``chosen`` is None before the arm is fine-tuned."""

    arm: str
    task: str
    tried: list[Tried]
    chosen: dict[str, Any] | None


@dataclass(frozen=True)
class CycleResults:
    """Everything that a cycle found.

    ``costs``: seconds by folder of the stage ("experts/cola", "search/mlm/cola", "cache/cola" for
    a teacher's pass, "students/mlm", "fine-tuned/mlm/cola"). ``notes`` say what must be known
    beside the tables. ``settings``: what else cycle.json says.
    """

    arms: list[str]
    tasks: list[TaskFacts]
    scores: list[ArmScores]
    differences: list[Difference]
    searched: list[Searched]
    costs: dict[str, float]
    notes: list[str]
    settings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; all numbers are finite."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CycleResults":
        """What ``as_dict`` gave, such as results.json: the tables can be made from it alone."""
        raise NotImplementedError


def read_results(out: Path) -> CycleResults:
    """The results so far in the cycle's directory ``out``.

    Raises InputError where ``out`` is no cycle, CheckpointError where its parts are damaged or do
    not belong together.
    """
    raise NotImplementedError
