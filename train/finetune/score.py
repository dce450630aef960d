"""Scores what is there, without training: an expert, a student's task head, experts together."""

import time
from pathlib import Path

from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import new_folder
from rekindle.train.finetune.classifier import evaluate
from rekindle.train.finetune.config import FinetuneConfig, MergeConfig
from rekindle.train.finetune.expert_outputs import expert_output, head_of, names_for, student_logits
from rekindle.train.finetune.merge_baselines import bare_names, merge_scores, scores_by_name
from rekindle.train.finetune.metrics import all_scores, chosen_metric
from rekindle.train.finetune.result import FinetuneResult, SeedResult, check_out
from rekindle.train.finetune.run import finetune
from rekindle.train.finetune.task_data import TaskData, read_task
from rekindle.train.model.files import quiet_transformers, resolve_model
from rekindle.train.student import ABOUT_FILE, Student

Scores = dict[str, float]


def finetune_or_score(
    model: str,
    train: str,
    dev: str,
    out: str,
    *,
    seeds: int = 1,
    metric: str | None = None,
    config: FinetuneConfig,
) -> FinetuneResult:
    """``finetune``, or with ``epochs: 0``, where nothing is trained, ``score_model``."""
    if config.epochs:
        return finetune(model, train, dev, out, seeds=seeds, metric=metric, config=config)
    if seeds != 1:
        raise InputError(
            "with epochs=0 nothing is trained, so there are no --seeds; leave them out"
        )
    return score_model(model, train, dev, out, metric=metric, config=config)


def score_model(
    model: str, train: str, dev: str, out: str, *, metric: str | None = None, config: FinetuneConfig
) -> FinetuneResult:
    """Score ``model`` on the file ``dev``; ``out`` receives ``metrics.json`` and no model.

    ``model`` is a student's directory, whose task head ``config.head`` is scored, or an expert's.
    With ``config.merge``, ``baselines`` are the scores of every expert and of every way to merge
    them; an expert ``model`` is the first of them. ``train`` says what the labels mean: give the
    same file where there is no other. Classes are matched by name.

    Raises InputError for wrong files, models, metrics, or an ``out`` that holds a model.
    """
    started = time.perf_counter()
    _check_target(Path(out), [model, *(config.merge.experts if config.merge else ())])
    data = read_task(train, dev)[1]
    metric = chosen_metric(metric, data.problem)
    is_student = (resolve_model(model) / ABOUT_FILE).is_file()
    baselines = None
    if config.merge is not None:
        baselines = _baselines(model, is_student, data, config, config.merge)
        scores = next(iter(baselines.values()))
    else:
        scores = _scores(model, is_student, data, config)
    seconds = time.perf_counter() - started
    files, only = {"train": train, "dev": dev}, SeedResult(0, scores, None, [], seconds)
    about = (config, "fp32", seconds, baselines)
    result = FinetuneResult.of(model, files, data, metric, [only], *about)
    with new_folder(Path(out).resolve()) as staging:
        result.save(staging)
    return result


def baselines_table(baselines: dict[str, Scores]) -> str:
    """One line for each way to merge, its scores in columns."""
    metrics = list(next(iter(baselines.values())))
    width = max(map(len, baselines))
    lines = [" " * width + "".join(f"  {metric:>9}" for metric in metrics)]
    for way, scores in baselines.items():
        lines.append(f"{way:{width}}" + "".join(f"  {scores[m]:9.4f}" for m in metrics))
    return "\n".join(lines)


def _check_target(out: Path, models: list[str]) -> None:
    check_out(out)
    if (out / "config.json").exists():
        raise InputError(
            f"{str(out)!r} holds a model, which the scores alone would replace; give another --out"
        )
    if any(Path(model).resolve() == out.resolve() for model in models):
        raise InputError(f"{str(out)!r} is the model that is scored; give another --out")


def _scores(model: str, is_student: bool, data: TaskData, config: FinetuneConfig) -> Scores:
    if is_student:
        return _student_scores(model, data, config)[1]
    if config.head is not None:
        raise InputError(
            f"head is for students with task heads, and {model!r} is none: leave it out"
        )
    return evaluate(model, data, max_length=config.max_length, batch_size=config.batch_size)[0]


def _student_scores(directory: str, data: TaskData, config: FinetuneConfig) -> tuple[str, Scores]:
    """The name of the head that was scored, and its scores."""
    path = str(resolve_model(directory))
    with quiet_transformers():
        student = Student.from_pretrained(path)
    name, head = head_of(student, config.head, directory)
    logits = student_logits(student, name, path, data, config.max_length, config.batch_size)
    if head.problem == "regression" and not data.label_names:
        return name, all_scores("regression", logits, data.labels)
    if head.problem in ("regression", "multi_label_classification"):
        raise InputError(
            f"the head {name!r} of {directory!r} is a {head.problem}; the task has labels of "
            "another kind: give the task it was taught"
        )
    names = bare_names(head.label_names, name.split("+"))
    return name, scores_by_name(logits, names, data, f"the head {name!r} of {directory!r}")


def _baselines(
    model: str, is_student: bool, data: TaskData, config: FinetuneConfig, merge: MergeConfig
) -> dict[str, Scores]:
    """The scores of the student, each expert, each way to merge them, and of the oracle."""
    found: dict[str, Scores] = {}
    if is_student:
        head, found_scores = _student_scores(model, data, config)
        found[f"student, head {head}"] = found_scores
    models = [*([] if is_student else [model]), *merge.experts]
    sizes = {"max_length": config.max_length, "batch": config.batch_size}
    outputs = [
        expert_output(name, directory, data, merge.passes, merge.seed, **sizes)
        for name, directory in zip(names_for(models), models, strict=True)
    ]
    means = {o.info.name: o.mc_probs for o in outputs if o.mc_probs is not None}
    found |= merge_scores(
        [o.info for o in outputs],
        {o.info.name: o.logits for o in outputs},
        means if merge.passes else None,
        data,
        merge.labels,
        merge.sharpness,
    )
    if merge.oracle is not None:
        found["oracle"] = evaluate(merge.oracle, data, max_length=config.max_length)[0]
    return found
