"""Reads what the demo's jobs have left, and tells it: the printed text, the page, results.json."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rekindle.pipeline.demo.report import (
    DemoTask,
    Report,
    Run,
    as_page,
    as_text,
    read_run,
    read_test_scores,
)
from rekindle.pipeline.demo.settings import STUDENTS, WITH, WITHOUT, DemoSettings
from rekindle.pipeline.demo.tasks import TASKS, TASKS_FOLDER, Task
from rekindle.pipeline.report.cache import CacheFacts, read_cache
from rekindle.pipeline.report.cost import Cost
from rekindle.pipeline.report.page import as_html
from rekindle.pipeline.report.scores import TaskScores

LEAD = (
    "Experts are fine-tuned from a small language model, run once over unlabelled text, and teach "
    "the same model on that text: masked LM together with the experts' cached logits (MoEGP). "
    "Fine-tuned again on the same labels, is it better than the experts, and than a student that "
    "read the same text without them?"
)
HEADINGS = {"expert": "expert", WITHOUT: "student without KD", WITH: "student with KD"}


def fine_tuned(home: Path, model: str, task: str) -> Path:
    """Where the fine-tuned ``model`` (expert, or a student's name) of a task is."""
    folder = home / "experts" if model == "expert" else home / "fine-tuned" / model
    return folder / task


def collect(home: Path, settings: DemoSettings) -> Report:
    """Everything that is told of a finished demo."""
    runs = [read_run(home / "students" / name, HEADINGS[name]) for name in STUDENTS]
    cache = read_cache(home / "cache")
    return Report(
        title="Knowledge rekindle on Python's own documentation",
        lead=LEAD,
        models=list(HEADINGS.values()),
        tasks=[_task_scores(home, task) for task in TASKS],
        runs=runs,
        cache=cache,
        cost=_cost(home, runs[-1]),
        facts=_facts(home, settings, cache),
        commands=_commands(_shown(home), settings),
    )


def _task_scores(home: Path, task: Task) -> DemoTask:
    folder = home / TASKS_FOLDER / task.name
    labels = [json.loads(line)["label"] for line in _lines(folder / "test.jsonl")]
    examples = len(_lines(folder / "train.jsonl"))
    scores = {
        heading: read_test_scores(fine_tuned(home, model, task.name))
        for model, heading in HEADINGS.items()
    }
    about = f"{task.question} {examples:,} examples to train on, {len(labels):,} to test"
    chance = 1 / len(set(labels))
    scored = TaskScores(task.name, "accuracy", "test", scores, chance, about)
    return DemoTask(task.question, examples, len(labels), scored)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _cost(home: Path, run: Run) -> Cost:
    """Of the teachers that the student learnt from; the base LM is in the cache to look at."""
    measured = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((home / "costs").glob("*.json"))
    }
    used = [task.name for task in TASKS]
    return Cost(
        teachers={name: cost["once"] for name, cost in measured.items()},
        used=used,
        live=run.sequences * sum(measured[name]["live_per_sequence"] for name in used),
        run=run.seconds,
    )


def _facts(home: Path, settings: DemoSettings, cache: CacheFacts) -> list[tuple[str, str]]:
    documents = len(_lines(home / "corpus.jsonl"))
    model, tuning = settings.model, settings.finetune
    layers = model["num_hidden_layers"]
    return [
        (
            "text",
            f"the documentation of Python {platform.python_version()}: {documents:,} documents "
            "without labels; those of the tasks are others",
        ),
        (
            "model",
            f"BERT, layers: {layers}, hidden size: {model['hidden_size']}, vocabulary: "
            f"{cache.vocabulary:,} tokens; its tokenizer and weights are made here, from nothing",
        ),
        (
            "base",
            f"{settings.base['steps']:,} steps of {settings.batch_sequences} sequences, masked LM",
        ),
        (
            "students",
            f"{settings.student['steps']:,} steps more from base, in the same order of the same "
            "masks: masked LM alone, or masked LM and KL to the experts' logits "
            f"(weights {', '.join(str(term['weight']) for term in settings.distill)}; "
            f"pairs: {settings.pairs})",
        ),
        (
            "fine-tuning",
            f"{tuning['epochs']} epochs, learning rate {tuning['learning_rate']:g}, "
            f"seeds: {settings.seeds}; the experts that teach are the best on dev",
        ),
    ]


def _commands(shown: Path, settings: DemoSettings) -> list[tuple[str, str]]:
    """Every kind of stage by hand, into directories beside those of the demo."""
    tuning = settings.finetune | {"max_length": settings.sequence_length}
    overrides = " ".join(f"--set {name}={value}" for name, value in tuning.items())
    again = shown / "by-hand"
    files = f"--train {shown}/tasks/part/train.jsonl --dev {shown}/tasks/part/test.jsonl"
    return [
        ("The base model", f"pipeline train-student {shown}/base.yaml --out {again}/base"),
        (
            "An expert",
            f"pipeline finetune {shown}/base {files} --out {again}/part "
            f"--seeds {settings.seeds} {overrides}",
        ),
        ("Stage 1: the experts into the cache", f"pipeline cache-teachers {shown}/stage1.yaml"),
        ("What is in it", f"pipeline inspect {shown}/cache"),
        (
            "Stage 2: a student of the experts",
            f"pipeline train-student {shown}/stage2-{WITH}.yaml --out {again}/{WITH}",
        ),
        (
            "The student on the task again",
            f"pipeline finetune {shown}/students/{WITH} {files} --out {again}/{WITH}-part "
            f"--seeds {settings.seeds} {overrides}",
        ),
    ]


def write_results(report: Report, home: Path) -> str:
    """Write ``report.html`` and ``results.json``; returns the text to print, with the paths."""
    (home / "report.html").write_text(as_html(as_page(report)), encoding="utf-8")
    results = json.dumps(_results(report), indent=1) + "\n"
    (home / "results.json").write_text(results, encoding="utf-8")
    shown = _shown(home)
    paths = [
        ("report", "report.html"),
        ("cache", "cache"),
        ("experts", "experts/" + ", ".join(task.name for task in TASKS)),
        ("students", "students/" + ", ".join(STUDENTS)),
        (
            "configuration",
            "base.yaml, stage1.yaml, " + ", ".join(f"stage2-{s}.yaml" for s in STUDENTS),
        ),
    ]
    lines = [f"{what + ':':15}{shown}/{path}" for what, path in paths]
    return "\n".join([as_text(report), "", *lines])


def _results(report: Report) -> dict[str, Any]:
    """All numbers, but for every single step of the students: their own directories have those."""
    results = asdict(report)
    for run in results["runs"]:
        records = run.pop("records")
        run["evaluations"] = [record for record in records if record["kind"] == "evaluate"]
    return results


def _shown(home: Path) -> Path:
    """The directory as one would type it here."""
    here = Path.cwd()
    return home.relative_to(here) if home.is_relative_to(here) else home
