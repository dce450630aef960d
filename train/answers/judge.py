"""Finished models that score texts: an expert, or a student with one of its heads."""

import math
import shlex
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.train.answers.config import AskConfig
from rekindle.train.answers.recorded import ExpertRecord, read_expert_record
from rekindle.train.answers.watch import NOBODY, Watch
from rekindle.train.embedding.folder import check_encoder_folder, is_encoder_folder
from rekindle.train.export.plain import problem_of
from rekindle.train.finetune.classifier import (
    finetune_command,
    load_trained,
    predict,
    run_by_length,
)
from rekindle.train.finetune.encoded import Cuts, EncodedTexts, encode, from_words
from rekindle.train.finetune.label_lists import SEVERAL, TAGS
from rekindle.train.finetune.merge_baselines import bare_names
from rekindle.train.finetune.metrics import check_finite
from rekindle.train.finetune.predictions import Answers
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.finetune.words import encode_words
from rekindle.train.model.files import load_config, longest_input, place
from rekindle.train.model.fitting import LANGUAGE, knows_segments, recorded_task
from rekindle.train.model.folder import resolve_model
from rekindle.train.model.labels import SAY_SCORES, check_label_names, problem_of_outputs
from rekindle.train.model.network import HeadConfig
from rekindle.train.outside.quiet import quiet_transformers
from rekindle.train.student import ABOUT_FILE, Student, saved_heads

ROWS_AT_A_TIME = 2048  # in memory; with more rows, texts of similar length are grouped better

Inputs = dict[str, Tensor]


class Judge(ABC):
    """A model that scores texts, and how its answers are read. ``labels`` [C] are the names of its
    outputs as files spell them.
    """

    subject: str  # in messages
    head: str | None
    answers: Answers
    labels: tuple[str, ...]
    states_problem: bool  # False: the problem is guessed from the outputs
    metric: str | None = None  # its usual one, where that is not the problem's

    @abstractmethod
    def read(self, data: TaskData, max_length: int | None) -> EncodedTexts:
        """Return the texts as the model sees them, cut to ``max_length`` and to what it takes."""

    @abstractmethod
    def logits(self, encoded: EncodedTexts, batch_size: int) -> np.ndarray:
        """Return fp32 logits [N,C] in the order of the rows."""

    def check_task(self, data: TaskData) -> None:
        """Raise InputError for a task of another problem, or with labels that the model lacks."""
        outputs, problem = len(self.labels), self.answers.problem
        subject = f"the {outputs} outputs of {self.subject}"
        if data.head_problem == problem == "regression" and data.outputs == outputs:
            return
        if (
            data.head_problem == "regression"
            and data.outputs == outputs
            and not self.states_problem
        ):
            raise InputError(f"the task has scores, but {subject} may be classes: {SAY_SCORES}")
        if data.problem == SEVERAL != problem:
            state_text = f"are a {problem}" if self.states_problem else "may exclude each other"
            entry = '"problem_type": "multi_label_classification"'
            hint = "" if self.states_problem else f": if not, write {entry} into its config.json"
            raise InputError(
                f"the task has labels of which several may hold, but {subject} {state_text}{hint}"
            )
        if problem == SEVERAL != data.problem:
            raise InputError(
                f"{subject} are labels of which several may hold, but the task is a "
                f"{data.problem}: only the largest would be counted. Give a task with lists of "
                "labels"
            )
        if problem != data.problem and (TAGS in (problem, data.problem) or problem == "regression"):
            raise InputError(
                f"{self.subject} is a {problem}; the task has labels of another kind: give it the "
                "task it was fine-tuned on"
            )
        data.check_known(self.labels, subject)


def judge_texts(
    judge: Judge,
    data: TaskData,
    settings: AskConfig,
    watch: Watch = NOBODY,
) -> tuple[np.ndarray, Cuts]:
    """Return fp32 logits [N,C] of all of ``data``, one block of rows at a time, and how
    it was cut.
    """
    parts, cuts = [], Cuts()
    for first in range(0, len(data), ROWS_AT_A_TIME):
        block = data.part(first, first + ROWS_AT_A_TIME)
        encoded = judge.read(block, settings.max_length)
        parts.append(judge.logits(encoded, settings.batch_size))
        cuts = cuts.add(encoded)
        watch.advance(len(block))
    logits = np.concatenate(parts)
    if data.words is None:
        check_finite(logits)
    return logits, cuts


def open_judge(model: str, head: str | None = None, problem: str = "") -> Judge:
    """Load an expert, or a student with its ``head`` (None: its only head that fits a task of
    ``problem``, if that is known).

    Raises InputError for a language model, for a classifier whose head was never trained, for a
    missing head, and if it is not clear which head is meant.
    """
    directory = resolve_model(model)
    if (directory / ABOUT_FILE).is_file():
        with quiet_transformers():
            student = Student.from_pretrained(directory)
        return StudentHead(student, model, head, problem)
    if head is not None:
        raise InputError(
            f"--head is for students with task heads, but {model!r} has none: leave it out"
        )
    if (task := recorded_task(load_config(directory))) in LANGUAGE:
        raise InputError(no_head_message(model, "masked" if task == "masked_lm" else "causal"))
    return Expert(model)


def find_expert_record(model: str) -> ExpertRecord:
    """Return how an expert was fine-tuned; empty for students."""
    directory = resolve_model(model, check_encoder_folder)
    return ExpertRecord() if (directory / ABOUT_FILE).is_file() else read_expert_record(directory)


