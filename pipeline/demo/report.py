"""What the demo tells: its numbers as plain text, and as the report page."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rekindle.data.errors import InputError
from rekindle.pipeline.compare.runs import differences
from rekindle.pipeline.compare.tables import setting_words
from rekindle.pipeline.report.cache import CacheFacts, KnownCache, cache_section
from rekindle.pipeline.report.cost import Cost, StudentCost, cost_lines, cost_section
from rekindle.pipeline.report.losses import curves_of, losses_section
from rekindle.pipeline.report.page import Commands, Facts, Page, Section
from rekindle.pipeline.report.scores import TaskScores, mean_scores, percent, scores_section
from rekindle.pipeline.report.settings import settings_section
from rekindle.train.record.run_log import read_metrics

_WIDTH = 96  # characters of the printed tables
MEASURED = (
    "Measured here: stage 1 as a whole, with the loading of the expert; its live cost as the time "
    "of its forward passes alone, over the first shard, which is the least that it can be."
)


@dataclass(frozen=True)
class Run:
    """One student's training: how long it was, its settings, and all that it recorded.

    ``seconds`` are those of its steps alone, without evaluations and checkpoints.
    """

    name: str
    steps: int
    sequences: int
    seconds: float
    settings: dict[str, Any]
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class DemoTask:
    """A task of the demo: what it asks, its sizes, and test scores by model."""

    about: str
    train_examples: int
    test_examples: int
    scored: TaskScores


@dataclass(frozen=True)
class Report:
    """Everything that is told. ``models`` are those scored, in order; ``facts`` are (what, value)
    pairs, ``commands`` (what for, line).
    """

    title: str
    lead: str
    models: list[str]
    tasks: list[DemoTask]
    runs: list[Run]
    cache: CacheFacts
    cost: Cost
    facts: list[tuple[str, str]]
    commands: list[tuple[str, str]]


# --- reading --------------------------------------------------------------------------------------


def read_run(directory: Path, name: str | None = None) -> Run:
    """A finished run of ``pipeline train-student``; InputError where there is none."""
    try:
        about = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        (directory / "metrics.jsonl").stat()
    except OSError as error:
        raise InputError(
            f"{directory} is no finished run of `pipeline train-student`: {error.filename} cannot "
            f"be read ({error.strerror}). Give a run's directory, or finish it with --resume"
        ) from None
    records = read_metrics(directory)
    steps = [record for record in records if record["kind"] == "train"]
    return Run(
        name=name or directory.name,
        steps=summary["steps"],
        sequences=summary["steps"] * about["train"]["batch_sequences"],
        seconds=sum(record["tokens"] / record["tokens_per_second"] for record in steps),
        settings={key: about[key] for key in ("student", "train") if key in about},
        records=records,
    )


def read_test_scores(directory: Path) -> list[float]:
    """The test score of each seed that ``finetune`` has recorded in ``directory``."""
    metrics = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    return [seed["test_scores"][metrics["metric"]] for seed in metrics["per_seed"]]


# --- in plain text --------------------------------------------------------------------------------


def as_text(report: Report) -> str:
    """The tables and the cost, at most 96 characters wide."""
    tables = [_score_table(report), _cache_table(report.cache, report.cost)]
    costs = [f"  {label:38}{value}" for label, value in cost_lines(report.cost)]
    stream = io.StringIO()
    console = Console(file=stream, width=_WIDTH, color_system=None, highlight=False, markup=False)
    for part in [*tables, *costs]:
        console.print(part)
    lines = (line.rstrip() for line in stream.getvalue().splitlines())
    return "\n".join(lines).strip("\n")


def _score_table(report: Report) -> Table:
    table = _table("Test accuracy in %")
    table.add_column("task")
    for name in (*report.models, "chance", "test"):
        table.add_column(name, justify="right")
    for task in report.tasks:
        scores = [percent(task.scored.of(name)) for name in report.models]
        chance = percent([task.scored.chance or 0.0])
        table.add_row(task.scored.task, *scores, chance, f"{task.test_examples:,}")
    means = mean_scores(report.models, [task.scored for task in report.tasks]) or {}
    table.add_row("mean", *(percent(means.get(name, [])) for name in report.models), "", "")
    return table


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="")


def _cache_table(cache: CacheFacts, cost: Cost) -> Table:
    title = f"The cache: {cache.sequences:,} sequences, {cache.tokens:,} tokens"
    table = _table(title)
    table.add_column("teacher")
    table.add_column("kept for each target")
    for name in ("targets", "bytes each", "bytes/token", "seconds"):
        table.add_column(name, justify="right")
    for teacher in cache.teachers:
        table.add_row(
            teacher.name,
            teacher.targets,
            f"{teacher.positions:,}",
            f"{teacher.bytes_per_position:.1f}",
            f"{teacher.bytes_per_token:.2f}",
            f"{cost.teachers[teacher.name]:.1f}" if teacher.name in cost.teachers else "",
        )
    return table


# --- as a page ------------------------------------------------------------------------------------


def as_page(report: Report) -> Page:
    """The page. Lines of students are numbered as the models are: the experts have the first."""
    curves = {run.name: curves_of(run.name, run.records) for run in report.runs}
    tasks = [task.scored for task in report.tasks]
    return Page(
        report.title,
        report.lead,
        [
            scores_section(report.models, tasks),
            losses_section([curves.get(name) or curves_of(name, []) for name in report.models]),
            _cost_section(report),
            cache_section([KnownCache("", report.cache)], with_path=False),
            Section("What was run", [Facts(report.facts)]),
            _settings_section(report.runs),
            Section("By hand", [Commands(report.commands)]),
        ],
    )


def _cost_section(report: Report) -> Section:
    cost = report.cost
    taught = report.runs[-1].name
    students = [
        StudentCost(run.name, run.seconds, tuple(cost.used), cost.live)
        if run.name == taught
        else StudentCost(run.name, run.seconds, (), 0.0)
        for run in report.runs
    ]
    teachers: Mapping[str, float | None] = dict(cost.teachers)
    samples = [report.models.index(run.name) for run in report.runs]
    return cost_section(teachers, students, cost, [MEASURED], samples=samples)


def _settings_section(runs: Sequence[Run]) -> Section:
    found = differences([run.settings for run in runs])
    words = {key: [setting_words(key, value) for value in found[key]] for key in found}
    return settings_section([run.name for run in runs], words, "What sets the students apart")
