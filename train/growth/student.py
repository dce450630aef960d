"""Grow a whole student: its model (``growth/grow.py``), task heads and domain prompts."""

from typing import Any

from torch import Tensor

from rekindle.data.errors import InputError
from rekindle.train.growth.grow import Growth
from rekindle.train.growth.maps import Axis
from rekindle.train.model.family_head import FamilyHead
from rekindle.train.model.parts.head_config import HeadConfig, width_of
from rekindle.train.model.parts.vectors import VectorHead
from rekindle.train.model.student_config import GrowConfig
from rekindle.train.student import Student, saved_heads


def grow_student(student: Student, config: GrowConfig) -> Student:
    """Return a larger student that begins as a copy of ``student``, on the CPU.

    Heads and prompts keep their function as far as the model does; a family's own head begins
    fresh. Raises InputError if the model cannot grow so, or such a head was trained before.
    """
    _check_heads(student)
    growth = Growth(student.model, config)
    domains = None if student.prompts is None else student.prompts.domains
    model = growth.model(student.model)
    heads = {name: _as_wide(head, model.config) for name, head in student.head_configs.items()}
    made = Student(model, student.task, heads, student.vocabulary_size, domains)
    made.source, made.sequence_length = student.source, student.sequence_length
    made.vectors = student.vectors
    for key, head in student.heads.items():
        if isinstance(head, FamilyHead):  # fresh in both
            continue
        causal = student.task == "causal_lm"
        grown = _vectors if isinstance(head, VectorHead) else _head
        made.heads[key].load_state_dict(grown(growth, head.state_dict(), causal))
    if student.prompts is not None and made.prompts is not None:
        vectors = student.prompts.vectors.weight.detach().cpu()
        made.prompts.vectors.load_state_dict({"weight": growth.hidden.rows(vectors, 1)})
    return made.train(student.training)


def _check_heads(student: Student) -> None:
    earlier = {} if student.source is None else saved_heads(student.source)
    for name, head in student.head_configs.items():
        if head.form == "family" and earlier.get(name) == head:
            raise InputError(
                f"student.grow: the head {name!r} of {student.source} belongs to the model's "
                "family and does not grow with it: it would start afresh. Grow a student with "
                "our own heads (student.head), or leave grow out"
            )


def _as_wide(head: HeadConfig, model_config: Any) -> HeadConfig:
    """A head of the student's own vectors gives longer ones when that has grown."""
    if head.kind != "embedding" or head.projection:
        return head
    return head.model_copy(update={"num_labels": width_of(model_config)})


def _vectors(growth: Growth, state: dict[str, Tensor], causal: bool) -> dict[str, Tensor]:
    """Return what reads the pooled states: a projection [C,d] as [C,D], or nothing."""
    held = {name: tensor.cpu() for name, tensor in state.items()}
    if (read := held.get("projection.weight")) is not None:
        held["projection.weight"] = _reading(growth, read, causal)
    return held


def _reading(growth: Growth, matrix: Tensor, causal: bool) -> Tensor:
    """A matrix [C,d] on the body's final states as [C,D]."""
    divided = causal and growth.tied
    return growth.hidden.rows(matrix, 1) if divided else growth.columns(growth.hidden, matrix, 1)


def _head(growth: Growth, state: dict[str, Tensor], causal: bool) -> dict[str, Tensor]:
    """Return a head's ``dense`` [d,d] and ``out`` [C,d] on the body's final states, as [D,D] and
    [C,D].

    In a causal LM with a tied output matrix, the last norm has already divided these states.
    """
    held = {name: tensor.cpu() for name, tensor in state.items()}
    inner = Axis.copied(growth.hidden.source)  # the head's own units, behind a tanh
    return {
        "dense.weight": _reading(growth, inner.rows(held["dense.weight"]), causal),
        "dense.bias": inner.rows(held["dense.bias"]),
        "out.weight": growth.columns(inner, held["out.weight"], 1),
        "out.bias": held["out.bias"],
    }
