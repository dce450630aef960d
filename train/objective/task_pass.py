"""A forward pass of the student for its task heads' outputs, to compare with the experts'.

Shapes: B sequences, R rows (sequences or positions) with a target, C classes of an expert.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.batch import (
    Batch,
    EmbeddingBatch,
    Ints,
    SequenceTargetBatch,
    TargetBatch,
    TokenLabelBatch,
)
from rekindle.train.config import DistillTerm
from rekindle.train.device_batch import send
from rekindle.train.model.network import StudentOutput
from rekindle.train.objective.selection import common_rows
from rekindle.train.order.ahead import made
from rekindle.train.student import Student


def run_heads(
    student: Student,
    inputs: Mapping[str, Tensor],
    batch: Batch,
    heads: Mapping[str, TargetBatch | None],
    select: Tensor | None = None,
) -> StudentOutput:
    """Run the student once with the named heads: on whole sequences, or at the target's positions
    if it has some. ``select``: see ``Student.forward``.
    """
    sequence: list[str] = []
    tokens: dict[str, Tensor] = {}
    for name, target in heads.items():
        if isinstance(target, TokenLabelBatch):
            places = student_rows(target, batch.input_ids.shape[1])
            tokens[name] = send(places, inputs["input_ids"].device)
        else:
            sequence.append(name)
    domain_inputs = student.with_domains(inputs, batch.domains)
    output: StudentOutput = student(domain_inputs, select, sequence, tokens)
    return output


def align_with_targets(logits: Tensor, target: TargetBatch) -> tuple[Tensor, Tensor]:
    """Return a head's logits (or vectors) and the expert's, at the rows with a target [R,C]."""
    values = send(expert_values(target), logits.device)
    if isinstance(target, TokenLabelBatch):
        return logits, values
    return logits[send(student_rows(target), logits.device)], values


def student_rows(target: TargetBatch, width: int = 0) -> Ints:
    """Return the student's rows [R] with a target: sequences of [B]; for experts on tokens, flat
    indices into [B·S] with S = ``width``.
    """

    def make() -> Ints:
        if not isinstance(target, TokenLabelBatch):
            return target.rows
        places: Ints = target.rows * width + target.positions
        return places

    return made(target, "rows", make)


def expert_values(target: TargetBatch) -> NDArray[np.float32]:
    """Return an expert's logits, or vectors, at its rows [R,C]."""
    if isinstance(target, SequenceTargetBatch):
        logits = target.logits
        return made(target, "values", lambda: logits[target.rows])
    assert isinstance(target, TokenLabelBatch | EmbeddingBatch)
    values = target.vectors if isinstance(target, EmbeddingBatch) else target.logits
    return made(target, "values", lambda: values)


def mixture_rows(batch: Batch, term: DistillTerm) -> Ints:
    """Return the sequences [R] at which a mixture of classifiers teaches."""
    targets = [batch.targets[name] for name in term.teachers]
    return made(batch, f"rows of {term.teachers}", lambda: common_rows(targets))


def mixture_values(batch: Batch, term: DistillTerm, column: str) -> dict[str, NDArray[np.float32]]:
    """Return a column of each of a mixture's classifiers, logits or mc_probs, at its rows [R,C]."""
    rows = mixture_rows(batch, term)

    def of(name: str) -> NDArray[np.float32]:
        whole: NDArray[np.float32] = getattr(batch.targets[name], column)
        return made(batch, f"{column} of {name} in {term.teachers}", lambda: whole[rows])

    return {name: of(name) for name in term.teachers}
