"""Score models without training: an expert, a student's task head, several experts together."""

import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax

from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import new_folder
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.answers.config import AskConfig
from rekindle.train.answers.judge import Expert, Judge, judge_texts, open_judge
from rekindle.train.answers.watch import NOBODY, Watch
from rekindle.train.finetune.classifier import predict
from rekindle.train.finetune.config import NOTHING_KEPT, FinetuneConfig, less_memory
from rekindle.train.finetune.encoded import log_cut_texts
from rekindle.train.finetune.merge_baselines import merge_scores, scores_by_name
from rekindle.train.finetune.metrics import chosen_metric, log_undefined_scores, scores_of
from rekindle.train.finetune.result import FinetuneResult, SeedResult, check_out
from rekindle.train.finetune.task_data import TaskData, read_task
from rekindle.train.model.files import place
from rekindle.train.model.folder import resolve_model
from rekindle.train.outside.quiet import quiet_transformers
from rekindle.train.precision import bf16_saves
from rekindle.train.record.stored_result import upload_result
from rekindle.train.running_out import report_shortage
from rekindle.train.student import ABOUT_FILE

logger = logging.getLogger("rekindle")

Scores = dict[str, float]


def score_model(
    model: str,
    train: str,
    dev: str,
    out: str,
    *,
    test: str | None = None,
    metric: str | None = None,
    seed: int = 0,
    config: FinetuneConfig,
    force: bool = False,
) -> FinetuneResult:
    """Score ``model`` on the file ``dev``, and on ``test`` if given. ``out`` receives
    ``metrics.json`` and no model. ``seed`` is only the label under which the scores are filed.

    ``model`` is an expert's directory or a student's, whose task head ``config.head`` is scored.
    With ``config.merge``, ``baselines`` are the scores of every expert and of every way to merge
    them; an expert ``model`` is the first of them. ``train`` defines what the labels mean: give the
    same file if there is no other. Classes are matched by name.

    Raises InputError for wrong files, models, metrics, or an ``out`` that holds a model.
    """
    started = time.perf_counter()
    _check_target(Path(out), [model, *(config.merge.experts if config.merge else ())], force)
    files = {"dev": dev} | ({"test": test} if test else {})
    splits = read_task(train, *files.values(), settings=config)[1:]
    data = dict(zip(files, splits, strict=True))
    metric = chosen_metric(metric, data["dev"])
    for name, split in data.items():
        logger.info("%s: %s", files[name], split.describe())
        log_undefined_scores(files[name], split)
    placement = place(config.precision)
    bf16 = bf16_saves(placement.precision, placement.device.partition(":")[0])
    with report_shortage(Path(out), lambda: NOTHING_KEPT, less_memory(config, bf16)):
        judge = _judge(model, data["dev"], config)
        scores_by_way, cut = _scores_by_way(model, judge, data["dev"], config, "dev")
        tests = None
        if test and judge is not None:
            tests, _, cut["test"] = judged_scores(
                judge, data["test"], _ask_config(config), name="test"
            )
        elif test:
            by_way, by_expert = _scores_by_way(model, judge, data["test"], config, "test")
            tests, cut["test"] = next(iter(by_way.values())), next(iter(by_expert.values()))
    scores = next(iter(scores_by_way.values()))
    baselines = scores_by_way if config.merge is not None else None
    seconds = time.perf_counter() - started
    files, seed_result = {"train": train} | files, SeedResult(seed, scores, tests, [], seconds)
    facts = (config, "fp32", seconds, baselines)
    result = FinetuneResult.of(model, files, data, metric, [seed_result], *facts, cut=cut)
    with new_folder(Path(out).resolve()) as staging:
        result.save(staging)
    upload_result(Path(out), force)
    return result


def baselines_table(baselines: dict[str, Scores]) -> str:
    """Return one line for each way to merge, with its scores in columns."""
    metrics = [*next(iter(baselines.values()))]
    width = max(map(len, baselines))
    lines = [" " * width + "".join(f"  {metric:>9}" for metric in metrics)]
    for way, scores in baselines.items():
        lines.append(f"{way:{width}}" + "".join(f"  {scores[m]:9.4f}" for m in metrics))
    return "\n".join(lines)


def _check_target(out: Path, models: list[str], force: bool) -> None:
    if (out / "config.json").exists():
        raise InputError(
            f"{str(out)!r} holds a model, which the scores would replace; give another --out"
        )
    if any(Path(model).resolve() == out.resolve() for model in models):
        raise InputError(f"{str(out)!r} is the model being scored; give another --out")
    check_out(out, force)


def _judge(model: str, data: TaskData, config: FinetuneConfig) -> Judge | None:
    """Return the student or expert to score; None for an expert that is merged with others and
    scored among them.
    """
    if config.merge is not None and data.problem != "single_label_classification":
        raise InputError(
            f"merge is for classes that exclude each other, but the task is a {data.problem}: "
            "leave merge out, and score each model by itself"
        )
    if config.merge is None or (resolve_model(model) / ABOUT_FILE).is_file():
        return open_judge(model, config.head, data.problem)
    return None


