"""The teachers of a plan by name."""

from typing import Any

from rekindle.pipeline.plan.run import RunPlan

Teachers = list[dict[str, Any]]
WHOLE = {"limit_sequences": None}
NAMES = ("lm", "causal", "dense", "classes", "mc", "pairs", "words", "even")


def of(found: RunPlan, name: str) -> Any:
    return next(work for work in found.teachers if work.name == name)
