"""Begin a fine-tuning with a student's distilled head: check that it fits, and load the model."""

import logging
import shlex
from typing import Protocol

import torch
from transformers import PreTrainedModel

from rekindle.data.errors import InputError
from rekindle.train.export.plain import plain_labels, plain_model, problem_of
from rekindle.train.model.family_head import auto_class
from rekindle.train.model.folder import resolve_model
from rekindle.train.model.labels import output_tensors
from rekindle.train.model.network import HeadConfig
from rekindle.train.student import Student, saved_heads

log = logging.getLogger("rekindle")


class Labelled(Protocol):
    """The part of a labelled task needed here."""

    @property
    def head_problem(self) -> str:
        """The problem as transformers names it."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Empty for scores."""

    @property
    def outputs(self) -> int:
        """The number of outputs of a model for a text."""


def distilled_model(model: str, head: str, data: Labelled) -> PreTrainedModel:
    """Load the student in ``model`` as its family's class with the distilled ``head``; its outputs
    are in the order of the data's labels.
    """
    student = Student.from_pretrained(resolve_model(model))
    plain = plain_model(student, head)
    if not data.label_names:
        return plain
    names = plain_labels(head, student.head_configs[head])
    order = torch.tensor([names.index(label) for label in data.label_names])
    class_name = auto_class(plain.config, student.head_configs[head].judges)
    with torch.no_grad():
        for name in output_tensors(plain.config, class_name):
            values = plain.get_parameter(name)
            values.copy_(values[order])
    plain.config.id2label = dict(enumerate(data.label_names))
    plain.config.label2id = {label: number for number, label in enumerate(data.label_names)}
    return plain


def check_head(model: str, head: str | None, data: Labelled) -> None:
    """Raise InputError unless the student in ``model`` has ``head`` for exactly the labels of
    ``data``. Without ``head``, log whether there is such a head.
    """
    heads = saved_heads(resolve_model(model))
    if head is None:
        fitting = [name for name, one in heads.items() if not _describe_misfit(name, one, data)]
        if fitting:
            log.info(
                "%s has a distilled head for these labels, %s: --head %s goes on from it. This run "
                "begins with a fresh one",
                *(model, ", ".join(fitting), shlex.quote(fitting[0])),
            )
        return
    if head not in heads:
        heads_text = f"has the task heads {', '.join(heads)}" if heads else "has no task heads"
        raise InputError(
            f"{model!r} {heads_text}, not {head!r}. Name one of a student's, or leave head out: "
            "the fine-tuning then begins with a fresh one"
        )
    if problem := _describe_misfit(head, heads[head], data):
        raise InputError(
            f"the head {head!r} of {model!r} {problem}. Give the task it was taught, or leave head "
            "out: the fine-tuning then begins with a fresh one"
        )


def _describe_misfit(name: str, head: HeadConfig, data: Labelled) -> str | None:
    """Return how a head differs from what a task needs; None if it fits."""
    problem = problem_of(head)
    if problem != data.head_problem:
        return f"is for {problem}, but the task is {data.head_problem}"
    if not data.label_names:
        sizes = head.num_labels, data.outputs
        return (
            None if sizes[0] == sizes[1] else "gives {} scores, and the task has {}".format(*sizes)
        )
    head_labels, task_labels = plain_labels(name, head), data.label_names
    only_head = ", ".join([label for label in head_labels if label not in task_labels][:6])
    only_task = ", ".join([label for label in task_labels if label not in head_labels][:6])
    if not only_head and not only_task:
        return None
    problems = [f"it alone knows {only_head}"] if only_head else []
    problems += [f"the task alone has {only_task}"] if only_task else []
    return f"is for other labels: {'; '.join(problems)}"
