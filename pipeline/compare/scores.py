"""Read the task scores below the runs: what ``pipeline finetune`` left in folders there."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rekindle.pipeline.report.scores import TaskScores
from rekindle.pipeline.sweep.grid import shortest_tails
from rekindle.train.finetune.label_lists import TAGS
from rekindle.train.finetune.metrics import printed_name
from rekindle.train.record.run_folder import read_record, reading_record

ABOUT_FILE = "rekindle_student.json"  # a student's record of itself, including its heads
Facts = dict[str, Any]
_Of = tuple[tuple[str, ...], str, str]  # folder, metric, split
_What = tuple[tuple[str, ...], str, str, str]  # and the metric as printed


def read_scores(runs: Mapping[str, Path]) -> list[TaskScores]:
    """Return the fine-tuning scores in folders below the runs, by run name. For each seed it is the
    score on test if all seeds have one, else on dev. A task is named after its folder.
    """
    each = [
        (run, (folder, metric, split), _printed(metric, metrics), scores, own, metrics)
        for run, directory in runs.items()
        for folder, metrics in fine_tuned(directory)
        for metric, split, scores, own in _seeds(metrics)
    ]
    told: dict[_Of, set[str]] = {}
    for _, of, printed, *_ in each:
        told.setdefault(of, set()).update([printed] if printed else [])
    found: dict[_What, dict[str, list[float]]] = {}
    seeds: dict[_What, dict[str, list[int]]] = {}
    selected: set[_What] = set()
    for run, of, printed, scores, own, metrics in each:
        # A result that does not say which labels its F1 covers is compared with all that do, if
        # these agree.
        what = (*of, printed or (min(told[of]) if len(told[of]) == 1 else of[1]))
        found.setdefault(what, {})[run] = scores
        seeds.setdefault(what, {})[run] = own
        if of[2] == "dev" and _chose_epochs(metrics):
            selected.add(what)
    folders = sorted({what[0] for what in found})
    tails = dict(zip(folders, shortest_tails(folders, "/"), strict=True))
    return [
        TaskScores(
            *(tails[folder], metric, split, scores),
            seeds=seeds[what],
            measured=measured,
            selected=what in selected,
        )
        for what, scores in sorted(found.items())
        for folder, metric, split, measured in [what]
    ]


def _printed(metric: str, metrics: Facts) -> str:
    """Return the metric as printed; empty if older results do not say what it covers."""
    names, problem = metrics.get("label_names"), str(metrics.get("problem"))
    if metric == "f1" and not names and problem != TAGS:
        return ""
    return printed_name(metric, problem, len(names) if isinstance(names, list) else 0)


def _chose_epochs(metrics: Facts) -> bool:
    """Return whether the epoch of each seed was chosen on dev."""
    config, seeds = metrics.get("config"), metrics["per_seed"]
    if not isinstance(config, dict) or config.get("patience") is None:
        return False
    return all(seed.get("kept_epoch") is not None for seed in seeds)


def _seeds(metrics: Facts) -> list[tuple[str, str, list[float], list[int]]]:
    """Return metric, split, scores and seeds of a fine-tuning (no seeds if one is not recorded);
    empty if the file is something else.
    """
    metric = metrics.get("metric")
    seeds = metrics.get("per_seed")
    if not isinstance(metric, str) or not isinstance(seeds, list) or not seeds:
        return []
    each = [seed for seed in seeds if isinstance(seed, dict)]
    numbers = [number for seed in each if isinstance(number := seed.get("seed"), int)]
    for split, key in (("test", "test_scores"), ("dev", "scores")):
        scores = [(seed.get(key) or {}).get(metric) for seed in each]
        known = [float(score) for score in scores if isinstance(score, int | float)]
        if len(known) == len(seeds):
            return [(metric, split, known, numbers if len(numbers) == len(known) else [])]
    return []


def mean_scores(directory: Path) -> dict[str, float]:
    """Return the means on dev of fine-tunings in folders below a run, by folder and metric."""
    return {
        f"{'/'.join(folder)} {found['metric']}".strip(): found["mean"]
        for folder, found in fine_tuned(directory)
        if isinstance(found.get("mean"), float) and "metric" in found
    }


def fine_tuned(directory: Path) -> Iterator[tuple[tuple[str, ...], Facts]]:
    """Yield the fine-tuning folders below a run, with their results."""
    for path in sorted(directory.glob("**/metrics.json")):
        yield path.parent.relative_to(directory).parts, read_record(path) or {}


def heads_of(directory: Path) -> list[str]:
    """Return the task heads of the student in a run's directory; none if it has not ended."""
    about = read_record(directory / ABOUT_FILE)
    if about is None:
        return []
    with reading_record(directory / ABOUT_FILE):
        return [*dict(about["heads"])]
