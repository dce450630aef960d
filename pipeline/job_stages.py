"""What the jobs of the demo do. Each calls what a command of the pipeline calls, and nothing else.

torch is imported within the jobs only: the demo's own process has no use for it.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from rekindle.pipeline.config import RunConfig, load_config
from rekindle.pipeline.demo_model import write_model
from rekindle.pipeline.jobs import Report, StepReports


def make_model(
    corpus: Path, out: Path, vocabulary: int, config: dict[str, Any], report: Report
) -> None:
    """A tokenizer trained on the corpus, and a model's configuration, in ``out``."""
    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    write_model(texts, vocabulary, config, out)
    report(1)


def train(config_file: Path, out: Path, report: Report) -> None:
    """``pipeline train-student --resume``."""
    from rekindle.pipeline.train_student import train_from_config

    train_from_config(load_config(config_file), out, resume=True, progress=StepReports(report))


def pretrain(config_file: Path, out: Path, report: Report) -> None:
    """``pipeline cache-teachers`` without teachers, for corpus and masks; then ``train``."""
    from rekindle.pipeline.cache_teachers import cache_teachers

    cache_teachers(load_config(config_file))
    train(config_file, out, report)


def fine_tune(
    model: Path, task: Path, out: Path, seeds: int, values: dict[str, Any], report: Report
) -> None:
    """``pipeline finetune`` on the files of a task, with the test split scored for every seed."""
    from rekindle.train.finetune import finetune
    from rekindle.train.finetune_config import FinetuneConfig

    train, dev, test = (str(task / f"{split}.jsonl") for split in ("train", "dev", "test"))
    finetune(
        str(model), train, dev, str(out), seeds=seeds, test=test, config=FinetuneConfig(**values)
    )
    report(1)


def cache_teacher(config_file: Path, name: str, cost_file: Path, report: Report) -> None:
    """``pipeline cache-teachers --teacher NAME``, timed: the seconds go to ``cost_file``.

    An interrupted teacher is begun anew, although the command would go on: half a run has no time
    to report.
    """
    from rekindle.pipeline.cache_teachers import cache_teachers

    config = load_config(config_file)
    shutil.rmtree(Path(config.cache.path) / "targets" / name, ignore_errors=True)
    began = time.perf_counter()
    cache_teachers(config, [name], progress=StepReports(report))
    cost = {"once": time.perf_counter() - began}
    cost["live_per_sequence"] = _forward_seconds(config, name)
    cost_file.parent.mkdir(exist_ok=True)
    temporary = cost_file.with_suffix(".tmp")
    temporary.write_text(json.dumps(cost) + "\n", encoding="utf-8")
    temporary.replace(cost_file)


def _forward_seconds(config: RunConfig, name: str) -> float:
    """Seconds per sequence of the teacher's forward passes alone, over the first shard.

    That is the least it would cost beside a student: stage 1 sorts its batches by length, which a
    student's shuffled batches are not.
    """
    from rekindle.data.corpus import Corpus
    from rekindle.data.store import open_store
    from rekindle.pipeline.cache_teachers import build_views, view_of
    from rekindle.pipeline.progress import Progress
    from rekindle.pipeline.run_teacher import Unit, run_unit
    from rekindle.pipeline.teachers import Teacher, plan_teacher

    corpus = Corpus(open_store(config.cache.path))
    views = build_views(corpus, config, Progress.silent())
    chosen = next(teacher for teacher in config.teachers if teacher.name == name)
    pairs = views.pairs.get(chosen.pairs or "")
    plan = plan_teacher(chosen, corpus, views.masked, pairs, config.cache.seed)
    teacher, view = Teacher(plan, corpus), view_of(plan.info, corpus)
    began = time.perf_counter()
    run_unit(teacher, corpus, view, Unit(0, 0 if chosen.vocabulary else None))
    return (time.perf_counter() - began) / corpus.commits[0].rows
