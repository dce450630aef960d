"""Combines recorded cells into the results of a cycle, as its own command would report them.

The scores of an arm are by draw of the labels. A task's are over the draws in which it is measured;
the mean over tasks is only over the draws that have all tasks.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from record import Cell

from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.scores import (
    MEAN,
    ArmScores,
    CycleResults,
    Primary,
    TaskFacts,
    TextFacts,
    differences_of,
    join_draws,
    main_scores,
)


def results_of(config: CycleConfig, rows: Sequence[Cell]) -> CycleResults:
    """Return the results of the recorded cells, for the cycle that the file plans."""
    facts = {one["task"]: TaskFacts(**one["facts"]) for one in rows}
    tasks = [
        facts.get(task.name, TaskFacts(task.name, task.metric or "accuracy", 0, 0, 0))
        for task in config.tasks
    ]
    metrics = {task.name: task.metric for task in tasks}
    draws = {draw: _draw_scores(rows, draw) for draw in sorted({one["draw"] for one in rows})}
    scores, _ = join_draws(draws)
    scores += join_draws({d: _means(draws[d], metrics) for d in complete_draws(config, rows)})[0]
    scores = [one for arm in _arms(scores) for one in scores if one.arm == arm]
    file = config.model_dump(mode="json")
    results = CycleResults(
        arms=list(config.arms),
        tasks=tasks,
        scores=scores,
        differences=differences_of(config.arms, metrics, scores),
        searched=[],
        costs={},
        notes=[],
        settings={"settings": file},
        draws=[*draws],
        texts=[TextFacts(**one["text"]) for one in _first_of_task(rows)],
    )
    primary = Primary.of(file["primary"], main_scores(scores, metrics), results.judged_on)
    return CycleResults(**(vars(results) | {"primary": primary}))


def complete_draws(config: CycleConfig, rows: Sequence[Cell]) -> list[int]:
    """Return the draws that have all tasks."""
    names = {task.name for task in config.tasks}
    measured = measured_draws(rows)
    draws = {draw for of_task in measured.values() for draw in of_task}
    return sorted(d for d in draws if all(d in measured.get(name, ()) for name in names))


def measured_draws(rows: Sequence[Cell]) -> dict[str, list[int]]:
    """Return the recorded draws of each task."""
    draws: dict[str, list[int]] = {}
    for one in rows:
        draws.setdefault(one["task"], []).append(one["draw"])
    return draws


def _first_of_task(rows: Sequence[Cell]) -> list[Cell]:
    """Return a cell of each task; the text is the same in all of its draws."""
    return list({one["task"]: one for one in reversed(rows)}.values())[::-1]


def _draw_scores(rows: Sequence[Cell], draw: int) -> list[ArmScores]:
    return [
        ArmScores.of(one["arm"], cell["task"], one["metric"], one["seeds"], one["test"])
        for cell in rows
        if cell["draw"] == draw
        for one in cell["scores"]
    ]


def _means(scores: Sequence[ArmScores], metrics: Mapping[str, str]) -> list[ArmScores]:
    """Return the mean over all tasks of each arm in one draw, by the tasks' main metrics."""
    if len(metrics) == 1:
        return []
    main = main_scores(scores, metrics)
    means = []
    for arm in _arms(scores):
        ones = [main[arm, task] for task in metrics if (arm, task) in main]
        if len(ones) == len(metrics):
            by_seed = [fmean(seed) for seed in zip(*(one.scores for one in ones), strict=True)]
            means.append(ArmScores.of(arm, MEAN, MEAN, [], by_seed))
    return means


def _arms(scores: Sequence[ArmScores]) -> list[str]:
    return list(dict.fromkeys(one.arm for one in scores))
