"""Values that change over training steps: loss weights and the learning rate. Pure functions of the
step.
"""

import math
import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from rekindle.data.settings import Settings

USUAL_WARMUP = 100  # steps

Count = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]

_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h)")
_SECONDS = {"s": 1, "min": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """Return the seconds of "90 s", "5 min" or "1.5 h". Raises ValueError for anything else."""
    match = _TIME.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r} is neither steps (200) nor a time (90 s, 5 min, 1.5 h)")
    return float(match[1]) * _SECONDS[match[2]]


def _steps_or_time(value: object) -> object:
    if isinstance(value, str):
        seconds_of(value)
    elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("must be a number of steps, 1 or more, or a time: 90 s, 5 min, 1.5 h")
    return value


Interval = Annotated[  # a number of steps, or a time
    int | str,
    BeforeValidator(_steps_or_time),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": f"^\\s*{_TIME.pattern}\\s*$"},
            ]
        }
    ),
]


class Schedule(Settings):
    """A weight that moves from one value to another over the first part of the steps,
    then stays.
    """

    schedule: Literal["constant", "linear", "step", "cosine"] = Field(
        "linear", description="step: `from` until the end of `over`, then `to` (Heaviside)"
    )
    start: Amount = Field(1.0, alias="from", description="value at the first step")
    end: Amount = Field(0.0, alias="to", description="value once `over` has passed")
    over: Share = Field(1.0, description="fraction of the steps that the change takes")

    def value(self, step: int, steps: int) -> float:
        """Return the value at ``step`` (0-based) of ``steps``."""
        if self.schedule == "constant":
            return self.start
        done = min(step / (self.over * steps), 1.0)
        # 0.55 · 100 is a little more than 55, but step 55 must count as past it
        if done > 1 - 1e-9:
            return self.end
        if self.schedule == "step":
            return self.start
        shape = done if self.schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * shape

    def is_sudden(self, steps: int) -> bool:
        """Return whether the change is over after the first of several ``steps``."""
        return self.schedule != "constant" and self.over * steps < 1 - 1e-9 and steps > 1


Weight = float | Schedule


def weight_at(weight: Weight, step: int, steps: int) -> float:
    """Return the value of a number or schedule at a step."""
    return weight.value(step, steps) if isinstance(weight, Schedule) else float(weight)


def usual_warmup(steps: int) -> int:
    """Return the default steps of linear warm-up: a tenth of all, at most USUAL_WARMUP."""
    return max(0, min(USUAL_WARMUP, steps // 10))


def is_used(weight: Weight) -> bool:
    """Return whether a weight is above 0 at some step: a schedule either rises or falls all the
    way, or stays constant.
    """
    if not isinstance(weight, Schedule):
        return weight > 0
    return weight.start > 0 or (weight.end > 0 and weight.schedule != "constant")


def learning_rate_factor(kind: str, step: int, steps: int, warmup_steps: int) -> float:
    """Return the factor of the peak learning rate: warm-up, then ``kind`` down to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 1.0 - done if kind == "linear" else (1.0 + math.cos(math.pi * done)) / 2
