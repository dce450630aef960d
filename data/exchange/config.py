"""Settings of an import: facts about the targets besides the rows, checked before reading rows."""

import json
from typing import Any, Literal, TypedDict

from pydantic import Field, field_validator, model_validator

from rekindle.data.settings import Settings
from rekindle.data.targets.schema import VOCABULARY_TASKS, Codec, Task, TeacherName, Vectors

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


class ImportConfig(Settings):
    """The teacher that the targets become."""

    name: TeacherName = Field(description="the teacher's name in the cache")
    provenance: dict[str, Any] = Field(
        description="where the targets come from: `model` names the model, everything else is "
        "free (engine, revision, date, …); kept with the teacher as part of its "
        "identity"
    )
    task: Task = Field("causal_lm", description="the task of the targets' model")
    view: str | None = Field(
        None,
        description="what the model was shown: null for the unmasked text or, for a masked_lm, "
        "the cache's masked view; `clean` for a masked_lm that saw the text "
        "unmasked; or a view's name",
    )
    k: int | None = Field(
        None,
        gt=0,
        description="candidates kept per position; null: as many as every position of the first "
        "row has",
    )
    codec: Codec = Field(
        "default",
        description="precise keeps log-probabilities to 1/2048 nat in twice the bytes; compact "
        "is the default compressed, for cold storage and transfer",
    )
    vectors: Vectors | None = Field(
        None, description="for an embedding teacher: how vectors are kept, fp16 (usual) or int8"
    )
    labels: tuple[str, ...] = Field((), description="for a classifier: its label names, in order")
    problem: Problem | None = Field(
        None, description="for a classifier whose labels do not exclude each other: multi_label_…"
    )
    allow_missing: bool = Field(
        False, description="accept sequences without a row, and positions without a target"
    )

    @field_validator("provenance")
    @classmethod
    def _says_what(cls, value: dict[str, Any]) -> dict[str, Any]:
        model = value.get("model")
        if not isinstance(model, str) or not model.strip():
            raise ValueError(
                "must name the model of the targets: model: NAME (and whatever else to record: "
                "engine, revision, date)"
            )
        try:
            json.dumps(value, allow_nan=False, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"must be valid JSON: texts, numbers, lists and mappings of them ({error})"
            ) from None
        return value

    @model_validator(mode="after")
    def _of_its_task(self) -> "ImportConfig":
        vocabulary = self.task in VOCABULARY_TASKS
        if vocabulary and (self.labels or self.problem):
            raise ValueError(f"labels and problem are for classifiers; a {self.task} has none")
        if not vocabulary and self.k is not None:
            raise ValueError(f"k is for language models; for a {self.task} all logits are kept")
        if self.vectors is not None and self.task != "embedding":
            raise ValueError(f"vectors is for embedding teachers; a {self.task} gives none")
        if self.task == "embedding" and (self.labels or self.problem):
            raise ValueError("labels and problem are for classifiers; an embedding has vectors")
        if not vocabulary and self.codec != "default":
            raise ValueError(f"codec is for language models; a {self.task} only has the default")
        if "classification" in self.task and len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(
                f"a {self.task} needs the names of its labels: at least two, all different"
            )
        regression = self.task == "regression"
        if self.problem and (regression != (self.problem == "regression")):
            raise ValueError(f"problem {self.problem} does not fit a {self.task}")
        return self


class ImportSettings(TypedDict, total=False):
    """The settings besides name and provenance, for Python: see ``ImportConfig``."""

    task: Task
    view: str | None
    k: int | None
    codec: Codec
    vectors: Vectors | None
    labels: tuple[str, ...]
    problem: Problem | None
    allow_missing: bool
