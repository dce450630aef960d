"""From finished runs, experts and caches to tables in plain text and one page of HTML.

It reads what the commands leave in their directories and trains nothing. The page needs no network:
no script, font or picture is fetched from anywhere.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.targets import SAMPLED
from rekindle.data.teacher_reader import TeacherReader

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
_WIDTH = 96  # characters of the printed tables


@dataclass(frozen=True)
class Run:
    """One student's training: how long it was, and how it did on the held-out documents.

    ``seconds`` are those of its steps alone, without evaluations and checkpoints.
    """

    name: str
    steps: int
    sequences: int
    seconds: float
    evaluations: list[dict[str, Any]]

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(steps done, value) of a held-out metric; empty where the run does not have it."""
        return [(e["step"], e[metric]) for e in self.evaluations if metric in e]

    @property
    def metrics(self) -> list[str]:
        """The held-out metrics it has."""
        names = (name for e in self.evaluations for name in e if name not in ("kind", "step"))
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class TaskScores:
    """Test scores on one task: by model, a list over seeds, as fractions."""

    task: str
    about: str
    train_examples: int
    test_examples: int
    chance: float
    scores: dict[str, list[float]]


@dataclass(frozen=True)
class TeacherFacts:
    """One cached teacher; ``positions`` are masked tokens, or sequences for a task expert."""

    name: str
    targets: str
    positions: int
    bytes: int
    corpus_tokens: int

    @property
    def bytes_per_position(self) -> float:
        """Bytes for each target."""
        return self.bytes / max(1, self.positions)

    @property
    def bytes_per_token(self) -> float:
        """Bytes for each token of the corpus (all replicas of a masked-LM teacher together)."""
        return self.bytes / max(1, self.corpus_tokens)


@dataclass(frozen=True)
class CacheFacts:
    """What a cache holds."""

    sequences: int
    tokens: int
    vocabulary: int
    teachers: list[TeacherFacts]


@dataclass(frozen=True)
class Cost:
    """Seconds: each teacher over the corpus once; those in use live in one run; the run itself.

    ``used`` names the teachers that the run learns from: the comparison is about them alone.
    """

    teachers: dict[str, float]
    used: list[str]
    live: float
    run: float

    @property
    def once(self) -> float:
        """To cache the teachers in use."""
        return sum(self.teachers[name] for name in self.used)

    @property
    def pays_after(self) -> int | None:
        """With so many runs the cache is no dearer than live teachers; None if it never is."""
        return max(1, math.ceil(self.once / self.live)) if self.live > 0 else None

    def cached(self, runs: int) -> float:
        """Of ``runs`` students from one cache."""
        return self.once + runs * self.run

    def with_live_teachers(self, runs: int) -> float:
        """Of as many students, with every teacher run beside each."""
        return runs * (self.run + self.live)


@dataclass(frozen=True)
class Report:
    """Everything on the page. ``facts`` are (what, value) pairs, ``commands`` (what for, line)."""

    title: str
    lead: str
    tasks: list[TaskScores]
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
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"{directory} is no finished run of `pipeline train-student`: {error.filename} cannot "
            f"be read ({error.strerror}). Give a run's directory, or finish it with --resume"
        ) from None
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if record["kind"] == "train"]
    return Run(
        name=name or directory.name,
        steps=summary["steps"],
        sequences=summary["steps"] * about["train"]["batch_sequences"],
        seconds=sum(record["tokens"] / record["tokens_per_second"] for record in steps),
        evaluations=[record for record in records if record["kind"] == "evaluate"],
    )


def read_test_scores(directory: Path) -> list[float]:
    """The test score of each seed that ``finetune`` has recorded in ``directory``."""
    metrics = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    return [seed["test_scores"][metrics["metric"]] for seed in metrics["per_seed"]]


def read_cache(path: str | Path) -> CacheFacts:
    """What the cache at ``path`` holds; raises what ``Cache.open`` raises."""
    cache = Cache.open(str(path))
    vocabulary = cache.corpus.info["tokenizer"]["size"]
    teachers = [
        TeacherFacts(
            name, _targets(reader, vocabulary), reader.positions, reader.bytes, cache.corpus.tokens
        )
        for name, reader in sorted(cache.teachers.items())
    ]
    return CacheFacts(len(cache), cache.corpus.tokens, vocabulary, teachers)


def _targets(teacher: TeacherReader, vocabulary: int) -> str:
    info = teacher.info
    if info.kind == "topk":
        replicas = f", {teacher.replicas} masked replicas" if teacher.masked else ""
        return f"{info.k} of {vocabulary:,} log-probabilities and the tail{replicas}"
    if info.kind in SAMPLED:
        return f"a {info.kind} sample of {info.k} of {vocabulary:,} tokens"
    if info.kind == "hidden":
        return f"hidden states of {info.hidden_size} values"
    if info.kind == "dense":
        return f"all {vocabulary:,} log-probabilities"
    return f"{info.num_labels} logits" if info.num_labels != 1 else "a score"


# --- in plain text --------------------------------------------------------------------------------


def as_text(report: Report) -> str:
    """The tables and the cost, at most 96 characters wide."""
    tables = [_score_table(report.tasks), _cache_table(report.cache, report.cost)]
    costs = [f"  {label:38}{value}" for label, value in cost_lines(report.cost)]
    stream = io.StringIO()
    console = Console(file=stream, width=_WIDTH, color_system=None, highlight=False, markup=False)
    for part in [*tables, *costs]:
        console.print(part)
    lines = (line.rstrip() for line in stream.getvalue().splitlines())
    return "\n".join(lines).strip("\n")


def _score_table(tasks: Sequence[TaskScores]) -> Table:
    table = _table("Test accuracy in %")
    table.add_column("task")
    for name in tasks[0].scores:
        table.add_column(name, justify="right")
    table.add_column("chance", justify="right")
    table.add_column("test", justify="right")
    for task in tasks:
        scores = [as_percent(values) for values in task.scores.values()]
        table.add_row(task.task, *scores, f"{100 * task.chance:.1f}", f"{task.test_examples:,}")
    table.add_row("mean", *(as_percent(values) for values in mean_scores(tasks).values()), "", "")
    return table


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="")


def mean_scores(tasks: Sequence[TaskScores]) -> dict[str, list[float]]:
    """Each model's mean over the tasks, seed by seed."""
    return {
        name: [mean(seed) for seed in zip(*(task.scores[name] for task in tasks), strict=True)]
        for name in tasks[0].scores
    }


def as_percent(values: Sequence[float]) -> str:
    """The mean over seeds, and the sample deviation where there are several."""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


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


def cost_lines(cost: Cost) -> list[tuple[str, str]]:
    """The cost in words, for both the text and the page."""
    runs = cost.pays_after
    paid = "never" if runs is None else f"after {runs} student run{'s' if runs > 1 else ''}"
    return [
        (f"{', '.join(cost.used)} once, into the cache", f"{cost.once:.1f} s"),
        ("the same live, beside each student", f"{cost.live:.1f} s a run"),
        ("a student run itself", f"{cost.run:.1f} s"),
        ("the cache has paid for itself", paid),
    ]


# --- as a page ------------------------------------------------------------------------------------


def as_html(report: Report) -> str:
    """The page, whole: styles and pictures are within it."""
    from rekindle.pipeline.report_figures import pictures  # matplotlib: a second's work to import

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": as_percent, "number": "{:,}".format}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    means = mean_scores(report.tasks)
    return template.render(
        report=report,
        means=means,
        best_of=lambda scores: max(scores.values(), key=mean),
        cost_lines=cost_lines(report.cost),
        pictures=pictures(report),
    )
