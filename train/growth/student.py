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
    heads = {name: _widen_config(head, model.config) for name, head in student.head_configs.items()}
    grown_student = Student(model, student.task, heads, student.vocabulary_size, domains)
    grown_student.source, grown_student.sequence_length = student.source, student.sequence_length
    grown_student.vectors = student.vectors
    for key, head in student.heads.items():
        if isinstance(head, FamilyHead):  # fresh in both
            continue
        causal = student.task == "causal_lm"
        grow_head = _grow_vector_head if isinstance(head, VectorHead) else _grow_head
        grown_student.heads[key].load_state_dict(grow_head(growth, head.state_dict(), causal))
    if student.prompts is not None and grown_student.prompts is not None:
        vectors = student.prompts.vectors.weight.detach().cpu()
        grown_student.prompts.vectors.load_state_dict({"weight": growth.hidden.rows(vectors, 1)})
    return grown_student.train(student.training)


def _check_heads(student: Student) -> None:
    trained_heads = {} if student.source is None else saved_heads(student.source)
    for name, head in student.head_configs.items():
        if head.form == "family" and trained_heads.get(name) == head:
            raise InputError(
                f"student.grow: the head {name!r} of {student.source} belongs to the model's "
                "family and does not grow with it: it would start afresh. Grow a student with "
                "our own heads (student.head), or leave grow out"
            )


def _widen_config(head: HeadConfig, model_config: Any) -> HeadConfig:
    """A head of the student's own vectors gives longer ones when that has grown."""
    if head.kind != "embedding" or head.projection:
        return head
    return head.model_copy(update={"num_labels": width_of(model_config)})


def _grow_vector_head(growth: Growth, state: dict[str, Tensor], causal: bool) -> dict[str, Tensor]:
    """Return what reads the pooled states: a projection [C,d] as [C,D], or nothing."""
    weights = {name: tensor.cpu() for name, tensor in state.items()}
    if (projection := weights.get("projection.weight")) is not None:
        weights["projection.weight"] = _grow_input_columns(growth, projection, causal)
    return weights


def _grow_input_columns(growth: Growth, matrix: Tensor, causal: bool) -> Tensor:
    """A matrix [C,d] on the body's final states as [C,D]."""
    divided = causal and growth.tied
    return growth.hidden.rows(matrix, 1) if divided else growth.columns(growth.hidden, matrix, 1)


def _grow_head(growth: Growth, state: dict[str, Tensor], causal: bool) -> dict[str, Tensor]:
    """Return a head's ``dense`` [d,d] and ``out`` [C,d] on the body's final states, as [D,D] and
    [C,D].

    In a causal LM with a tied output matrix, the last norm has already divided these states.
    """
    weights = {name: tensor.cpu() for name, tensor in state.items()}
    inner = Axis.copied(growth.hidden.source)  # the head's own units, behind a tanh
    return {
        "dense.weight": _grow_input_columns(growth, inner.rows(weights["dense.weight"]), causal),
        "dense.bias": inner.rows(weights["dense.bias"]),
        "out.weight": growth.columns(inner, weights["out.weight"], 1),
        "out.bias": weights["out.bias"],
    }
