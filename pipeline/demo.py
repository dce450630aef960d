"""The demo: run the cycle demo.yaml on text that every Python installation has, without downloads.

  OUT/demo.json    identifies the demo
  OUT/made/        passages, labelled tasks, and the start model, made from nothing
  OUT/…            the cycle, see cycle/run.py

The cache also holds a masked-LM teacher beside the experts. It teaches nobody; it is there for
``pipeline inspect`` to show.
"""

import os
import platform
from collections.abc import Mapping
from pathlib import Path

from rekindle.data.cores import cores
from rekindle.data.errors import InputError
from rekindle.data.settings import Settings, parse_settings
from rekindle.data.storage.atomic import write_json, write_text
from rekindle.pipeline.builtin.settings import SETTINGS
from rekindle.pipeline.builtin.tasks import TASKS, TaskSizes, unlabelled_passages, write_corpus
from rekindle.pipeline.config import RunConfig, dump_config, read_values, with_directories
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.run import run_cycle
from rekindle.pipeline.cycle.scores import CycleResults
from rekindle.pipeline.job_functions import cache, pretrain
from rekindle.pipeline.processes.jobs import MOST_WORKERS, Job, run_counted
from rekindle.pipeline.processes.worker import Place, warm_up
from rekindle.pipeline.progress import Progress
from rekindle.pipeline.untrained_model import make_model
from rekindle.train.record.run_folder import is_continued, open_folder, read_record

DEMO_FILE = "demo.json"  # marks the directory of a demo, and identifies it
WRITER = "rekindle demo"
MADE_FOLDER = "made"
LM_NAME = "base-lm"  # the start model as a masked-LM teacher
# both classify single passages
DEMO_TASKS = tuple(task for task in TASKS if task.name in ("part", "kind"))
_ONE_SEED = (
    "One seed (--quick) says nothing about chance: `pipeline demo` scores five, and shows the "
    "interval"
)

_ONE_STUDENT = (
    "The seeds are fine-tunings of one student of each kind: no interval covers how much another "
    "pre-training would change"
)


class DemoSettings(Settings):
    """The size of a demo."""

    vocabulary: int
    documents: int | None  # maximum of the unlabelled corpus
    sizes: TaskSizes
    base: Mapping[str, int | float]  # for the start model's `train` section
    overrides: tuple[str, ...] = ()  # for the cycle's file, as with --set
    about: str = ""  # added to the report's description


FULL = DemoSettings(
    vocabulary=4000,
    documents=None,
    sizes=TaskSizes(train=200, dev=240, test=1440),
    base={"steps": 1200, "learning_rate": 2e-3, "evaluate_every": 400},
)
QUICK = DemoSettings(
    vocabulary=SETTINGS.vocabulary,
    documents=SETTINGS.documents,
    sizes=TaskSizes(train=160, dev=80, test=400),
    base=SETTINGS.pretrain,
    about=f" {_ONE_SEED}.",
    overrides=(
        "cache.replicas=2",
        "train.steps=80",
        "train.warmup_steps=20",
        "train.evaluate_every=20",
        "experts.seeds=2",
        "finetune.epochs=6",
        "seeds=1",
    ),
)


def run_demo(out: Path, quick: bool, progress: Progress) -> CycleResults:
    """Run what is not finished of the demo in ``out``; return the results.

    Raise InputError if ``out`` holds something else, including another demo.
    """
    settings = QUICK if quick else FULL
    home = Path(os.path.abspath(out))
    # The corpus belongs to this Python: its documentation differs between versions.
    identity = {
        "written_by": WRITER,
        "python": platform.python_version(),
        "settings": settings.model_dump(mode="json"),
    }
    with open_folder(home, lambda: _check_folder(home, identity)):
        write_json(home / DEMO_FILE, identity)
        _make_start(home, settings, progress)
    # One thread each, so that results do not depend on the number of cores.
    places = [Place(None, 1)] * min(cores(), MOST_WORKERS)
    allowed = (DEMO_FILE, MADE_FOLDER, "cache")
    config = cycle_config(home, settings)
    return run_cycle(config, home, places=places, beside=allowed, progress=progress)


