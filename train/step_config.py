"""Settings of a run's length and of a step: learning rate and optimiser.

A length in epochs or tokens becomes steps when a run opens its cache (``order.length``); until then
``steps`` is 0 here and null when written. Does not import torch.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from rekindle.data.errors import InputError
from rekindle.data.former import FormerDefault
from rekindle.data.settings import Settings
from rekindle.train.schedules import (
    USUAL_WARMUP,
    Amount,
    Count,
    Positive,
    usual_warmup,
)

USUAL_STEPS = 1000
LENGTHS = ("steps", "epochs", "tokens")  # a run has exactly one of them
# The section of a run's record with the steps that another length came to.
LENGTH_SECTION = "length"


def _zero_for_null(value: object) -> object:
    """Read null as 0: steps that are not known yet, as nobody asks for none."""
    if value == 0 and value is not False:
        raise ValueError("must be greater than 0: without steps nothing is trained")
    return 0 if value is None else value


Steps = Annotated[
    int,
    BeforeValidator(_zero_for_null),
    Field(ge=0),
    PlainSerializer(lambda steps: steps or None, return_type=int | None),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "null"}]}),
]
Memory = Annotated[float, Field(ge=0, lt=1)]  # of a moving mean
C = TypeVar("C", bound="StepConfig")


class StepConfig(Settings):
    """The length of a run, its learning rate, and AdamW."""

    epochs: Positive | None = Field(
        None,
        description="length instead of steps: passes over the training sequences (without those "
        "held out or left out by train.domains)",
    )
    tokens: Count | None = Field(
        None,
        description="length instead of steps: tokens of the sequences that are read, with or "
        "without a loss (a masked LM has one at few of them), over all processes",
    )
    steps: Steps = Field(
        default_factory=lambda given: 0 if _has_other_length(given) else USUAL_STEPS,
        description=f"optimiser steps; {USUAL_STEPS} if neither epochs nor tokens is given",
    )
    batch_sequences: Count = Field(64, description="sequences per step, over all processes")
    learning_rate: Positive = Field(5.0e-4, description="peak learning rate")
    warm_head_steps: int = Field(
        0,
        ge=0,
        description="the first steps (part of steps) in which only the language model's own head "
        "is trained, at the peak rate, before everything else begins with its "
        "warm-up. For a student with a fresh head; an output matrix that is also the "
        "input embeddings is not trained",
    )
    warmup_steps: Annotated[int, FormerDefault(USUAL_WARMUP)] = Field(
        ge=0,
        default_factory=lambda given: usual_warmup(
            given.get("steps", 1) - given.get("warm_head_steps", 0)
        ),
        description="steps of linear warm-up, fewer than steps; if left out: a tenth of the "
        "steps without warm_head_steps, at most 100",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="the learning rate after the warm-up"
    )
    weight_decay: Amount = Field(0.01, description="AdamW's weight decay, on matrices only")
    betas: tuple[Memory, Memory] = Field(
        (0.9, 0.999),
        description="AdamW's decay rates of its means of gradients and squared gradients",
    )
    eps: Positive = Field(1e-8, description="AdamW's epsilon, added to the root of the mean square")

    @model_validator(mode="after")
    def _has_a_length(self) -> "StepConfig":
        lengths = [name for name in LENGTHS if getattr(self, name)]
        if len(lengths) > 1:
            raise ValueError(
                f"{' and '.join(lengths)} are given, but each of them sets how long the run is; "
                f"give one (--set train.{lengths[-1]}=… replaces the others)"
            )
        if not lengths:
            raise ValueError(
                "steps is null, and nothing else says how long the run is; give one of "
                f"{', '.join(LENGTHS)}"
            )
        if self.steps and (problem := self.length_problem()):
            raise ValueError(problem)
        return self

    @model_serializer(mode="wrap")
    def _as_it_reads_again(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a default warm-up while the steps that it follows from are unknown."""
        values: dict[str, Any] = dump(self)
        if not self.steps and "warmup_steps" not in self.model_fields_set:
            values.pop("warmup_steps", None)
        return values

    def length_problem(self) -> str | None:
        """Return what is impossible with this many steps; None if all is possible."""
        steps, head = self.steps, self.warm_head_steps
        if head >= steps:
            return (
                f"warm_head_steps {head} of steps {steps}: nothing but the language model's head "
                f"would be trained. Give fewer, such as {usual_head_steps(steps)}"
            )
        if self.warmup_steps >= steps - head:
            after = f" less warm_head_steps {head}" if head else ""
            return (
                f"warmup_steps {self.warmup_steps} of steps {steps}{after}: the learning rate "
                "would never fall from its peak, if it reached it. Give fewer, or leave it out "
                f"(a tenth of the steps, here {usual_warmup(steps - head)})"
            )
        return None

    @property
    def length(self) -> str:
        """Return the length as it was given: 2 epochs, 1,000 steps."""
        name = next(name for name in (*LENGTHS[1:], LENGTHS[0]) if getattr(self, name))
        value = getattr(self, name)
        number = f"{value:g}" if name == "epochs" else f"{value:,}"
        return f"{number} {name if value != 1 else name[:-1]}"

    def of_steps(self: C, steps: int) -> C:
        """Return the same with its length known, and the warm-up that follows from it.

        Raises InputError if it cannot be that short.
        """
        changed: dict[str, Any] = {"steps": steps}
        given = {*self.model_fields_set}
        if "warmup_steps" not in given:
            changed["warmup_steps"] = usual_warmup(steps - self.warm_head_steps)
        config = self.model_copy(update=changed)
        config.model_fields_set.clear()
        config.model_fields_set.update(given)
        if problem := config.length_problem():
            raise InputError(f"train: {self.length} = {steps:,} steps here; {problem}")
        return config


def usual_head_steps(steps: int) -> int:
    """Return for how many steps a fresh head may be trained alone: a fifth, at most 100."""
    return max(min(steps // 5, 100), 1)


def _has_other_length(given: dict[str, Any]) -> bool:
    """Return whether the length is given in other units than steps."""
    return any(given.get(name) for name in LENGTHS[1:])


def recorded_steps(record: Mapping[str, Any]) -> int | None:
    """Return the steps of a ``run.json``; None if the run has not begun."""
    found: int | None = (record.get(LENGTH_SECTION) or record["train"]).get("steps")
    return found


def steps_of(
    config: StepConfig, sequences: float, tokens_each: float, replayed: float = 0.0
) -> int:
    """Return the steps of a run over ``sequences`` of ``tokens_each`` on average; the share
    ``replayed`` of each batch comes from others.

    An epoch is over once each of the sequences has been read; tokens count everything that is read.
    """
    if config.steps:
        return config.steps
    if config.epochs is not None:
        new_sequences = config.batch_sequences * (1 - replayed)
        return max(1, math.ceil(config.epochs * sequences / new_sequences - 1e-9))
    assert config.tokens is not None
    return max(1, math.ceil(config.tokens / (config.batch_sequences * tokens_each) - 1e-9))
