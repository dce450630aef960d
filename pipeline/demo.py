"""The demo: a cycle (``pipeline rekindle``) on text that every Python carries, without downloads.

    OUT/demo.json    which demo it is
    OUT/made/        documents, labelled tasks, and the start model, from nothing
    OUT/…            the cycle, see cycle/run.py

A masked-LM teacher stands in the cache beside the experts; it teaches nobody, and is there for
``pipeline inspect`` to show.
"""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from rekindle.data.errors import InputError
from rekindle.data.settings import Settings, parse_settings
from rekindle.data.storage.atomic import write_json, write_text
from rekindle.pipeline.builtin.settings import SETTINGS
from rekindle.pipeline.builtin.tasks import TASKS, TASKS_FOLDER, TaskSizes, write_corpus
from rekindle.pipeline.config import RunConfig, dump_config
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.results import CycleResults
from rekindle.pipeline.cycle.run import run_cycle
from rekindle.pipeline.job_functions import cache, make_model, pretrain
from rekindle.pipeline.processes.devices import Place, cores
from rekindle.pipeline.processes.jobs import MOST_WORKERS, Job, run_jobs
from rekindle.pipeline.processes.worker import warm_up
from rekindle.pipeline.progress import Progress
from rekindle.train.record.run_folder import goes_on, open_folder, reading

DEMO_FILE = "demo.json"  # marks the directory of a demo, and says which one
WRITER = "rekindle demo"
MADE = "made"
LM = "base-lm"  # the start model as a masked-LM teacher
ABOUT = (
    "Experts are fine-tuned from a tiny language model, which was trained here on Python's own "
    "documentation, and run once over that text; they teach the same model on it: masked LM "
    "together with their cached logits (the arm mixture, MoEGP). Fine-tuned again on the same "
    "labels, is it better than the experts, and than a student that read the same text without "
    "them (mlm)?"
)


class DemoSettings(Settings):
    """How large a demo is. The students, and all that is fine-tuned, are trained alike."""

    vocabulary: int
    documents: int | None  # of the unlabelled corpus, at most
    sizes: TaskSizes
    replicas: int
    base: Mapping[str, int | float]  # of the `train` section
    student: Mapping[str, int | float]  # likewise
    epochs: int
    seeds: int  # fine-tunings of each model on each task


FULL = DemoSettings(
    vocabulary=4000,
    documents=None,
    sizes=TaskSizes(train=800, dev=240, test=1440),
    replicas=3,
    base={"steps": 1200, "learning_rate": 2e-3, "evaluate_every": 400},
    student={"steps": 800, "learning_rate": 2e-3, "warmup_steps": 50, "evaluate_every": 80},
    epochs=8,
    seeds=3,
)
QUICK = DemoSettings(
    vocabulary=SETTINGS.vocabulary,
    documents=SETTINGS.documents,
    sizes=TaskSizes(train=320, dev=80, test=400),
    replicas=SETTINGS.replicas,
    base=SETTINGS.pretrain,
    student={"steps": 80, "learning_rate": 2e-3, "warmup_steps": 20, "evaluate_every": 20},
    epochs=5,
    seeds=1,
)


def run_demo(out: Path, quick: bool, progress: Progress) -> CycleResults:
    """Run what is not finished of the demo in ``out``; returns what came out.

    Raises InputError for an ``out`` that holds something else, another demo included.
    """
    settings = QUICK if quick else FULL
    home = Path(os.path.abspath(out))
    # The corpus is that of this Python: its documentation differs from one version to the next.
    about = {
        "written_by": WRITER,
        "python": platform.python_version(),
        "settings": settings.model_dump(mode="json"),
    }
    with open_folder(home, lambda: _look(home, about)):
        write_json(home / DEMO_FILE, about)
        _make_start(home / MADE, settings, progress)
    # A thread each: what comes out is then the same whatever the number of cores.
    places = [Place(None, 1)] * min(cores(), MOST_WORKERS)
    beside = (DEMO_FILE, MADE, "cache")
    return run_cycle(
        cycle_config(home, settings), home, places=places, beside=beside, progress=progress
    )


