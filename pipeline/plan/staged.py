"""The output of ``pipeline plan`` for a file of several stages: one plan each, as far as known."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.figures import RunPlan
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.plan.scale import Scale
from rekindle.pipeline.plan.text import format_plan
from rekindle.pipeline.stages.resolve import Ready, plan_stages, ready_parts


@dataclass(frozen=True)
class PlannedStage:
    """One stage with its plan, or the reason why there is none."""

    ready: Ready
    plan: RunPlan | None
    note: str | None

    def as_dict(self) -> dict[str, object]:
        """Return the stage as JSON values."""
        plan = None if self.plan is None else self.plan.as_dict()
        return {"name": self.ready.stage.name, "plan": plan, "note": self.note} | {
            "waiting": self.ready.waiting
        }

    def as_text(self) -> str:
        """Return the stage as text."""
        name = self.ready.stage.name
        shown = format_plan(self.plan) if self.plan is not None else f"{self.note}\n"
        waiting = "".join(f"{line}\n" for line in self.ready.waiting_text())
        return f"--- stage {name} ---\n{shown}{waiting}"


def plan_staged_run(
    config: RunConfig, probe: bool = True, scale: Scale | None = None
) -> list[PlannedStage]:
    """Return ``plan_run`` for every stage, without what an earlier stage puts into the same cache.

    Raise InputError as ``plan_run`` and ``plan_stages`` do.
    """
    planned: list[PlannedStage] = []
    for ready in ready_parts(plan_stages(config, Path())):
        part, note = _new_work(ready, planned)
        plan = None if part is None else plan_run(part, probe, scale)
        planned.append(PlannedStage(ready, plan, note))
    return planned


def _new_work(ready: Ready, planned: Sequence[PlannedStage]) -> tuple[RunConfig | None, str | None]:
    """Return the configuration to plan, or why there is nothing to plan."""
    part, prompts = ready.config, ready.stage.prompts
    if part is None:
        reason = ": its text is not there" if "" in ready.waiting else ""
        return None, f"not known yet{reason}"
    if prompts is not None and not Path(prompts.to).exists():
        return None, f"not known yet: {prompts.to} is written when its turn comes"
    same_cache = {
        earlier.ready.stage.name: config
        for earlier in planned
        if (config := earlier.ready.config) is not None and config.cache.path == part.cache.path
    }
    planned_names = {t.name for config in same_cache.values() for t in config.teachers}
    new_teachers = tuple(t for t in part.teachers if t.name not in planned_names)
    if not new_teachers and any(config.corpus == part.corpus for config in same_cache.values()):
        return None, f"nothing beyond what stage {[*same_cache][-1]} puts into {part.cache.path}"
    return part.model_copy(update={"teachers": new_teachers}), None