def tags_words(model: str, head: str | None = None) -> bool:
    """Return whether a model, or its ``head``, tags tokens, according to its files. Errors in
    either are reported when it is loaded.
    """
    directory = resolve_model(model, check_encoder_folder)
    if is_encoder_folder(directory) and not (directory / ABOUT_FILE).is_file():
        return False
    if (directory / ABOUT_FILE).is_file():
        heads = saved_heads(directory)
        return {one.kind for name, one in heads.items() if head in (None, name)} == {"token"}
    return recorded_task(load_config(directory)) == TAGS


def no_head_message(model: str, kind: str) -> str:
    """Return the message for a language model that is asked for labels."""
    return (
        f"{model!r} is a {kind} language model without a trained head: it knows no labels. First "
        f"make an expert from it: {finetune_command(model)}. To see how well it knows plain text: "
        f"`pipeline evaluate {shlex.quote(model)} --text FILE`"
    )


class Expert(Judge):
    """A classifier or regressor, written by ``pipeline finetune`` or from elsewhere."""

    head = None

    def __init__(self, model: str):
        self.subject = f"the expert {model!r}"
        tags = recorded_task(load_config(resolve_model(model))) == TAGS
        with quiet_transformers():
            self.network, self.tokenizer = load_trained(model, TAGS if tags else "")
        config = self.network.config
        self.labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        check_label_names(self.labels, repr(model))
        problem = TAGS if tags else problem_of_outputs(config.problem_type, config.num_labels)
        self.answers = Answers(problem, self.labels)
        self.states_problem = config.problem_type is not None

    def read(self, data: TaskData, max_length: int | None) -> EncodedTexts:
        """Return the tokens of the expert's own tokenizer."""
        return encode(self.tokenizer, self.network.config, data, max_length)

    def logits(self, encoded: EncodedTexts, batch_size: int) -> np.ndarray:
        """Run without dropout; texts are grouped by equal length if padding would change them."""
        return predict(self.network, encoded, batch_size)


class StudentHead(Judge):
    """A student and the head that is asked."""

    def __init__(
        self, student: Student, directory: str, requested: str | None = None, problem: str = ""
    ):
        self.head, config = choose_head(student, requested, directory, problem)
        self.subject = f"the head {self.head!r} of {directory!r}"
        names = config.label_names or tuple(f"LABEL_{i}" for i in range(config.num_labels))
        self.labels = bare_names(names, self.head.split("+"))
        self.states_problem = config.problem is not None
        self.answers = Answers(problem_of(config), names)
        self.tokenizer = load_tokenizer(str(resolve_model(directory)))
        self.device = torch.device(place("fp32").device)
        self.student = student.to(self.device).eval()

    def read(self, data: TaskData, max_length: int | None) -> EncodedTexts:
        """Return the texts or pairs as training shows them."""
        tokenizer, config = self.tokenizer, self.student.model.config
        # even without a domain a prompt takes a position
        prompted = self.student.prompts is not None
        model_limit = (longest_input(config) or math.inf) - prompted
        limit = int(min(max_length or self.student.longest_text, model_limit))
        if data.words is not None:
            return from_words(encode_words(tokenizer, data.words, limit), 0, limit, model_limit)
        lengths = tokenizer.uncut_lengths(data.texts, data.pairs)
        limits = (limit, model_limit, int((lengths > limit).sum()), int(lengths.max(initial=0)))
        if data.pairs is not None:
            pairs = zip(data.texts, data.pairs, strict=True)
            joined = [tokenizer.encode_pair(a, b, max_length=limit) for a, b in pairs]
            types = [types for _, types in joined] if knows_segments(config) else None
            return EncodedTexts([ids for ids, _ in joined], types, 0, *limits)
        room = limit - len(tokenizer.prefix) - len(tokenizer.suffix)
        wrapped = [
            np.concatenate([tokenizer.prefix, found.ids[:room], tokenizer.suffix]).astype(np.int32)
            for found in tokenizer.encode(data.texts)
        ]
        filled = [ids if len(ids) else np.zeros(1, np.int32) for ids in wrapped]
        return EncodedTexts(filled, None, 0, *limits)

    def logits(self, encoded: EncodedTexts, batch_size: int) -> np.ndarray:
        """Run the head."""
        name = str(self.head)

        def run(inputs: Inputs, positions: Tensor | None) -> Tensor:
            if positions is None:
                output = self.student(inputs, sequence_heads=[name])
            else:
                output = self.student(inputs, token_heads={name: positions})
            logits: Tensor = output.logits[name]
            return logits

        return run_by_length(encoded, batch_size, self.device, run)


def choose_head(
    student: Student, requested: str | None, directory: str, problem: str = ""
) -> tuple[str, HeadConfig]:
    """Return the student's head to ask (a tagging head if that is the ``problem``); raise
    InputError if it is not clear which.
    """
    kind = "token" if problem == TAGS else "sequence" if problem else ""
    all_heads = student.head_configs
    scoring_heads = {name: one for name, one in all_heads.items() if one.kind != "embedding"}
    heads = {name: one for name, one in scoring_heads.items() if kind in ("", one.kind)}
    if requested in all_heads.keys() - scoring_heads.keys():
        raise InputError(
            f"the head {requested!r} of student {directory!r} gives vectors and knows no labels. "
            "`pipeline export` writes it as a folder of sentence-transformers"
        )
    if requested is None and len(heads) == 1:
        requested = next(iter(heads))
    if requested is None or requested not in heads:
        if heads:
            choice = f", not {requested!r}" if requested else "; say which with --head"
            problem_text = f"has the task heads {', '.join(heads)}{choice}"
        else:
            purposes = {"token": " that tags words", "sequence": " that judges whole texts"}
            problem_text = f"has no task head{purposes.get(kind, '')}"
        raise InputError(
            f"student {directory!r} {problem_text}. A distill term with a task expert gives a "
            f"student a head; or fine-tune it: {finetune_command(directory)}"
        )
    return requested, heads[requested]
