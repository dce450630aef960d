"""The functions of jobs: each does what a command of the pipeline does, and reports its steps.

torch is imported within the functions only: the process that starts the jobs has no use for it.
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rekindle.data.storage.atomic import new_files, new_folder, write_json
from rekindle.pipeline.config import RunConfig, load_config
from rekindle.pipeline.processes.jobs import Report, StepReports
from rekindle.pipeline.tiny_model import write_model


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
    from rekindle.pipeline.caching.cache_teachers import cache_teachers

    cache_teachers(load_config(config_file))
    train(config_file, out, report)


def cache(config_file: Path, only: Sequence[str], marker: Path, report: Report) -> None:
    """``pipeline cache-teachers`` of the teachers ``only`` (none named: all of the file): what
    is missing of them, so that an interrupted one goes on. ``marker`` says that it is done.
    """
    from rekindle.pipeline.caching.cache_teachers import cache_teachers

    began = time.perf_counter()
    cache_teachers(load_config(config_file), only, progress=StepReports(report))
    write_json(marker, {"seconds_of_last_call": time.perf_counter() - began})


def save_start(model: str, out: Path, report: Report) -> None:
    """``model`` as a masked LM, which is how students take it over: without a pooler or a
    classifier's head that it may have, so that no arm has a better start than another.
    """
    import torch

    from rekindle.data.corpus.tokenizer import load_tokenizer
    from rekindle.train.model.files import resolve_model
    from rekindle.train.model.load import load_language_model

    directory = resolve_model(model)
    with new_folder(out) as staging:
        torch.manual_seed(0)  # of a missing LM head, which no classifier uses
        load_language_model(directory, "masked_lm").save_pretrained(staging)
        load_tokenizer(str(directory)).save(staging)
    report(1)


def fine_tune(
    model: Path, task: Path, out: Path, seeds: int, values: dict[str, Any], report: Report
) -> None:
    """``pipeline finetune`` on the files of a task, with the test split scored for every seed."""
    from rekindle.train.finetune.config import FinetuneConfig
    from rekindle.train.finetune.run import finetune

    train, dev, test = (str(task / f"{split}.jsonl") for split in ("train", "dev", "test"))
    finetune(
        str(model), train, dev, str(out), seeds=seeds, test=test, config=FinetuneConfig(**values)
    )
    report(1)


def search(
    model: str,
    task: Path,
    out: Path,
    seeds: range,
    metric: str,
    values: dict[str, Any],
    report: Report,
) -> None:
    """One point of a search: ``pipeline finetune`` without test; its scores alone are kept."""
    from rekindle.train.finetune.config import FinetuneConfig
    from rekindle.train.finetune.run import finetune

    with new_files(out) as folder:
        finetune(
            model,
            str(task / "train.jsonl"),
            str(task / "dev.jsonl"),
            str(folder / "model"),
            seeds=len(seeds),
            first_seed=seeds.start,
            metric=metric,
            config=FinetuneConfig(**values),
        )
        (folder / "model" / "metrics.json").rename(folder / "metrics.json")
    report(1)


def fine_tune_best(
    model: str,
    task: Path,
    out: Path,
    seeds: int,
    metric: str,
    tried: list[tuple[dict[str, Any], Path]],
    report: Report,
) -> None:
    """``pipeline finetune`` with those of the settings ``tried`` whose mean score on dev was best
    (the first of equals), test scored for every seed.
    """
    from rekindle.train.finetune.config import FinetuneConfig
    from rekindle.train.finetune.run import finetune

    train, dev, test = (str(task / f"{split}.jsonl") for split in ("train", "dev", "test"))
    values = tried[0][0]
    if len(tried) > 1:
        means = [json.loads(path.read_text(encoding="utf-8"))["mean"] for _, path in tried]
        values = tried[means.index(max(means))][0]
    config = FinetuneConfig(**values)
    finetune(model, train, dev, str(out), seeds=seeds, metric=metric, test=test, config=config)
    report(1)


def cache_teacher(config_file: Path, name: str, cost_file: Path, report: Report) -> None:
    """``pipeline cache-teachers --teacher NAME``, timed: the seconds go to ``cost_file``.

    An interrupted teacher is begun anew, although the command would go on: half a run has no time
    to report.
    """
    from rekindle.pipeline.caching.cache_teachers import cache_teachers

    config = load_config(config_file)
    shutil.rmtree(Path(config.cache.path) / "targets" / name, ignore_errors=True)
    began = time.perf_counter()
    cache_teachers(config, [name], progress=StepReports(report))
    cost = {"once": time.perf_counter() - began}
    cost["live_per_sequence"] = _forward_seconds(config, name)
    write_json(cost_file, cost)


def _forward_seconds(config: RunConfig, name: str) -> float:
    """Seconds per sequence of the teacher's forward passes alone, over the first shard.

    That is the least it would cost beside a student: stage 1 sorts its batches by length, which a
    student's shuffled batches are not.
    """
    from rekindle.data.corpus.corpus import Corpus
    from rekindle.data.storage.store import open_store
    from rekindle.pipeline.caching.cache_teachers import build_views, view_of
    from rekindle.pipeline.caching.run_teacher import Unit, run_unit
    from rekindle.pipeline.caching.teachers import Teacher, plan_teacher
    from rekindle.pipeline.progress import Progress

    corpus = Corpus(open_store(config.cache.path))
    views = build_views(corpus, config, Progress.silent())
    chosen = next(teacher for teacher in config.teachers if teacher.name == name)
    pairs = views.pairs.get(chosen.pairs or "")
    plan = plan_teacher(chosen, corpus, views.masked, pairs, config.cache.seed)
    teacher, view = Teacher(plan, corpus), view_of(plan.info, corpus)
    began = time.perf_counter()
    run_unit(teacher, corpus, view, Unit(0, 0 if chosen.vocabulary else None))
    return (time.perf_counter() - began) / corpus.commits[0].rows
