"""The demo command: the knowledge-rekindle cycle on Python's documentation, as a list of jobs.

Nothing of the method itself is here: what a job does is in job_functions, what came out is told by
demo_results. A finished job is recognised by what it leaves, so the same command again goes on
where it stopped.
"""

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline import job_functions as stages
from rekindle.pipeline.config import RunConfig, dump_config
from rekindle.pipeline.demo.results import collect, fine_tuned, write_results
from rekindle.pipeline.demo.settings import FULL, LM, QUICK, STUDENTS, WITH, WITHOUT, DemoSettings
from rekindle.pipeline.demo.tasks import TASKS, TASKS_FOLDER, write_corpus
from rekindle.pipeline.processes.jobs import Job, run_jobs
from rekindle.pipeline.processes.worker import warm_up
from rekindle.pipeline.progress import Progress

DEMO_FILE = "demo.json"  # marks the directory of a demo, and says which one
WRITER = "rekindle demo"


def run_demo(out: Path, quick: bool, progress: Progress) -> str:
    """Run what is not finished of the demo in ``out``; returns the text to print.

    Raises InputError for an ``out`` that holds something else, another demo included.
    """
    settings = QUICK if quick else FULL
    home = Path(os.path.abspath(out))
    _claim(home, settings)
    warm_up()
    if not (home / "corpus.jsonl").exists():
        write_documents(home, settings, progress)
    write_configs(home, settings)
    run_jobs(list(plan_jobs(home, settings)), home / "demo.log", progress)
    return write_results(collect(home, settings), home)


def _claim(home: Path, settings: DemoSettings) -> None:
    """Make the directory ours, or make sure that it is and that the demo in it is this one."""
    # The corpus is that of this Python: its documentation differs from one version to the next.
    about = {
        "written_by": WRITER,
        "python": platform.python_version(),
        "settings": settings.model_dump(mode="json"),
    }
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        try:
            present = json.loads((home / DEMO_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            present = {}
        if present == about:
            return
        holds = "something else"
        if isinstance(present, dict) and present.get("written_by") == WRITER:
            holds = "another demo (of the other size, or of another version of Python or Rekindle)"
        raise InputError(f"{home} holds {holds}; give another --out, or remove it")
    home.mkdir(parents=True, exist_ok=True)
    (home / DEMO_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def write_documents(home: Path, settings: DemoSettings, progress: Progress) -> None:
    """The unlabelled corpus and the files of the tasks."""
    from rekindle.data.corpus.python_docs import python_docs

    with progress.task("documents", unit="documents") as task:
        pages = list(python_docs())
        write_corpus(pages, settings.sizes, home, settings.documents)
        task.advance(len(pages))


# --- the configuration files ----------------------------------------------------------------------


def write_configs(home: Path, settings: DemoSettings) -> None:
    """``base.yaml``, ``stage1.yaml``, ``stage2-<student>.yaml``: what one can run by hand."""
    for name, config in configs(home, settings).items():
        (home / f"{name}.yaml").write_text(dump_config(config), encoding="utf-8")


def configs(home: Path, settings: DemoSettings) -> dict[str, RunConfig]:
    """The configuration of every stage, by the stem of its file."""
    shared: dict[str, Any] = {
        "corpus": {
            "source": [str(home / "corpus.jsonl")],
            "domain_field": "domain",
            "tokenizer": str(home / "model"),
            "sequence_length": settings.sequence_length,
        },
        "cache": {
            "path": str(home / "cache"),
            "sequences_per_shard": 1024,
            "replicas": settings.replicas,
            "seed": settings.seed,
        },
    }
    scratch = {"model": str(home / "model"), "from_scratch": True}
    base = {"model": str(home / "base")}
    train = {"seed": settings.seed, "batch_sequences": settings.batch_sequences, "held_out": 0.03}
    found: dict[str, dict[str, Any]] = {
        "base": {"student": scratch, "train": train | settings.base},
        "stage1": {"teachers": _teachers(home, settings)},
    }
    for name in STUDENTS:
        objective = {"distill": settings.distill if name == WITH else []}
        continued = {"student": base, "train": train | settings.student | {"objective": objective}}
        found[f"stage2-{name}"] = continued
    return {name: parse_settings(RunConfig, shared | own, name) for name, own in found.items()}


def _teachers(home: Path, settings: DemoSettings) -> list[dict[str, Any]]:
    experts = [
        {
            "name": task.name,
            "model": str(home / "experts" / task.name),
            "task": "sequence_classification",
            "pairs": settings.pairs if task.paired else None,
        }
        for task in TASKS
    ]
    kept = {"kind": "topk", "k": settings.lm_targets, "temperatures": [1.0]}
    base = {"name": LM, "model": str(home / "base"), "task": "masked_lm", "targets": kept}
    return [*experts, base]


# --- the jobs -------------------------------------------------------------------------------------


def plan_jobs(home: Path, settings: DemoSettings) -> Iterator[Job]:
    """Every job of the demo; of those that can start, the first does."""
    model, base = home / "model", home / "base"
    yield Job(
        "tokenizer",
        stages.make_model,
        (
            home / "corpus.jsonl",
            model,
            settings.vocabulary,
            settings.model | {"max_position_embeddings": settings.sequence_length},
        ),
        output=model,
        steps=1,
    )
    yield Job(
        "base",
        stages.pretrain,
        (home / "base.yaml", base),
        output=base / "run.yaml",
        after=("tokenizer",),
        steps=settings.base["steps"],
    )
    experts = [_fine_tuning(home, settings, "expert", task.name) for task in TASKS]
    yield from experts
    # One after another: each rewrites the cache's manifest. The base model waits for no expert.
    before: tuple[str, ...] = ("base",)
    for name in (LM, *(task.name for task in TASKS)):
        cost = home / "costs" / f"{name}.json"
        arguments = (home / "stage1.yaml", name, cost)
        job = Job(f"cache {name}", stages.cache_teacher, arguments, output=cost, after=before)
        yield job
        before = (job.name, *(expert.name for expert in experts))
    for name in (WITH, WITHOUT):
        run = home / "students" / name
        yield Job(
            f"student {name}",
            stages.train,
            (home / f"stage2-{name}.yaml", run),
            output=run / "run.yaml",
            after=before if name == WITH else ("base",),
            steps=settings.student["steps"],
        )
    for name in (WITHOUT, WITH):
        for task in TASKS:
            yield _fine_tuning(home, settings, name, task.name)


def _fine_tuning(home: Path, settings: DemoSettings, model: str, task: str) -> Job:
    """The base model becomes an expert; a student is fine-tuned in the same way, for its score."""
    start = home / "base" if model == "expert" else home / "students" / model
    out = fine_tuned(home, model, task)
    values = settings.finetune | {"max_length": settings.sequence_length}
    return Job(
        f"{model} on {task}",
        stages.fine_tune,
        (start, home / TASKS_FOLDER / task, out, settings.seeds, values),
        output=out / "metrics.json",
        after=("base",) if model == "expert" else (f"student {model}",),
        steps=1,
    )
