"""Read what `pipeline finetune` left for the arms of a cycle, and check that it is comparable.

Two arms have the same budget if all settings except those searched on dev are equal; the arm
``longer`` has twice the epochs, and twice the steps if these are limited. A search is part of the
budget: every arm must have tried the same settings with the same seeds.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import TypeAdapter

from rekindle.data.errors import CheckpointError
from rekindle.train.finetune.config import (
    FORMER_FIELDS,
    NOT_DECISIVE,
    TaskSettings,
    fill_former_defaults,
)
from rekindle.train.finetune.result import RESULT_FILE, WRITER, FinetuneResult, best_of
from rekindle.train.ranking.kinds import RANKING
from rekindle.train.record.run_folder import read_record

EXPERT = "expert"
START = "start"  # the students' model, fine-tuned, if experts are of another model
LONGER = "longer"  # the students' model, fine-tuned with twice the epochs
MLM = "mlm"  # a student of the text alone
PSEUDO = "pseudo"  # a student of the expert's most likely classes
_WAY_OUT = "restore it, or remove the output of its stage and resume the cycle"
_DOUBLED_KEYS = ("epochs", "max_steps")
_SECOND_METRIC = {"pearson": "spearman", "spearman": "pearson"}
_SECOND_METRIC |= {"ndcg@10": "mrr", "mrr": "ndcg@10", "map": "ndcg@10"}

Grid = Mapping[str, Sequence[object]]  # setting -> the values to try


@dataclass(frozen=True, kw_only=True)
class FineTuned(FinetuneResult):
    """One metrics.json, for an ``arm`` on a ``task``; ``folder`` is relative to the cycle."""

    folder: str
    arm: str
    task: str

    @property
    def splits(self) -> dict[str, str]:
        """The last three parts of the splits' paths, because the cycle's directory may have been
        moved.
        """
        return {split: "/".join(Path(path).parts[-3:]) for split, path in self.files.items()}

    @property
    def seeds(self) -> list[int]:
        """The seeds, in the order of all scores."""
        return [one.seed for one in self.per_seed]

    @property
    def dev(self) -> list[float]:
        """The main metric on dev; the search maximises its mean over seeds."""
        return [one.scores[self.metric] for one in self.per_seed]

    @property
    def test(self) -> list[dict[str, float]]:
        """Scores on test by metric; empty unless all seeds have them."""
        scores = [one.test_scores for one in self.per_seed if one.test_scores is not None]
        return scores if len(scores) == len(self.per_seed) else []

    @property
    def shown_metrics(self) -> list[str]:
        """The main metric, then the second one that GLUE reports for such a task, or that rankings
        are compared by.
        """
        if self.problem in ("regression", RANKING):
            return [self.metric, _SECOND_METRIC[self.metric]]
        two_classes = len(self.label_names) == 2
        return [self.metric, *(["accuracy"] if self.metric == "f1" and two_classes else [])]

    def point(self, grid: Grid) -> tuple[object, ...]:
        """Return its values of the searched settings."""
        return tuple(self.config.get(key) for key in grid)

    @property
    def budget(self) -> dict[str, object]:
        """The settings; for the arm ``longer``, as they would be at the common length."""
        config = fill_former_defaults(self.config)
        if self.arm != LONGER:
            return config
        halved = {key: config.get(key) for key in _DOUBLED_KEYS}
        return config | {k: v / 2 for k, v in halved.items() if isinstance(v, int)}


ComparedFacts = Callable[[FineTuned], Mapping[str, object]]  # the facts of a result to compare


def folder_of(arm: str, task: str) -> str:
    """Return the folder of an arm's fine-tuned model of a task, in the cycle's directory."""
    return f"experts/{task}" if arm == EXPERT else f"fine-tuned/{arm}/{task}"


def own_head(arm: str) -> str:
    """Return the name of an arm's students scored with the head their experts left."""
    return f"{arm} (own head)"


def own_head_folder(arm: str, task: str) -> str:
    """Return the folder of the scores of an arm's student with its own head."""
    return f"distilled/{arm}/{task}"


