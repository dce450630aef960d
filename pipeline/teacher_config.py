"""What the configuration says of a teacher. No model is touched here, and torch is not imported."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rekindle.data.settings import Settings
from rekindle.data.targets import TEACHER_NAME, VOCABULARY_TASKS, Task


class TargetsConfig(Settings):
    """What is kept of a teacher's output."""

    kind: Literal["topk", "dense"] | None = Field(
        None, description="topk (the default of vocabulary teachers) or dense (of task heads)"
    )
    k: int = Field(64, gt=0, description="candidates kept per position (topk)")
    temperatures: tuple[float, ...] = Field(
        (1.0, 2.0, 4.0), description="temperatures a student may train at; 1 is always stored"
    )

    @field_validator("temperatures")
    @classmethod
    def _with_one(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < t < 1000 for t in value):
            raise ValueError("temperatures must be positive numbers")
        return tuple(sorted({1.0, *value}))


class MonteCarloConfig(Settings):
    """Dropout passes for the uncertainty of a sequence expert (MUKI)."""

    passes: int = Field(0, ge=0, description="forward passes with dropout; 0 for none")


class TeacherConfig(Settings):
    """One expert."""

    name: str = Field(pattern=TEACHER_NAME, description="its name in the cache")
    model: str = Field(description="a model directory or a hub id")
    task: Task = Field(description="what the model does")
    targets: TargetsConfig = Field(default_factory=TargetsConfig, description="what is kept")
    domains: tuple[str, ...] | None = Field(
        None, min_length=1, description="only sequences of these domains; null for all"
    )
    monte_carlo: MonteCarloConfig = Field(
        default_factory=MonteCarloConfig, description="dropout passes"
    )
    pairs: Literal["adjacent", "same-document", "random"] | None = Field(
        None, description="how text pairs are made, for an expert on pairs; null for single texts"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU that has it, fp32 on a CPU"
    )
    batch_tokens: Literal["auto"] | int = Field(
        "auto", description="tokens per forward pass, padding included; halved on out-of-memory"
    )

    @model_validator(mode="after")
    def _kinds(self) -> "TeacherConfig":
        if self.task not in VOCABULARY_TASKS and self.targets.kind == "topk" and self.kind_given:
            raise ValueError(
                "top-k targets are for masked_lm and causal_lm; task heads are kept whole"
            )
        if self.monte_carlo.passes and self.task != "sequence_classification":
            raise ValueError(
                "monte_carlo passes give class probabilities: they are for sequence_classification"
            )
        if isinstance(self.batch_tokens, int) and self.batch_tokens < 1:
            raise ValueError("batch_tokens must be positive")
        return self

    @property
    def kind_given(self) -> bool:
        """Whether the configuration names the kind of targets."""
        return self.targets.kind is not None

    @property
    def vocabulary(self) -> bool:
        """Whether it predicts tokens."""
        return self.task in VOCABULARY_TASKS

    @property
    def pair_expert(self) -> bool:
        """Whether it is shown text pairs."""
        return self.pairs is not None and self.task in ("sequence_classification", "regression")
