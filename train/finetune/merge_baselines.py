"""Baselines for a student that merges classifiers: its experts alone, and together.

Pure functions of logits and Monte-Carlo means. N texts, J experts, C_j labels, U labels of all.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import UncertaintyConfig
from rekindle.train.finetune.metrics import scores_of
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.objective.label_union import (
    LabelUnion,
    bare_names,
    certainty,
    expert_weights,
)


def merged_probabilities(
    union: LabelUnion,
    logits: Mapping[str, Tensor],
    mc_probs: Mapping[str, Tensor] | None = None,
    sharpness: float = 0.2,
) -> dict[str, Tensor]:
    """Return probabilities [N,U] of every way to merge the experts' answers, by name.

    ``logits`` [N,C_j] by expert, in the union's order; ``mc_probs`` [N,C_j]: the mean class
    probabilities of dropout passes; without them MUKI's merges are left out. An expert alone gives
    0 to labels that it lacks.
    """
    probabilities = {
        f"{name} alone": union.pad(name, torch.softmax(z, dim=1)) for name, z in logits.items()
    }
    first_logits = next(iter(logits.values()))
    equal_weights = first_logits.new_full((len(first_logits), len(logits)), 1.0 / len(logits))
    probabilities["uniform mixture"] = union.mix(logits, equal_weights, 1.0)
    probabilities["concatenated logits"] = union.concatenate(logits, 1.0)
    if mc_probs is not None:
        certainties = torch.stack([certainty(mc_probs[name]) for name in logits], dim=1)
        for selection in ("soft", "hard"):
            config = UncertaintyConfig(selection=selection, sharpness=sharpness)
            weights = expert_weights(certainties, config)
            probabilities[f"MUKI, {selection}"] = union.mix(logits, weights, 1.0)
    return probabilities


def merge_scores(
    experts: Sequence[TeacherInfo],
    logits: Mapping[str, np.ndarray],
    mc_probs: Mapping[str, np.ndarray] | None,
    data: TaskData,
    labels: Literal["merge", "apart"] = "merge",
    sharpness: float = 0.2,
) -> dict[str, dict[str, float]]:
    """Return the scores of every way to merge on a labelled file: way -> metric -> value.

    Logits and means may be fresh or from a cache; their rows are those of ``data``.
    """
    union = LabelUnion.of(experts, labels)
    names = bare_names(union.names, [e.name for e in experts])
    expert_logits = {e.name: torch.from_numpy(np.asarray(logits[e.name])).float() for e in experts}
    means = None
    if mc_probs is not None:
        means = {e.name: torch.from_numpy(np.asarray(mc_probs[e.name])).float() for e in experts}
    ways = merged_probabilities(union, expert_logits, means, sharpness)
    return {way: scores_by_name(probs.numpy(), names, data) for way, probs in ways.items()}


def scores_by_name(
    values: np.ndarray, names: Sequence[str], data: TaskData, subject: str = "the experts together"
) -> dict[str, float]:
    """Return the scores of logits or probabilities [N,U] of labels ``names`` [U] on ``data``.

    Labels are matched by name; equal names are one label with the largest of their values. Raises
    InputError for a task with labels that nobody knows.
    """
    data.check_known(names, subject)
    classes = list(dict.fromkeys([*data.label_names, *names]))
    columns = [[place for place, n in enumerate(names) if n == label] for label in classes]
    merged = np.stack([values[:, places].max(axis=1) for places in columns], axis=1)
    return scores_of(data, merged, classes)