def cycle_config(home: Path, settings: DemoSettings) -> CycleConfig:
    """Return the cycle: students of the start model, with and without the tasks' experts."""
    values = read_values(Path(__file__).with_suffix(".yaml"), list(settings.overrides))
    values["about"] = f"{values['about']}{settings.about}"
    return parse_settings(CycleConfig, with_directories(values, {"out": str(home)}), "the demo")


def _check_folder(home: Path, identity: Mapping[str, object]) -> None:
    """Check that the directory is free, or holds this very demo."""
    is_begun = is_continued(home, DEMO_FILE, "demo", resume=True)
    if is_begun and read_record(home / DEMO_FILE, "give another --out") != identity:
        raise InputError(
            f"{home} holds another demo (of the other size, or of another version of Python or "
            "Rekindle); give another --out, or remove it"
        )


def closing_lines(results: CycleResults) -> list[str]:
    """Return the result of the primary comparison, with its number of seeds."""
    if (primary := results.primary) is None:
        return []
    place = f"the mean over {len(results.tasks)} tasks"
    lines = [f"what guidance changed on test, on {place}, in points of 100:"]
    seeds = 1
    for difference in primary.differences:
        line = f"  {difference.arm} over {difference.against}: {100 * difference.mean:+.2f}"
        if (seeds := difference.n) > 1:
            line += (
                f" [{difference.interval}], higher in {difference.higher} of {difference.n} seeds"
            )
        lines.append(line)
    lines.append(f"{_ONE_SEED if seeds == 1 else _ONE_STUDENT}.")
    return lines


# --- the start model ------------------------------------------------------------------------------


def _make_start(home: Path, settings: DemoSettings, progress: Progress) -> None:
    """Make the text, the tasks, and the start model, pre-trained on that text."""
    made_folder = home / MADE_FOLDER
    warm_up()  # while the documents are read
    if not (made_folder / "corpus.jsonl").exists():
        from rekindle.data.source.python_docs import python_docs

        with progress.task("documents", unit="documents") as task:
            pages = list(python_docs())
            sizes, max_documents = settings.sizes, settings.documents
            write_corpus(pages, sizes, made_folder, max_documents, DEMO_TASKS, unlabelled_passages)
            task.advance(len(pages))
    write_text(made_folder / "base.yaml", dump_config(start_config(home, settings)))
    run_counted(start_jobs(made_folder, settings), made_folder / "log", progress)


def start_jobs(made_folder: Path, settings: DemoSettings) -> list[Job]:
    """Return the jobs for the start model: its tokenizer, its training, and its targets."""
    model, base, marker = made_folder / "model", made_folder / "base", made_folder / "cached.json"
    bert = SETTINGS.bert | {"max_position_embeddings": SETTINGS.sequence_length}
    arguments = (made_folder / "corpus.jsonl", model, settings.vocabulary, bert)
    run, steps = made_folder / "base.yaml", int(settings.base["steps"])
    return [
        Job("tokenizer", make_model, arguments, output=model),
        Job("base", pretrain, (run, base), base / "run.yaml", after=("tokenizer",), steps=steps),
        Job(f"cache {LM_NAME}", cache, (run, (), marker), output=marker, after=("base",)),
    ]


def start_config(home: Path, settings: DemoSettings) -> RunConfig:
    """Return the run that trains the start model on the cycle's text and cache, and then uses it as
    a teacher.
    """
    made_folder, cycle = home / MADE_FOLDER, cycle_config(home, settings)
    targets = {"kind": "topk", "k": 16, "temperatures": [1.0]}
    shared_values = cycle.train.model_dump(include={"seed", "batch_sequences", "held_out"})
    values = {
        "corpus": cycle.corpus_of(""),
        "cache": cycle.cache.model_dump(),
        "teachers": [
            {
                "name": LM_NAME,
                "model": str(made_folder / "base"),
                "task": "masked_lm",
                "targets": targets,
            }
        ],
        "student": {"model": str(made_folder / "model"), "from_scratch": True},
        "train": {**shared_values, **settings.base},
    }
    return parse_settings(RunConfig, values, "the demo's start model")
