"""The sections of a cycle's file that a run's file lacks: experts, tasks, the primary
comparison.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.errors import InputError
from rekindle.data.settings import Place, PlaceOrNone, Settings, parse_settings
from rekindle.data.settings_schema import KeysOf, one_or_many
from rekindle.data.targets.schema import TeacherName
from rekindle.pipeline.config import CacheConfig
from rekindle.pipeline.cycle.arms import Arm
from rekindle.train.config import DistillTerm
from rekindle.train.finetune.config import (
    FORMER_FIELDS,
    NOT_DECISIVE,
    ComparisonFinetuneConfig,
    TaskSettings,
)

Setting = bool | int | float | str | None  # a value of a fine-tuning setting
Point = dict[str, Setting]  # what a search tries
Search = Annotated[dict[str, tuple[Setting, ...]], KeysOf(ComparisonFinetuneConfig, lists=True)]
PartialFinetuneConfig = Annotated[dict[str, object], KeysOf(ComparisonFinetuneConfig)]
PartialDistillTerm = Annotated[dict[str, object], KeysOf(DistillTerm)]
# Keys a search may not change: the budget is the same for all.
_BUDGET_KEYS = ("epochs", "max_steps", "patience", "head", "merge")
Metric = Literal[
    "accuracy",
    "f1",
    "matthews",
    "f1_micro",
    "f1_macro",
    "subset_accuracy",
    "pearson",
    "spearman",
    "ndcg@10",
    "mrr",
    "map",
]
# Settings of a ranker's term on a text of groups, unless the file sets `ranking`.
GROUPED_RANKING: dict[str, object] = {"ranking": {"group": "group"}}


class CycleCacheConfig(CacheConfig):
    """Where the experts' outputs go; as in a run, except for the path's default."""

    path: PlaceOrNone = Field("", description="local path, s3://…, gs://…; default: OUT/cache")


class CycleCorpusConfig(CorpusConfig):
    """The unlabelled text of all tasks, or what the tasks' own texts have in common."""

    source: tuple[Place, ...] = Field(
        (),
        json_schema_extra=one_or_many,
        description=f"{CorpusConfig.model_fields['source'].description}",
    )


class ExpertsConfig(Settings):
    """What the experts are made from, and how they teach."""

    model: Place | None = Field(
        None,
        description="the model experts are fine-tuned from, with its own size and tokenizer; "
        "null: student.model",
    )
    teacher: Literal["best", "all"] = Field(
        "best",
        description="who teaches kd, both and mixture: the expert's best seed on dev, or all its "
        "seeds together (the mean of their probabilities)",
    )
    seeds: int | None = Field(
        None, gt=0, description="fine-tunings of each expert; null: as many as for every arm"
    )
    finetune: PartialFinetuneConfig = Field(
        default_factory=dict,
        description="overrides the file's and the task's finetune for the experts; only if model "
        "is another one",
    )


class PrimaryConfig(Settings):
    """The comparison named before anything ran; all others are secondary."""

    arm: Arm = Field(description="the arm that should be better")
    against: tuple[Arm, ...] = Field(min_length=1, description="the arms it should beat")
    about: str = Field("", description="why this comparison, for the report")


class CycleTask(Settings):
    """A labelled task: its expert teaches, and every model is fine-tuned on it and scored."""

    name: TeacherName = Field(description="its name, also its expert's in the cache")
    about: str = Field("", description="what it asks, for the report")
    train: Place = Field(description="labelled examples: jsonl, csv, tsv or parquet")
    test: Place = Field(description="scored once per fine-tuning; selects nothing")
    dev: Place | None = Field(
        None, description="file for selection; null: dev_examples are taken out of train at random"
    )
    dev_examples: int = Field(
        500, gt=0, description="size of dev if dev is null; at most a fifth of train"
    )
    train_examples: int | None = Field(
        None,
        gt=0,
        description=("maximum of training examples, chosen at random after dev; null: all"),
    )
    train_per_class: int | None = Field(
        None, gt=0, description="instead of train_examples: examples per class; null: all"
    )
    metric: Metric | None = Field(
        None,
        description="accuracy, f1, matthews; for lists of labels f1_micro, f1_macro, "
        "subset_accuracy; pearson, spearman; for documents in groups ndcg@10, mrr, map; null: "
        "accuracy, f1_micro, pearson, or ndcg@10",
    )
    pairs: Literal["adjacent", "same-document", "random"] | None = Field(
        None,
        description="how to make pairs from the text for an expert on pairs; null: adjacent, if "
        "the task has sentence2",
    )
    corpus: Annotated[dict[str, object], KeysOf(CycleCorpusConfig)] = Field(
        default_factory=dict,
        description="its own unlabelled text: keys of corpus, overriding the file's; all tasks "
        "have one, or none",
    )
    distill: PartialDistillTerm = Field(
        default_factory=dict,
        description=("settings of its expert's term, overriding the file's distill"),
    )
    finetune: PartialFinetuneConfig = Field(
        default_factory=dict, description="settings that override the file's finetune for every arm"
    )

    @model_validator(mode="after")
    def _one_number(self) -> "CycleTask":
        if self.train_examples and self.train_per_class:
            raise ValueError(
                "train_examples and train_per_class both say how many rows are trained on; give one"
            )
        return self


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for task names with another meaning."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"two tasks are called {repeated[0]!r}; give each its own name")
    if "mean" in names:
        raise ValueError("a task cannot be called 'mean': that is the mean over the tasks")
    for name in names:
        base, _, number = name.rpartition(".")
        if base in names and number.isdecimal():
            raise ValueError(
                f"a task cannot be called {name!r} beside {base!r}: such numbers are added to "
                "things that exist several times. Give it another name"
            )


# --- the search -----------------------------------------------------------------------------------


def parse_search(value: Search) -> Search:
    """Return the values to try, parsed. Raise ValueError for what cannot be searched."""
    parsed: Search = {}
    for key, values in value.items():
        if key in _BUDGET_KEYS:
            raise ValueError(f"{key} is the budget, which is the same for every arm")
        if key in (*TaskSettings.model_fields, *FORMER_FIELDS):
            raise ValueError(f"{key} says what the files mean, which is not searched for")
        if key == NOT_DECISIVE:
            raise ValueError(f"{key} changes no score, so that there is nothing to choose")
        if not values:
            raise ValueError(f"{key} has no values")
        # Parsed as they are used: 1 may stand for a rate of 1.0, and results are found by value.
        parsed_values = [parse_settings(ComparisonFinetuneConfig, {key: one}) for one in values]
        parsed[key] = tuple(getattr(one, key) for one in parsed_values)
        if len(set(parsed[key])) < len(values):
            raise ValueError(f"{key} has a value twice; every arm tries each of them once")
    return parsed


def point_name(point: Point) -> str:
    """Return a point of the search as the name of a folder."""
    name = ",".join(f"{key}={value}" for key, value in point.items())
    if "/" in name:
        raise InputError(f"search: {name!r} cannot be the name of a folder")
    return name
