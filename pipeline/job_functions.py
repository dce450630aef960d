"""Functions of jobs: each does what a command of the pipeline does, and reports its steps.

``fine_tune`` uses the settings that ``search`` found best on dev. torch is imported only inside the
functions: the process that starts the jobs does not need it.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import new_folder, remove, write_json
from rekindle.pipeline.config import load_config
from rekindle.pipeline.processes.jobs import Report, StepReports
from rekindle.train.finetune.config import FinetuneConfig


def train(config_file: Path, out: Path, report: Report) -> None:
    """Run ``pipeline train-student --resume``."""
    from rekindle.pipeline.train_student import train_from_config

    train_from_config(load_config(config_file), out, resume=True, progress=StepReports(report))


def pretrain(config_file: Path, out: Path, report: Report) -> None:
    """Run ``pipeline cache-teachers`` without teachers, for corpus and masks; then ``train``."""
    from rekindle.pipeline.caching.cache_teachers import cache_teachers

    cache_teachers(load_config(config_file).model_copy(update={"teachers": ()}))
    train(config_file, out, report)


def cache(config_file: Path, names: Sequence[str], marker: Path, report: Report) -> None:
    """Run ``pipeline cache-teachers`` for the teachers ``names`` (empty: all of the file).

    Makes only what is missing, so an interrupted job continues. ``marker`` is written at the end.
    """
    from rekindle.pipeline.caching.cache_teachers import cache_teachers

    start_time = time.perf_counter()
    cache_teachers(load_config(config_file), names, progress=StepReports(report))
    write_json(marker, {"seconds_of_last_call": time.perf_counter() - start_time})


def count_held_texts(config_file: Path, tests: Sequence[Path], out: Path, report: Report) -> None:
    """Count the records of a cached text that contain a text of ``tests``, and those left out for
    that reason; neither if the text is gone.
    """
    from rekindle.data.corpus.corpus import Corpus
    from rekindle.data.source.documents import read_documents
    from rekindle.data.source.held_texts import HeldCounts, HeldTexts, find_held
    from rekindle.data.source.left_out import LeftOut
    from rekindle.data.storage.store import open_store

    config = load_config(config_file)
    text, corpus = config.corpus, Corpus(open_store(config.cache.path))
    is_removed = {*map(str, tests)} <= {*text.without}
    counts: dict[str, object] = corpus.held._asdict()
    if not is_removed:
        tests_alone = {"without": tuple(map(str, tests)), "without_fields": ()}
        tests_held = text.model_copy(update=tests_alone).held_texts() or HeldTexts(())
        left_out = LeftOut(held_texts=text.held_texts())
        arguments = (text.text_field, text.domain_field, left_out, text.pair_field)
        try:
            all_documents = read_documents(text.places, *arguments, group_field=text.group_field)
            documents = islice(all_documents, corpus.documents)
            counts = find_held(tests_held, (document.texts for document in documents))._asdict()
        except InputError:
            counts = dict.fromkeys(HeldCounts._fields)
    write_json(out, counts | {"removed": is_removed})


def save_start(model: str, out: Path, report: Report) -> None:
    """Save ``model`` as a masked LM, as students start from it.

    A pooler or classifier's head is dropped, so that no arm starts better than another.
    """
    import torch

    from rekindle.data.corpus.tokenizer import load_tokenizer
    from rekindle.train.model.files import load_language_model
    from rekindle.train.model.folder import resolve_model, tokenizer_folder

    directory = resolve_model(model)
    with new_folder(out) as staging:
        torch.manual_seed(0)  # for a missing LM head, which no classifier uses
        load_language_model(directory, "masked_lm").save_pretrained(staging)
        load_tokenizer(str(tokenizer_folder(directory))).save(staging)


@dataclass(frozen=True)
class FineTuning:
    """One or more fine-tunings of the model in a directory, on the files in a ``task``'s folder.

    ``keep_every``: keep the model of every seed, for a committee.
    """

    model: Path
    task: Path
    out: Path
    seeds: range
    metric: str | None = None
    keep_every: bool = False


def search(tuning: FineTuning, config: FinetuneConfig, report: Report) -> None:
    """Run one point of a search: ``pipeline finetune`` without test. Only its scores are kept."""
    model_folder = tuning.out / "model"  # beside it, an interrupted search keeps its finished seeds
    if not (model_folder / "metrics.json").exists():
        tuning.out.mkdir(parents=True, exist_ok=True)
        _finetune(tuning, model_folder, config, report)
    (model_folder / "metrics.json").rename(tuning.out / "metrics.json")
    remove(model_folder)


def fine_tune(
    tuning: FineTuning, candidates: Sequence[tuple[FinetuneConfig, Path]], report: Report
) -> None:
    """Run ``pipeline finetune`` with the settings among ``candidates`` that scored best on dev.

    Each candidate names the metrics.json with its mean score, which is read if there are several;
    of equals, the first wins. Every seed is scored on test.
    """
    config = candidates[0][0]
    if len(candidates) > 1:
        means = [json.loads(path.read_text(encoding="utf-8"))["mean"] for _, path in candidates]
        config = candidates[means.index(max(means))][0]
    _finetune(tuning, tuning.out, config, report, test=str(tuning.task / "test.jsonl"))


def _finetune(
    tuning: FineTuning, out: Path, config: FinetuneConfig, report: Report, test: str | None = None
) -> None:
    from rekindle.train.finetune.run import finetune

    train, dev = (str(tuning.task / f"{split}.jsonl") for split in ("train", "dev"))
    finetune(
        *(str(tuning.model), train, dev, str(out)),
        seeds=len(tuning.seeds),
        first_seed=tuning.seeds.start,
        seed_stride=tuning.seeds.step,
        keep_every=tuning.keep_every,
        metric=tuning.metric,
        test=test,
        config=config,
        force=True,
        report=report.note,
    )


def score_head(tuning: FineTuning, config: FinetuneConfig, report: Report) -> None:
    """Score on dev and test the head that a task's experts left in a student, as ``pipeline
    evaluate`` does, without training. ``seeds`` holds the student's number.

    ``config`` says what the files mean, and how long a text may be. Raise InputError if the student
    in ``tuning.model`` has no such head, or several.
    """
    from rekindle.train.answers.score import score_model
    from rekindle.train.student import saved_heads

    task = tuning.task.name
    saved = [*saved_heads(tuning.model)]
    heads = [name for name in saved if _is_of(name, task)]
    if len(heads) != 1:
        raise InputError(
            f"{tuning.model} has the heads {', '.join(saved)} for the task {task}, and exactly one "
            "can be scored"
        )
    train, dev, test = (str(tuning.task / f"{split}.jsonl") for split in ("train", "dev", "test"))
    score_model(
        *(str(tuning.model), train, dev, str(tuning.out)),
        test=test,
        metric=tuning.metric,
        seed=tuning.seeds.start,
        config=config.model_copy(update={"epochs": 0, "head": heads[0]}),
        force=True,
    )


def _is_of(head: str, task: str) -> bool:
    """Return whether a head belongs to the expert on ``task``, or to several seeds of it (TASK.0,
    …).
    """
    return all(re.fullmatch(rf"{re.escape(task)}(\.\d+)?", name) for name in head.split("+"))
