"""Grow a whole student: its model (``growth/grow.py``), task heads and domain prompts."""

from torch import Tensor

from rekindle.data.errors import InputError
from rekindle.train.growth.grow import Growth
from rekindle.train.growth.maps import Axis
from rekindle.train.model.family_head import FamilyHead
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
    made = Student(model, student.task, student.head_configs, student.vocabulary_size, domains)
    made.source, made.sequence_length = student.source, student.sequence_length
    for key, head in student.heads.items():
        if isinstance(head, FamilyHead):  # fresh in both
            continue
        causal = student.task == "causal_lm"
        made.heads[key].load_state_dict(_head(growth, head.state_dict(), causal))
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


def _head(growth: Growth, state: dict[str, Tensor], causal: bool) -> dict[str, Tensor]:
    """Return a head's ``dense`` [d,d] and ``out`` [C,d] on the body's final states, as [D,D] and
    [C,D].

    In a causal LM with a tied output matrix, the last norm has already divided these states.
    """
    held = {name: tensor.cpu() for name, tensor in state.items()}
    inner = Axis.copied(growth.hidden.source)  # the head's own units, behind a tanh
    dense, divided = inner.rows(held["dense.weight"]), causal and growth.tied
    read = growth.hidden.rows(dense, 1) if divided else growth.columns(growth.hidden, dense, 1)
    return {
        "dense.weight": read,
        "dense.bias": inner.rows(held["dense.bias"]),
        "out.weight": growth.columns(inner, held["out.weight"], 1),
        "out.bias": held["out.bias"],
    }
