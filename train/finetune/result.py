"""The result of a fine-tuning, and its directory, which is replaced only if it is such a result."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from rekindle.data.errors import InputError
from rekindle.train.finetune.best_epoch import describe_end
from rekindle.train.finetune.config import FinetuneConfig
from rekindle.train.finetune.metrics import printed_name
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.record.versions import package_versions

WRITER = "rekindle finetune"  # marks a directory that this command may replace
RESULT_FILE = "metrics.json"


@dataclass(frozen=True)
class SeedResult:
    """One seed's scores on dev (and test, if given), and how they came about."""

    seed: int
    scores: dict[str, float]
    test_scores: dict[str, float] | None
    epochs: list[dict[str, object]]  # epoch, steps so far, mean train loss, dev scores or None
    seconds: float
    kept_epoch: int | None = None  # from 1; None: nothing was trained, or by an older version
    planned_epochs: int | None = None
    stopped: str | None = None  # best_epoch.DONE, MAX_STEPS or PATIENCE
    warning: str | None = None  # if little or nothing was learned


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """The content of ``metrics.json``. ``std`` is the sample deviation, None for a single seed."""

    model: str
    files: dict[str, str]
    problem: str
    label_names: tuple[str, ...]
    metric: str
    per_seed: tuple[SeedResult, ...]
    mean: float
    std: float | None
    test_mean: float | None
    best_seed: int
    seconds: float
    precision: str
    config: dict[str, object]
    versions: dict[str, str]
    baselines: dict[str, dict[str, float]] | None  # scores by way of merging
    # How the files were understood: rows by class and split, the class for F1, rows left out by
    # label and split, the share of texts cut by split, and for lists of words how many are not
    # read, by split and reason.
    class_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    positive: str | None = None
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    cut: dict[str, float] = field(default_factory=dict)
    pairs: bool | None = None  # whether texts come in pairs; older results do not say
    unread: dict[str, dict[str, int]] = field(default_factory=dict)
    kept_epoch: int | None = None  # of best_seed

    @classmethod
    def of(
        cls,
        model: str,
        files: Mapping[str, str],
        splits: Mapping[str, TaskData],
        metric: str,
        per_seed: Sequence[SeedResult],
        config: FinetuneConfig,
        precision: str,
        seconds: float,
        baselines: dict[str, dict[str, float]] | None = None,
        cut: Mapping[str, float] | None = None,
        unread: Mapping[str, dict[str, int]] | None = None,
    ) -> "FinetuneResult":
        """Sum up every seed's scores by ``metric``; the first of ``splits`` has the labels."""
        data = next(iter(splits.values()))
        scores = [result.scores[metric] for result in per_seed]
        tests = [result.test_scores[metric] for result in per_seed if result.test_scores]
        return cls(
            model=model,
            files=dict(files),
            problem=data.problem,
            label_names=data.label_names,
            metric=metric,
            per_seed=tuple(per_seed),
            mean=float(np.mean(scores)),
            std=float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
            test_mean=float(np.mean(tests)) if tests else None,
            best_seed=best_of(per_seed, metric).seed,
            kept_epoch=best_of(per_seed, metric).kept_epoch,
            seconds=seconds,
            precision=precision,
            config=config.model_dump(mode="json"),
            versions=package_versions(),
            baselines=baselines,
            class_counts={name: split.counts for name, split in splits.items()},
            positive=data.positive,
            dropped={name: split.dropped for name, split in splits.items()},
            cut=dict(cut or {}),
            pairs=data.pairs is not None,
            unread=dict(unread or {}),
        )

    @property
    def shown_metric(self) -> str:
        """Return the printed name of the metric."""
        return printed_name(self.metric, self.problem, len(self.label_names))

    @property
    def kept_model(self) -> str | None:
        """Return which seed's and epoch's model is kept, and why it ended; None if none was
        trained.
        """
        result = next(result for result in self.per_seed if result.seed == self.best_seed)
        if result.kept_epoch is None or result.planned_epochs is None:
            return None
        details = (result.planned_epochs, result.stopped, self.config["patience"] is not None)
        summary = describe_end(result.kept_epoch, len(result.epochs), *details)
        return f"seed {result.seed}, {summary}" if len(self.per_seed) > 1 else summary

    def mean_scores(self) -> dict[str, float]:
        """Return the means over the seeds, by their names."""
        seeds = len(self.per_seed)
        seeds_text = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
        means = {f"dev {self.shown_metric}, {seeds_text}": self.mean}
        if self.test_mean is not None:
            means[f"test {self.shown_metric}, {seeds_text}"] = self.test_mean
        return means

    def as_dict(self) -> dict[str, object]:
        """Return the result as plain values for JSON."""
        return {"written_by": WRITER, **asdict(self)}

    def save(self, folder: Path) -> None:
        """Write RESULT_FILE; ValueError for a number that is not finite."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / RESULT_FILE).write_text(text + "\n", encoding="utf-8")


def seed_folder(out: Path, seed: int) -> Path:
    """Return the folder of one seed's model if all are kept: an expert's folder by itself."""
    return out / "seeds" / f"seed-{seed}"


def best_of(results: Sequence[SeedResult], metric: str) -> SeedResult:
    """Return the result with the highest dev score, the first among equals."""
    return max(results, key=lambda result: result.scores[metric])


class EarlierResult(InputError):
    """A result exists already, and is replaced only on request."""


def check_out(out: Path, force: bool = False) -> None:
    """Raise InputError if ``out`` must not be replaced; EarlierResult for an earlier result without
    ``force``.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out.is_dir() and _is_earlier_result(out)):
        raise InputError(
            f"{str(out)!r} exists and is not a result of this command; it is left as it is: give "
            "another directory, or remove it"
        )
    if not force:
        raise EarlierResult(
            f"{str(out)!r} holds an earlier result, which is left as it is; give another --out, or "
            "--force to replace it"
        )


def _is_earlier_result(out: Path) -> bool:
    try:
        return bool(json.loads((out / RESULT_FILE).read_text())["written_by"] == WRITER)
    except (OSError, ValueError, KeyError, TypeError):
        return False
