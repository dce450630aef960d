"""The configuration of a whole cycle: one YAML file, with the sections of a run and the tasks.

Reading it imports no torch and touches no model. What a single run needs of it, ``RunConfig``, is
made by ``cycle.configs``.
"""

import itertools
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.errors import InputError
from rekindle.data.settings import Place, Settings, parse_settings
from rekindle.data.targets.schema import TEACHER_NAME
from rekindle.pipeline.builtin.names import resolve_values
from rekindle.pipeline.config import CacheConfig, read_values
from rekindle.train.config import DistillTerm, StudentConfig, TrainConfig
from rekindle.train.finetune.config import FORMER_FIELDS, FixedBudget, TaskSettings
from rekindle.train.schedules import Seed

Setting = bool | int | float | str | None  # a value of a fine-tuning's setting
Point = dict[str, Setting]  # what a search tries
Search = dict[str, tuple[Setting, ...]]
Metric = Literal[
    "accuracy",
    "f1",
    "matthews",
    "f1_micro",
    "f1_macro",
    "subset_accuracy",
    "pearson",
    "spearman",
]
Arm = Literal["expert", "longer", "mlm", "kd", "both", "mixture"]
ARMS: dict[Arm, str] = {
    "expert": "the start model, fine-tuned: what teaches, and what is to be beaten",
    "longer": "the start model, fine-tuned for twice the epochs",
    "mlm": "pre-trained further on the text with masked LM alone, fine-tuned",
    "kd": "on the same text with the task's expert alone, fine-tuned",
    "both": "with masked LM and the task's expert (UEGP), fine-tuned",
    "mixture": "with masked LM and the experts of all tasks (MoEGP), fine-tuned",
}
# What a search may not change: the budget is the same for all.
_BUDGET = ("epochs", "max_steps", "patience", "head", "merge")
_ARMS_SET = "is what the arms set"
_OTHER_MODEL = (
    "makes a student that is not the model which its expert was fine-tuned from, and the "
    "comparison would be of models"
)
# Keys of a run that a cycle cannot have, and why.
_NOT_OF_A_CYCLE = {
    "student.from_scratch": _OTHER_MODEL,
    "student.grow": _OTHER_MODEL,
    "student.domain_prompts": "puts a token into every text that fine-tuning does not have",
    "train.objective.distill": f"{_ARMS_SET}; give distill, for all experts, or tasks.….distill",
    "train.objective.methods": _ARMS_SET,
    "train.curriculum": "chooses the text by a teacher, also for the arms that see none",
}
_NOT_OF_ITS_FINE_TUNING = {
    "head": "names a student's head to go on from; a cycle's fine-tunings begin with fresh heads",
    "merge": "is for scoring without training",
}


class CycleCacheConfig(CacheConfig):
    """Where the experts' outputs go; as in a run, but for the path's default."""

    path: Place = Field("", description="local path, s3://…, gs://…; left out: OUT/cache")


class CycleTask(Settings):
    """A labelled task: its expert teaches, and every model is fine-tuned on it and scored."""

    name: str = Field(pattern=TEACHER_NAME, description="its name, and its expert's in the cache")
    about: str = Field("", description="what it asks, for the report")
    train: Place = Field(description="labelled examples: jsonl, csv, tsv or parquet")
    test: Place = Field(description="scored once for each fine-tuning; selects nothing")
    dev: Place | None = Field(
        None, description="what selects; null: dev_examples are taken out of train, at random"
    )
    dev_examples: int = Field(
        500, gt=0, description="so many, where dev is null; at most a fifth of train"
    )
    train_examples: int | None = Field(
        None, gt=0, description="at most so many, chosen at random after dev; null: all"
    )
    metric: Metric | None = Field(
        None,
        description="accuracy, f1, matthews; f1_micro, f1_macro, subset_accuracy of lists of "
        "labels; pearson, spearman; null: accuracy, f1_micro, or pearson",
    )
    pairs: Literal["adjacent", "same-document", "random"] | None = Field(
        None,
        description="how pairs are made of the text for an expert on pairs; null: adjacent, if the "
        "task has sentence2",
    )
    distill: dict[str, object] = Field(
        default_factory=dict, description="of its expert's term, over the file's distill"
    )
    finetune: dict[str, object] = Field(
        default_factory=dict, description="over the file's finetune, for every arm alike"
    )


