"""Scores what is there, without training: an expert, a student's task head, experts together."""

import logging
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import new_folder
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.finetune.classifier import (
    by_length,
    check_several_alike,
    classifier_config,
    evaluate,
    evaluation,
    load_expert,
    predict,
)
from rekindle.train.finetune.config import NOTHING_KEPT, FinetuneConfig, less_memory
from rekindle.train.finetune.encoded import MOST_TOKENS, EncodedTexts, of_words, tell_cut
from rekindle.train.finetune.label_lists import TAGS
from rekindle.train.finetune.merge_baselines import bare_names, merge_scores, scores_by_name
from rekindle.train.finetune.metrics import chosen_metric, scores_of
from rekindle.train.finetune.result import FinetuneResult, SeedResult, check_out
from rekindle.train.finetune.task_data import TaskData, read_task
from rekindle.train.finetune.words import encode_words
from rekindle.train.model.causes import quiet_transformers
from rekindle.train.model.files import longest_input, place
from rekindle.train.model.folder import resolve_model
from rekindle.train.model.labels import check_label_names
from rekindle.train.model.network import HeadConfig
from rekindle.train.model.segments import knows_segments
from rekindle.train.running_out import running_out
from rekindle.train.student import ABOUT_FILE, Student

logger = logging.getLogger("rekindle")

Scores = dict[str, float]


def score_model(
    model: str,
    train: str,
    dev: str,
    out: str,
    *,
    metric: str | None = None,
    config: FinetuneConfig,
    force: bool = False,
) -> FinetuneResult:
    """Score ``model`` on the file ``dev``; ``out`` receives ``metrics.json`` and no model.

    ``model`` is a student's directory, whose task head ``config.head`` is scored, or an expert's.
    With ``config.merge``, ``baselines`` are the scores of every expert and of every way to merge
    them; an expert ``model`` is the first of them. ``train`` says what the labels mean: give the
    same file where there is no other. Classes are matched by name.

    Raises InputError for wrong files, models, metrics, or an ``out`` that holds a model.
    """
    started = time.perf_counter()
    _check_target(Path(out), [model, *(config.merge.experts if config.merge else ())], force)
    data = read_task(train, dev, settings=config)[1]
    metric = chosen_metric(metric, data)
    logger.info("%s: %s", dev, data.described())
    with running_out(Path(out), lambda: NOTHING_KEPT, less_memory(config)):
        found, cut = _scores_by_way(model, data, config)
    scores, baselines = next(iter(found.values())), found if config.merge is not None else None
    seconds = time.perf_counter() - started
    files, only = {"train": train, "dev": dev}, SeedResult(0, scores, None, [], seconds)
    about = (config, "fp32", seconds, baselines)
    result = FinetuneResult.of(model, files, {"dev": data}, metric, [only], *about, cut=cut)
    with new_folder(Path(out).resolve()) as staging:
        result.save(staging)
    return result


def baselines_table(baselines: dict[str, Scores]) -> str:
    """One line for each way to merge, its scores in columns."""
    metrics = [*next(iter(baselines.values()))]
    width = max(map(len, baselines))
    lines = [" " * width + "".join(f"  {metric:>9}" for metric in metrics)]
    for way, scores in baselines.items():
        lines.append(f"{way:{width}}" + "".join(f"  {scores[m]:9.4f}" for m in metrics))
    return "\n".join(lines)


def _check_target(out: Path, models: list[str], force: bool) -> None:
    if (out / "config.json").exists():
        raise InputError(
            f"{str(out)!r} holds a model, which the scores alone would replace; give another --out"
        )
    if any(Path(model).resolve() == out.resolve() for model in models):
        raise InputError(f"{str(out)!r} is the model that is scored; give another --out")
    check_out(out, force)


def _student_scores(
    directory: str, data: TaskData, config: FinetuneConfig
) -> tuple[str, Scores, float]:
    """The name of the head that was scored, its scores, and the share of texts that was cut."""
    path = str(resolve_model(directory))
    with quiet_transformers():
        student = Student.from_pretrained(path)
    name, head = head_of(student, config.head, directory, data.problem)
    encoded = student_texts(student, path, data, config.max_length)
    cut = tell_cut({"dev": encoded})["dev"]
    logits = student_logits(student, name, encoded, config.batch_size)
    if head.problem == "regression" and not data.label_names and head.num_labels == data.outputs:
        return name, scores_of(data, logits), cut
    if head.problem == "regression":
        raise InputError(
            f"the head {name!r} of {directory!r} is a {head.problem}; the task has labels of "
            "another kind: give the task it was taught"
        )
    names = bare_names(head.label_names, name.split("+"))
    who = f"the head {name!r} of {directory!r}"
    check_several_alike(data, head.problem, f"the labels of {who}")
    return name, scores_by_name(logits, names, data, who), cut