def student_folder(folder: str, number: int, students: int) -> str:
    """Return the part of an arm's folder for the student of that number, if there are several
    ``students``; else the folder.
    """
    return folder if students == 1 else f"{folder}/student-{number}"


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None without a file. Raise CheckpointError for anything
    else.
    """
    return read_record(path, _WAY_OUT, _refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a finite number")


def read_finetuned(out: Path, folder: str, arm: str, task: str) -> FineTuned | None:
    """Return the result in ``out / folder``; None if missing. Raise CheckpointError if damaged."""
    path = out / folder / RESULT_FILE
    values = read_json(path)
    if values is None:
        return None
    try:
        return parse_finetuned(values, folder, arm, task)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}; {_WAY_OUT}") from None


def parse_finetuned(values: Mapping[str, Any], folder: str, arm: str, task: str) -> FineTuned:
    """Return the result in a metrics.json. Raise ValueError for anything `pipeline finetune` does
    not write.
    """
    try:
        if values["written_by"] != WRITER:
            raise ValueError(f"written by {values['written_by']!r}")
        text = json.dumps({**values, "folder": folder, "arm": arm, "task": task})
        return _checked(_reader().validate_json(text, strict=True))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"is not what `pipeline finetune` writes ({reason})") from None


@cache
def _reader() -> TypeAdapter[FineTuned]:
    return TypeAdapter(FineTuned)  # takes as long to build as reading several files


def read_arm(out: Path, folder: str, arm: str, task: str, students: int = 1) -> FineTuned | None:
    """Return the result in ``out / folder``; for several ``students``, all of them together, by
    seed.

    None if one is missing. Raise CheckpointError if something is damaged, or differs.
    """
    single = read_finetuned(out, folder, arm, task)
    if single is not None or students == 1:
        return single
    results = (
        read_finetuned(out, student_folder(folder, number, students), arm, task)
        for number in range(students)
    )
    parts = [one for one in results if one is not None]
    if len(parts) < students:
        return None
    check_alike(out, parts, lambda one: budget_of(one) | {"seeds": None})
    per_seed = sorted((seed for one in parts for seed in one.per_seed), key=lambda one: one.seed)
    best = best_of(per_seed, parts[0].metric)
    joined = replace(
        parts[0],
        folder=folder,
        per_seed=tuple(per_seed),
        best_seed=best.seed,
        kept_epoch=best.kept_epoch,
        seconds=sum(one.seconds for one in parts),
    )
    tests = [scores[joined.metric] for scores in joined.test]
    return replace(
        joined,
        mean=fmean(joined.dev),
        std=stdev(joined.dev) if len(per_seed) > 1 else None,
        test_mean=fmean(tests) if tests else None,
    )


def _checked(one: FineTuned) -> FineTuned:
    """Check one result by itself: each seed once, each with all scores, the best one kept."""
    if not one.seeds or len(set(one.seeds)) != len(one.seeds):
        raise ValueError(f"seeds {one.seeds}")
    for scores in [*(seed.scores for seed in one.per_seed), *one.test]:
        for metric in one.shown_metrics:
            if not math.isfinite(scores[metric]):
                raise ValueError(f"{metric} is {scores[metric]}")
    dev = dict(zip(one.seeds, one.dev, strict=True))
    if dev[one.best_seed] < max(dev.values()):
        raise ValueError(f"seed {one.best_seed} is kept, but it is not the best on dev")
    return one


def check_alike(out: Path, results: Sequence[FineTuned], facts_of: ComparedFacts) -> None:
    """Raise CheckpointError, naming two results and a fact, unless ``facts_of`` all are equal."""
    for other in results[1:]:
        first, second = facts_of(results[0]), facts_of(other)
        for key in {**second, **first}:
            if first.get(key) == second.get(key, ...):
                continue
            is_halved = LONGER in (results[0].arm, other.arm) and key in _DOUBLED_KEYS
            raise CheckpointError(
                f"{out / results[0].folder} and {out / other.folder} cannot be compared: {key}"
                f"{' (longer: halved)' if is_halved else ''} is {first.get(key)!r} in the first, "
                f"{second.get(key)!r} in the second. All arms of a task need the same data, seeds "
                "and budget: remove the one that is wrong and resume"
            )


def budget_of(one: FineTuned, searched: Collection[str] = ()) -> dict[str, object]:
    """Return everything that must be the same in all arms of a task, except what was
    ``searched``.
    """
    names = ("problem", "label_names", "metric", "seeds")
    # How the files were read shows in what was read; older results do not have these settings.
    left_out = {*searched, *TaskSettings.model_fields, *FORMER_FIELDS, NOT_DECISIVE}
    settings = {key: value for key, value in one.budget.items() if key not in left_out}
    # The setting may be "auto"; if it was searched, arms may have chosen differently.
    precision = {} if "precision" in searched else {"precision in use": one.precision}
    facts = {name: getattr(one, name) for name in names} | {"files": one.splits}
    if one.metric == "f1":
        facts["positive"] = _positive_class(one)
    return facts | precision | settings


def _positive_class(one: FineTuned) -> str | None:
    """Return the class whose F1 counts; in older versions it was the second of two."""
    if "positive" in one.config or len(one.label_names) != 2:
        return one.positive
    return one.label_names[1]
