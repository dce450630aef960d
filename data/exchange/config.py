"""What an import is told of the targets beside the rows: checked before a row is read."""

import json
from typing import Any, Literal, TypedDict

from pydantic import Field, field_validator, model_validator

from rekindle.data.settings import Settings
from rekindle.data.targets.schema import VOCABULARY_TASKS, Codec, Task, TeacherName

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


class ImportConfig(Settings):
    """Which teacher the targets become."""

    name: TeacherName = Field(description="the teacher's name in the cache")
    provenance: dict[str, Any] = Field(
        description="where the targets come from: `model` says of what, everything else is free "
        "(engine, revision, date, …); kept with the teacher, and part of what it is"
    )
    task: Task = Field("causal_lm", description="what the targets are of")
    view: str | None = Field(
        None,
        description="what the model was shown: null for the text as it is and, of a masked_lm, for "
        "the cache's masked view; `clean` for a masked_lm that saw the text unmasked; or a view's "
        "name",
    )
    k: int | None = Field(
        None,
        gt=0,
        description="candidates kept of a position; null: as many as the first row has at least",
    )
    codec: Codec = Field(
        "default",
        description="precise keeps log-probabilities to 1/2048 nat in twice the bytes; compact is "
        "the default compressed, for cold storage and transfer",
    )
    labels: tuple[str, ...] = Field((), description="of a classifier: the names, in their order")
    problem: Problem | None = Field(
        None, description="of a classifier whose labels do not exclude each other: multi_label_…"
    )
    allow_missing: bool = Field(
        False, description="take sequences without a row, and positions without a target"
    )

    @field_validator("provenance")
    @classmethod
    def _says_what(cls, value: dict[str, Any]) -> dict[str, Any]:
        model = value.get("model")
        if not isinstance(model, str) or not model.strip():
            raise ValueError(
                "must name the model that the targets are of: model: NAME (and whatever else is to "
                "be remembered: engine, revision, date)"
            )
        try:
            json.dumps(value, allow_nan=False, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"is kept as JSON: texts, numbers, lists and mappings of them ({error})"
            ) from None
        return value

    @model_validator(mode="after")
    def _of_its_task(self) -> "ImportConfig":
        vocabulary = self.task in VOCABULARY_TASKS
        if vocabulary and (self.labels or self.problem):
            raise ValueError(f"labels and problem are of classifiers; a {self.task} has none")
        if not vocabulary and self.k is not None:
            raise ValueError(f"k is of language models; of a {self.task} all logits are kept")
        if not vocabulary and self.codec != "default":
            raise ValueError(f"codec is of language models; a {self.task} has one, the default")
        if "classification" in self.task and len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(
                f"a {self.task} needs the names of its labels, two or more and each another one"
            )
        regression = self.task == "regression"
        if self.problem and (regression != (self.problem == "regression")):
            raise ValueError(f"problem {self.problem} is not one of a {self.task}")
        return self


class ImportSettings(TypedDict, total=False):
    """The settings beside name and provenance, for Python: see ``ImportConfig``."""

    task: Task
    view: str | None
    k: int | None
    codec: Codec
    labels: tuple[str, ...]
    problem: Problem | None
    allow_missing: bool