def _ask_config(config: FinetuneConfig) -> AskConfig:
    return AskConfig(max_length=config.max_length, batch_size=config.batch_size)


def _scores_by_way(
    model: str, judge: Judge | None, data: TaskData, config: FinetuneConfig, split: str
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Return the scores of the ``judge`` on the ``split``, with ``merge`` also those of each
    expert, of each way to merge them and of the oracle; and each one's share of texts that were
    cut.
    """
    scores: dict[str, Scores] = {}
    cut: dict[str, float] = {}
    if judge is not None:
        way = "expert" if judge.head is None else f"student, head {judge.head}"
        scores[way], _, cut[split] = judged_scores(judge, data, _ask_config(config), name=split)
    if (merge := config.merge) is None:
        return scores, cut
    sizes = config.max_length, config.batch_size
    models = [*([model] if judge is None else []), *merge.experts]
    outputs = [
        expert_output(name, directory, data, merge.passes, merge.seed, *sizes)
        for name, directory in zip(names_for(models), models, strict=True)
    ]
    means = {o.info.name: o.mc_probs for o in outputs if o.mc_probs is not None}
    scores |= merge_scores(
        [o.info for o in outputs],
        {o.info.name: o.logits for o in outputs},
        means if merge.passes else None,
        data,
        merge.labels,
        merge.sharpness,
    )
    cut |= {o.info.name: o.cut for o in outputs}
    if merge.oracle is not None:
        scores["oracle"] = evaluate(merge.oracle, data, max_length=config.max_length)[0]
    return scores, cut


def evaluate(
    model: str,
    data: TaskData,
    *,
    head: str | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
) -> tuple[Scores, np.ndarray]:
    """Score an expert or a student's head: return (all fitting scores, fp32 logits [N,C] in the
    order of its outputs).

    Classes are matched by name, whatever their order; ``data`` may lack some of the model's. Raises
    InputError for a model without a trained head, with another problem or with other classes.
    """
    settings = AskConfig(max_length=max_length, batch_size=batch_size)
    return judged_scores(open_judge(model, head, data.problem), data, settings)[:2]


def judged_scores(
    judge: Judge,
    data: TaskData,
    settings: AskConfig,
    watch: Watch = NOBODY,
    *,
    name: str = "the texts",
) -> tuple[Scores, np.ndarray, float]:
    """Return all fitting scores, fp32 logits [N,C], and the share of the texts, called ``name``,
    that was cut.
    """
    judge.check_task(data)
    logits, cuts = judge_texts(judge, data, settings, watch)
    cut = log_cut_texts({name: cuts})[name]
    if not data.label_names:
        return scores_of(data, logits), logits, cut
    return scores_by_name(logits, judge.labels, data, judge.subject), logits, cut


# ---- several experts: N texts, C classes --------------------------------------------------------


@dataclass(frozen=True)
class ExpertOutput:
    """One expert's answers: logits [N,C], and mean probabilities over dropout passes [N,C]."""

    info: TeacherInfo
    logits: np.ndarray
    mc_probs: np.ndarray | None
    cut: float = 0.0  # share of the texts that were cut


def expert_output(
    name: str,
    model: str,
    data: TaskData,
    passes: int,
    seed: int,
    max_length: int | None,
    batch_size: int,
) -> ExpertOutput:
    """Run a classifier on the texts of a task, plus ``passes`` times with dropout.

    Raises InputError for a model without a trained head, with scores or with labels of which
    several may hold, or without dropout if passes are asked for.
    """
    expert = Expert(model)
    if (problem := expert.answers.problem) != "single_label_classification":
        raise InputError(
            f"{model!r} is a {problem}: only classifiers whose classes exclude each other can be "
            "merged; leave it out"
        )
    with quiet_transformers():
        encoded = expert.read(data, max_length)
        cut = log_cut_texts({name: encoded})[name]
        logits = expert.logits(encoded, batch_size)
        means = None
        if passes:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network = expert.network
                pass_logits = [
                    predict(network, encoded, batch_size, dropout=True) for _ in range(passes)
                ]
            if all(np.array_equal(one, logits) for one in pass_logits):
                raise InputError(
                    f"{model!r}: {passes} Monte-Carlo passes are identical, so the model has no "
                    "dropout to measure uncertainty with. Set merge.passes to 0 to leave MUKI out"
                )
            means = np.mean([softmax(one, axis=1) for one in pass_logits], axis=0)
    about = {"task": "sequence_classification", "kind": "sequence", "view": "text"}
    labels = expert.labels
    info = TeacherInfo(name=name, num_labels=len(labels), label_names=labels, **about)
    return ExpertOutput(info, logits, means, cut)


def names_for(models: list[str]) -> list[str]:
    """Return a name for each expert: its directory's, or a number if that is invalid or taken."""
    names: list[str] = []
    for number, model in enumerate(models):
        name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(model).name)[:100].lstrip("._-")
        names.append(name if name and name not in names else f"expert-{number}")
    return names
