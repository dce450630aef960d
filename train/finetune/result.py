"""What a fine-tuning came to: the content of ``metrics.json``."""

from dataclasses import asdict, dataclass

from rekindle.train.finetune.result_folder import WRITER


@dataclass(frozen=True)
class SeedResult:
    """One fine-tuning: the dev scores of the kept weights, and what happened on the way."""

    seed: int
    scores: dict[str, float]
    test_scores: dict[str, float] | None
    epochs: list[dict[str, object]]  # epoch, steps so far, mean train loss, dev scores
    seconds: float


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What ``metrics.json`` holds. ``std`` is the sample deviation, None for a single seed."""

    model: str
    files: dict[str, str]
    problem: str
    label_names: tuple[str, ...]
    metric: str
    per_seed: tuple[SeedResult, ...]
    mean: float
    std: float | None = None
    test_mean: float | None = None
    best_seed: int = 0
    seconds: float
    precision: str
    config: dict[str, object]
    versions: dict[str, str]
    baselines: dict[str, dict[str, float]] | None = None  # scores by way of merging

    def as_dict(self) -> dict[str, object]:
        """Return the result as plain values for JSON."""
        return {"written_by": WRITER, **asdict(self)}