def _look(home: Path, about: Mapping[str, object]) -> None:
    """Check that the directory is free, or holds this very demo."""
    if goes_on(home, DEMO_FILE, "demo", resume=True):
        with reading(home / DEMO_FILE, "give another --out"):
            present = json.loads((home / DEMO_FILE).read_text(encoding="utf-8"))
        if present != about:
            raise InputError(
                f"{home} holds another demo (of the other size, or of another version of Python or "
                "Rekindle); give another --out, or remove it"
            )


# --- the start model ------------------------------------------------------------------------------


def _make_start(made: Path, settings: DemoSettings, progress: Progress) -> None:
    """The text, the tasks, and the start model, pre-trained on that text."""
    warm_up()  # while the documents are read
    if not (made / "corpus.jsonl").exists():
        from rekindle.data.corpus.python_docs import python_docs

        with progress.task("documents", unit="documents") as task:
            pages = list(python_docs())
            write_corpus(pages, settings.sizes, made, settings.documents)
            task.advance(len(pages))
    write_text(made / "base.yaml", dump_config(start_config(made, settings)))
    run_jobs(start_jobs(made, settings), made / "log", progress)


def start_jobs(made: Path, settings: DemoSettings) -> list[Job]:
    """What makes the start model: its tokenizer, its training, and what it says of the text."""
    model, base, cached = made / "model", made / "base", made / "cached.json"
    bert = SETTINGS.bert | {"max_position_embeddings": SETTINGS.sequence_length}
    shape = (made / "corpus.jsonl", model, settings.vocabulary, bert)
    run = made / "base.yaml"
    trained = base / "run.yaml"
    steps = int(settings.base["steps"])
    return [
        Job("tokenizer", make_model, shape, output=model, steps=1),
        Job("base", pretrain, (run, base), trained, after=("tokenizer",), steps=steps),
        Job(f"cache {LM}", cache, (run, (), cached), output=cached, after=("base",)),
    ]


def start_config(made: Path, settings: DemoSettings) -> RunConfig:
    """The run that trains the start model, and then has it as a teacher."""
    targets = {"kind": "topk", "k": 16, "temperatures": [1.0]}
    teacher = {"name": LM, "model": str(made / "base"), "task": "masked_lm", "targets": targets}
    values = _shared(made, settings) | {
        "teachers": [teacher],
        "student": {"model": str(made / "model"), "from_scratch": True},
        "train": _train(settings.base),
    }
    return parse_settings(RunConfig, values, "the demo's start model")


def _shared(made: Path, settings: DemoSettings) -> dict[str, object]:
    """The text and its cache, which the start model and the cycle have in common."""
    return {
        "corpus": {
            "source": [str(made / "corpus.jsonl")],
            "domain_field": "domain",
            "tokenizer": str(made / "model"),
            "sequence_length": SETTINGS.sequence_length,
        },
        "cache": {
            "path": str(made.parent / "cache"),
            "sequences_per_shard": 1024,
            "replicas": settings.replicas,
            "seed": SETTINGS.seed,
        },
    }


def _train(values: Mapping[str, int | float]) -> dict[str, int | float]:
    shared = {"seed": SETTINGS.seed, "batch_sequences": SETTINGS.batch_sequences, "held_out": 0.03}
    return {**shared, **values}


# --- the cycle ------------------------------------------------------------------------------------


def cycle_config(home: Path, settings: DemoSettings) -> CycleConfig:
    """The cycle: two students of the start model, with and without the three tasks' experts."""
    made = home / MADE
    tasks = [
        {
            "name": task.name,
            "about": task.question,
            "pairs": "same-document" if task.paired else None,
            **{
                split: str(made / TASKS_FOLDER / task.name / f"{split}.jsonl")
                for split in ("train", "dev", "test")
            },
        }
        for task in TASKS
    ]
    values = _shared(made, settings) | {
        "about": ABOUT,
        "student": {"model": str(made / "base")},
        "train": _train(settings.student),
        "tasks": tasks,
        "arms": ["mlm", "mixture"],
        "finetune": {
            "epochs": settings.epochs,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "max_length": SETTINGS.sequence_length,
        },
        "seeds": settings.seeds,
    }
    return parse_settings(CycleConfig, values, "the demo")