class CycleConfig(Settings):
    """The whole file."""

    about: str = Field("", description="what is compared on which text, for the report")
    corpus: CorpusConfig = Field(description="the unlabelled text")
    cache: CycleCacheConfig = Field(
        default_factory=lambda: CycleCacheConfig(), description="where the cache is"
    )
    student: StudentConfig = Field(
        description="the model that experts are fine-tuned from, and students begin as"
    )
    train: TrainConfig = Field(
        default_factory=TrainConfig,
        description="how students are trained, all alike; objective.hard is μ of masked LM",
    )
    tasks: tuple[CycleTask, ...] = Field(min_length=1, description="the labelled tasks")
    distill: dict[str, object] = Field(
        default_factory=dict,
        description="of every expert's term (weight is λ, temperature, view, …); regressions "
        "have divergence mse unless told",
    )
    arms: tuple[Arm, ...] = Field(
        tuple(ARMS), description="what is compared; expert is always among them"
    )
    finetune: FixedBudget = Field(
        default_factory=FixedBudget, description="how every model is fine-tuned"
    )
    search: Search = Field(
        default_factory=dict,
        description="values of finetune to try for every arm and task; the best on dev is taken",
    )
    search_seeds: int = Field(1, gt=0, description="fine-tunings for each point of the search")
    seeds: int = Field(5, gt=0, description="fine-tunings of every arm on every task, scored")
    seed: Seed = Field(0, description="of what is taken out of train")

    @field_validator("arms")
    @classmethod
    def _with_experts(cls, value: tuple[Arm, ...]) -> tuple[Arm, ...]:
        return tuple(arm for arm in ARMS if arm == "expert" or arm in value)

    @field_validator("search")
    @classmethod
    def _searched(cls, value: Search) -> Search:
        found: Search = {}
        for key, values in value.items():
            if key in _BUDGET:
                raise ValueError(f"{key} is the budget, which is the same for every arm")
            if key in (*TaskSettings.model_fields, *FORMER_FIELDS):
                raise ValueError(f"{key} says what the files mean, which is not searched for")
            if not values:
                raise ValueError(f"{key} has no values")
            # As they are used: 1 may stand for a rate of 1.0; what was tried is found by values.
            read = [parse_settings(FixedBudget, {key: one}) for one in values]
            found[key] = tuple(getattr(one, key) for one in read)
            if len(set(found[key])) < len(values):
                raise ValueError(f"{key} has a value twice; every arm tries each of them once")
        return found

    @model_validator(mode="after")
    def _consistent(self) -> "CycleConfig":
        names = [task.name for task in self.tasks]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"two tasks are called {doubled[0]!r}; give each its own name")
        if "mean" in names:
            raise ValueError("a task cannot be called 'mean': that is the mean over the tasks")
        _refuse_set(self, _NOT_OF_A_CYCLE)
        if self.student.task != "masked_lm":
            raise ValueError(f"the cycle is for masked_lm students, not {self.student.task}")
        if self.train.keep_best not in ("loss", None):
            raise ValueError(
                f"train.keep_best is {self.train.keep_best!r}, which not all students have; use "
                "loss, or null for none"
            )
        if self.train.objective.hard.weight == 0 and {"mlm", "both", "mixture"} & {*self.arms}:
            raise ValueError(
                "train.objective.hard.weight is 0: mlm would learn nothing, both and mixture no "
                "masked LM; the arm kd is without it, leave the others out of arms"
            )
        for task in self.tasks:
            for point in self.search_points():
                config = self.finetune_of(task, point)
                _refuse_set(config, _NOT_OF_ITS_FINE_TUNING, "finetune.")
                if config.epochs == 0:
                    raise ValueError("finetune.epochs is 0: nothing would be fine-tuned")
            if {"teachers"} & {*self.distill, *task.distill}:
                raise ValueError(f"distill.teachers {_ARMS_SET}; leave it out")
            if self.term_of(task, regression=False).weight == 0:
                raise ValueError(
                    f"distill.weight of task {task.name!r} is 0: its expert would teach nothing; "
                    "the arm mlm is without experts"
                )
        return self

    def without_twins(self) -> "CycleConfig":
        """With one task the experts of all tasks are the task's: ``mixture`` would be ``both``
        again, and ``both`` stands in its place.
        """
        if len(self.tasks) > 1 or "mixture" not in self.arms:
            return self
        arms = {"both" if arm == "mixture" else arm for arm in self.arms}
        return self.model_copy(update={"arms": tuple(arm for arm in ARMS if arm in arms)})

    @property
    def seeds_of_search(self) -> range:
        """None of those that are compared: these have selected nothing."""
        return range(self.seeds, self.seeds + self.search_seeds)

    def search_points(self) -> list[Point]:
        """Every combination of the searched values; [{}] where nothing is searched."""
        keys = list(self.search)
        return [dict(zip(keys, v, strict=True)) for v in itertools.product(*self.search.values())]

    def finetune_of(self, task: CycleTask, point: Point, longer: bool = False) -> FixedBudget:
        """How a model is fine-tuned on ``task``; ``longer``: for twice the epochs and steps."""
        given = task.finetune | point
        own = parse_settings(FixedBudget, given, f"finetune of task {task.name!r}")
        changed: dict[str, object] = {key: getattr(own, key) for key in own.model_fields_set}
        config = self.finetune.model_copy(update=changed)
        if not longer:
            return config
        steps = config.max_steps and 2 * config.max_steps
        return config.model_copy(update={"epochs": 2 * config.epochs, "max_steps": steps})

    def term_of(self, task: CycleTask, regression: bool) -> DistillTerm:
        """The distillation term of the expert on ``task``."""
        usual = {"divergence": "mse"} if regression else {}
        values = usual | self.distill | task.distill | {"teachers": [task.name]}
        return parse_settings(DistillTerm, values, f"distill of task {task.name!r}")


def _refuse_set(section: Settings, keys: Mapping[str, str], where: str = "") -> None:
    """Raise ValueError, saying why, where one of these ``keys`` is set."""
    for key, why in keys.items():
        if attrgetter(key)(section):
            raise ValueError(f"{where}{key} {why}; leave it out")


def load_cycle(path: str | Path, overrides: list[str] | None = None) -> CycleConfig:
    """Read and validate a cycle's file; as ``config.load_config`` does a run's."""
    values = read_values(path, overrides)
    if "tasks" not in values:
        raise InputError(
            f"{path} has no tasks, so it is not of a whole cycle; `pipeline init rekindle` writes "
            "an example. Runs of one student are for `pipeline train-student`"
        )
    return parse_settings(CycleConfig, resolve_values(values), str(path))


def point_name(point: Point) -> str:
    """A point of the search as the name of a folder."""
    name = ",".join(f"{key}={value}" for key, value in point.items())
    if "/" in name:
        raise InputError(f"search: {name!r} cannot be the name of a folder")
    return name
