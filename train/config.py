"""What the configuration says of a student and its training. Torch is not imported here."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rekindle.data.settings import Settings
from rekindle.train.schedules import Schedule

WeightField = Annotated[float, Field(ge=0)] | Schedule


class StudentConfig(Settings):
    """The model that is trained."""

    model: str = Field(description="a model directory or a hub id: weights, or only a config.json")
    from_scratch: bool = Field(False, description="start from random weights of that configuration")
    task: Literal["masked_lm", "causal_lm"] = Field("masked_lm", description="its own objective")


class HardConfig(Settings):
    """The cross-entropy on the text itself."""

    weight: WeightField = Field(1.0, description="a number or a schedule; 0 for none")


class DistillTerm(Settings):
    """One distillation term of the loss."""

    teachers: tuple[str, ...] = Field(min_length=1, description="names of cached teachers")
    weight: WeightField = Field(1.0, description="a number or a schedule")
    temperature: float = Field(
        1.0, gt=0, description="τ of teacher and student; the loss carries τ²"
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "tvd", "mse"] = Field(
        "forward_kl", description="mse is for task logits"
    )
    tail: Literal["bucket", "renormalise", "none"] = Field(
        "bucket", description="what becomes of the mass outside the kept ids"
    )
    k: int | None = Field(None, gt=0, description="train at a smaller k than cached")
    combine: Literal["separate", "mixture"] = Field(
        "separate", description="separate: a term per teacher; mixture: their average is the target"
    )
    view: Literal["clean", "masked"] = Field(
        "clean", description="what the student sees when it imitates task logits"
    )


class ObjectiveConfig(Settings):
    """The loss: hard · CE + Σ weight · τ² · divergence."""

    hard: HardConfig = Field(default_factory=HardConfig, description="cross-entropy on the text")
    distill: tuple[DistillTerm, ...] = Field((), description="distillation terms")


class TrainConfig(Settings):
    """How the student is trained."""

    steps: int = Field(1000, gt=0, description="optimiser steps")
    batch_sequences: int = Field(64, gt=0, description="sequences per step, over all processes")
    micro_batch_sequences: int | None = Field(
        None, gt=0, description="sequences per forward pass; null: the whole batch at once"
    )
    learning_rate: float = Field(5.0e-4, gt=0, description="peak learning rate")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="the learning rate after the warm-up"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, on matrices only")
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradient clipping; null for none")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 autocast on a GPU that has it, fp32 on a CPU"
    )
    seed: int = Field(0, description="of weights, data order and dropout")
    checkpoint_every: int = Field(200, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="how many of the last are kept")
    evaluate_every: int = Field(200, gt=0, description="steps between evaluations")
    held_out: float = Field(
        0.02, ge=0, lt=1, description="fraction of the documents that is kept for evaluation"
    )
    evaluate_sequences: int = Field(256, gt=0, description="at most so many of them are evaluated")
    allow_missing: tuple[str, ...] = Field(
        (), description="teachers whose targets may be incomplete; their holes train without KD"
    )
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="the loss")

    @field_validator("allow_missing", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
