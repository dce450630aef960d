"""A forward pass of the student for its task heads' outputs, to compare with the experts'.

Shapes: B sequences, R rows (sequences or positions) with a target, C classes of an expert.
"""

from collections.abc import Mapping

from torch import Tensor

from rekindle.data.batch import (
    Batch,
    EmbeddingBatch,
    SequenceTargetBatch,
    TargetBatch,
    TokenLabelBatch,
)
from rekindle.train.device_batch import send
from rekindle.train.model.network import StudentOutput
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
            flat_positions = target.rows * batch.input_ids.shape[1] + target.positions
            tokens[name] = send(flat_positions, inputs["input_ids"].device)
        else:
            sequence.append(name)
    domain_inputs = student.with_domains(inputs, batch.domains)
    output: StudentOutput = student(domain_inputs, select, sequence, tokens)
    return output


def align_with_targets(logits: Tensor, target: TargetBatch) -> tuple[Tensor, Tensor]:
    """Return a head's logits (or vectors) and the expert's, at the rows with a target [R,C]."""
    if isinstance(target, EmbeddingBatch):
        return logits[send(target.rows, logits.device)], send(target.vectors, logits.device)
    if isinstance(target, SequenceTargetBatch):
        keep = send(target.rows, logits.device)
        return logits[keep], send(target.logits[target.rows], logits.device)
    assert isinstance(target, TokenLabelBatch)
    return logits, send(target.logits, logits.device)
