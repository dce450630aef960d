"""Hard pseudo-labels: the expert's class taken as a label if the expert is sure of it.

Source: UEGP's hard-label mode (Findings of NAACL 2024); self-training with a confidence threshold.
Shapes: R rows (sequences or positions), C classes.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.batch import SequenceTargetBatch, TargetBatch, TokenLabelBatch
from rekindle.data.targets.schema import TeacherInfo

CONFIDENCE = 0.9  # if none is given


def confident_only(target: TargetBatch, confidence: float | None) -> TargetBatch:
    """Return an expert's targets without the rows that it is not sure enough of.

    Classes that exclude each other: the largest softmax probability must reach ``confidence``.
    Labels of which several may hold: the answer to at least one of them must.
    """
    assert isinstance(target, SequenceTargetBatch | TokenLabelBatch)
    logits = target.logits
    if isinstance(target, SequenceTargetBatch):
        logits = logits[target.rows]
    return target.keep(sure_rows(logits, target.info, confidence))


def sure_rows(
    logits: NDArray[np.float32], info: TeacherInfo, confidence: float | None
) -> NDArray[np.bool_]:
    """Return which rows [R] of logits [R,C] the expert is sure of."""
    if info.problem == "multi_label_classification":
        has_sure: NDArray[np.bool_] = np.any(np.abs(logits) >= _least_logit(confidence), axis=1)
        return has_sure
    wide = logits.astype(np.float64)
    largest = 1 / np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1)
    is_sure: NDArray[np.bool_] = largest >= _or_default(confidence)
    return is_sure


def pseudo_label_loss(
    logits: Tensor, teacher_logits: Tensor, info: TeacherInfo, confidence: float | None
) -> Tensor:
    """Return the cross-entropy of ``logits`` [R,C] on the answers of ``teacher_logits`` [R,C],
    summed over rows.

    The rows are those of ``confident_only``. If several labels may hold, those that the expert is
    not sure of have no loss; a row's loss is their sum divided by C.
    """
    if info.problem != "multi_label_classification":
        return F.cross_entropy(logits, teacher_logits.argmax(dim=1), reduction="sum")
    is_sure = teacher_logits.abs() >= _least_logit(confidence)
    losses = F.binary_cross_entropy_with_logits(
        logits, (teacher_logits > 0).float(), reduction="none"
    )
    return torch.where(is_sure, losses, 0.0).sum() / logits.shape[1]


def _or_default(confidence: float | None) -> float:
    return CONFIDENCE if confidence is None else confidence


def _least_logit(confidence: float | None) -> float:
    """Return the least |z| for which max(σ(z), 1 − σ(z)) reaches the confidence."""
    probability = _or_default(confidence)
    if probability <= 0.5:
        return 0.0
    return math.log(probability / (1 - probability)) if probability < 1 else math.inf