def _scores_by_way(
    model: str, data: TaskData, config: FinetuneConfig
) -> tuple[dict[str, Scores], dict[str, float]]:
    """The scores of the student or expert, and with ``merge`` those of each expert, of each way to
    merge them, and of the oracle; and the share of texts that was cut for whom.
    """
    found: dict[str, Scores] = {}
    cut: dict[str, float] = {}
    sizes = config.max_length, config.batch_size
    models, merge = [model], config.merge
    if merge is not None and data.problem != "single_label_classification":
        raise InputError(
            f"merge is of classes that exclude each other, and the task is a {data.problem}: leave "
            "merge out, and score each model by itself"
        )
    if (resolve_model(model) / ABOUT_FILE).is_file():
        head, scores, cut["dev"] = _student_scores(model, data, config)
        found[f"student, head {head}"], models = scores, []
    elif config.head is not None and merge is None:
        raise InputError(
            f"head is for students with task heads, and {model!r} is none: leave it out"
        )
    elif merge is None:
        found["expert"], _, cut["dev"] = evaluation(model, data, *sizes)
    if merge is None:
        return found, cut
    models += merge.experts
    outputs = [
        expert_output(name, directory, data, merge.passes, merge.seed, *sizes)
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
    cut |= {o.info.name: o.cut for o in outputs}
    if merge.oracle is not None:
        found["oracle"] = evaluate(merge.oracle, data, max_length=config.max_length)[0]
    return found, cut


# ---- what experts and heads say of the texts: N of them, C classes ------------------------------


@dataclass(frozen=True)
class ExpertOutput:
    """One expert's answers: logits [N,C], and the mean probabilities of dropout passes [N,C]."""

    info: TeacherInfo
    logits: np.ndarray
    mc_probs: np.ndarray | None
    cut: float = 0.0  # share of the texts


def expert_output(
    name: str,
    model: str,
    data: TaskData,
    passes: int,
    seed: int,
    max_length: int | None,
    batch_size: int,
) -> ExpertOutput:
    """Run a classifier on the texts of a task; ``passes`` times more with dropout.

    Raises InputError for a model without a trained head, of scores or of labels of which several
    may hold, or without dropout where passes are asked.
    """
    problem = classifier_config(model).problem_type
    if problem not in (None, "single_label_classification"):
        raise InputError(
            f"{model!r} is a {problem}: only classifiers whose classes exclude each other can be "
            "merged; leave it out"
        )
    with quiet_transformers():
        network, encoded = load_expert(model, data, max_length)
        cut = tell_cut({name: encoded})[name]
        logits = predict(network, encoded, batch_size)
        means = None
        if passes:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                each = [predict(network, encoded, batch_size, dropout=True) for _ in range(passes)]
            if all(np.array_equal(one, logits) for one in each):
                raise InputError(
                    f"{model!r}: {passes} Monte-Carlo passes are identical, so the model has no "
                    "dropout to draw uncertainty from. Set merge.passes to 0 to leave MUKI out"
                )
            means = np.mean([softmax(one, axis=1) for one in each], axis=0)
    about = {"task": "sequence_classification", "kind": "sequence", "view": "text"}
    config = network.config
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    check_label_names(names, repr(model))
    info = TeacherInfo(name=name, num_labels=config.num_labels, label_names=names, **about)
    return ExpertOutput(info, logits, means, cut)


def names_for(models: list[str]) -> list[str]:
    """A name for each expert: its directory's, or a number where that is none or is taken."""
    names: list[str] = []
    for number, model in enumerate(models):
        name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(model).name)[:100].lstrip("._-")
        names.append(name if name and name not in names else f"expert-{number}")
    return names


def head_of(
    student: Student, wanted: str | None, directory: str, problem: str = ""
) -> tuple[str, HeadConfig]:
    """The head of a student that is scored, one that tags words where that is the ``problem``;
    InputError when it is not clear which.
    """
    kind, does = ("token", "tags words") if problem == TAGS else ("sequence", "judges whole texts")
    heads = {n: h for n, h in student.head_configs.items() if h.kind == kind}
    if wanted is None and len(heads) == 1:
        wanted = next(iter(heads))
    if wanted is None or wanted not in heads:
        has = ", ".join(heads) or f"none that {does}"
        raise InputError(
            f"student {directory!r} has the task heads {has}"
            + (f", not {wanted!r}" if wanted else "; say which with head")
            + ". Train one with a distill term of task experts, or fine-tune it (epochs above 0)"
        )
    return wanted, heads[wanted]


def student_logits(student: Student, head: str, encoded: EncodedTexts, batch: int) -> np.ndarray:
    """Logits of one task head, on ``student_texts``, as ``by_length`` returns them."""
    device = torch.device(place("fp32").device)
    student = student.to(device).eval()

    def run(inputs: dict[str, torch.Tensor], places: torch.Tensor | None) -> torch.Tensor:
        which = {"sequence_heads": [head]} if places is None else {"token_heads": {head: places}}
        logits: torch.Tensor = student(inputs, **which).logits[head]
        return logits

    return by_length(encoded, batch, device, run)


def student_texts(
    student: Student, directory: str, data: TaskData, max_length: int | None
) -> EncodedTexts:
    """Tokenize the texts or pairs as training shows them, cut to ``max_length`` (MOST_TOKENS)."""
    tokenizer, wanted = load_tokenizer(directory), max_length or MOST_TOKENS
    prompted = student.prompts is not None  # that of no domain takes a place, too
    takes = (longest_input(student.model.config) or math.inf) - prompted
    most = int(min(wanted, takes))
    if data.words is not None:
        return of_words(encode_words(tokenizer, data.words, most), 0, most, takes)
    whole = tokenizer.whole_lengths(data.texts, data.pairs)
    limits = (most, takes, int((whole > most).sum()), int(whole.max(initial=0)))
    if data.pairs is not None:
        pairs = zip(data.texts, data.pairs, strict=True)
        joined = [tokenizer.encode_pair(a, b, max_length=most) for a, b in pairs]
        types = [types for _, types in joined] if knows_segments(student.model.config) else None
        return EncodedTexts([ids for ids, _ in joined], types, 0, *limits)
    room = most - len(tokenizer.prefix) - len(tokenizer.suffix)
    wrapped = [
        np.concatenate([tokenizer.prefix, found.ids[:room], tokenizer.suffix]).astype(np.int32)
        for found in tokenizer.encode(data.texts)
    ]
    filled = [ids if len(ids) else np.zeros(1, np.int32) for ids in wrapped]
    return EncodedTexts(filled, None, 0, *limits)
