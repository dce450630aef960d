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


def cache(config_file: Path, only: Sequence[str], marker: Path, report: Report) -> None:
    """Run ``pipeline cache-teachers`` for the teachers ``only`` (empty: all of the file).

    Makes only what is missing, so an interrupted job continues. ``marker`` is written at the end.
    """
    from rekindle.pipeline.caching.cache_teachers import cache_teachers

    began = time.perf_counter()
    cache_teachers(load_config(config_file), only, progress=StepReports(report))
    write_json(marker, {"seconds_of_last_call": time.perf_counter() - began})


def count_held(config_file: Path, tests: Sequence[Path], out: Path, report: Report) -> None:
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
    removed = {*map(str, tests)} <= {*text.without}
    found: dict[str, object] = corpus.held._asdict()
    if not removed:
        asked = {"without": tuple(map(str, tests)), "without_fields": ()}
        held = text.model_copy(update=asked).held_texts() or HeldTexts(())
        left_out = LeftOut(held_texts=text.held_texts())
        fields = (text.text_field, text.domain_field, left_out, text.pair_field)
        try:
            found_texts = read_documents(text.places, *fields, group_field=text.group_field)
            documents = islice(found_texts, corpus.documents)
            found = find_held(held, (one.texts for one in documents))._asdict()
        except InputError:
            found = dict.fromkeys(HeldCounts._fields)
    write_json(out, found | {"removed": removed})


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


def search(one: FineTuning, config: FinetuneConfig, report: Report) -> None:
    """Run one point of a search: ``pipeline finetune`` without test. Only its scores are kept."""
    tuned = one.out / "model"  # beside it, an interrupted search keeps its finished seeds
    if not (tuned / "metrics.json").exists():
        one.out.mkdir(parents=True, exist_ok=True)
        _finetune(one, tuned, config, report)
    (tuned / "metrics.json").rename(one.out / "metrics.json")
    remove(tuned)


def fine_tune(
    one: FineTuning, tried: Sequence[tuple[FinetuneConfig, Path]], report: Report
) -> None:
    """Run ``pipeline finetune`` with the settings in ``tried`` that scored best on dev.

    The mean scores are in the metrics.json beside the settings; of equals, the first wins. Every
    seed is scored on test.
    """
    config = tried[0][0]
    if len(tried) > 1:
        means = [json.loads(path.read_text(encoding="utf-8"))["mean"] for _, path in tried]
        config = tried[means.index(max(means))][0]
    _finetune(one, one.out, config, report, test=str(one.task / "test.jsonl"))


def _finetune(
    one: FineTuning, out: Path, config: FinetuneConfig, report: Report, test: str | None = None
) -> None:
    from rekindle.train.finetune.run import finetune

    train, dev = (str(one.task / f"{split}.jsonl") for split in ("train", "dev"))
    finetune(
        *(str(one.model), train, dev, str(out)),
        seeds=len(one.seeds),
        first_seed=one.seeds.start,
        step=one.seeds.step,
        keep_every=one.keep_every,
        metric=one.metric,
        test=test,
        config=config,
        force=True,
        report=report.note,
    )


def score_head(one: FineTuning, config: FinetuneConfig, report: Report) -> None:
    """Score on dev and test the head that a task's experts left in a student, as ``pipeline
    evaluate`` does, without training. ``seeds`` holds the student's number.

    ``config`` says what the files mean, and how long a text may be. Raise InputError if the student
    in ``one.model`` has no such head, or several.
    """
    from rekindle.train.answers.score import score_model
    from rekindle.train.student import saved_heads

    task = one.task.name
    there = [*saved_heads(one.model)]
    heads = [name for name in there if _is_of(name, task)]
    if len(heads) != 1:
        raise InputError(
            f"{one.model} has the heads {', '.join(there)} for the task {task}, and exactly one "
            "can be scored"
        )
    train, dev, test = (str(one.task / f"{split}.jsonl") for split in ("train", "dev", "test"))
    score_model(
        *(str(one.model), train, dev, str(one.out)),
        test=test,
        metric=one.metric,
        seed=one.seeds.start,
        config=config.model_copy(update={"epochs": 0, "head": heads[0]}),
        force=True,
    )


def _is_of(head: str, task: str) -> bool:
    """Return whether a head belongs to the expert on ``task``, or to several seeds of it (TASK.0,
    …).
    """
    return all(re.fullmatch(rf"{re.escape(task)}(\.\d+)?", name) for name in head.split("+"))
