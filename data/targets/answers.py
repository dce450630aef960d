"""Probabilities and entropies from an expert's logits."""

import numpy as np

from rekindle.data.errors import InputError
from rekindle.data.targets.codec import Floats
from rekindle.data.targets.schema import TeacherInfo

MULTI_LABEL = "multi_label_classification"


def probabilities(info: TeacherInfo, logits: Floats, temperature: float = 1.0) -> Floats:
    """Return the probabilities [R,C] of classes, or of each label separately, from logits [R,C].

    Raise InputError for an expert that gives scores.
    """
    if info.problem == "regression":
        raise InputError(
            f"teacher {info.name!r} gives scores, which have no probabilities: they are its logits"
        )
    tempered = logits / np.float32(temperature)
    if info.problem == MULTI_LABEL:
        return np.exp(-np.logaddexp(np.float32(0), -tempered))
    tempered = tempered - tempered.max(axis=1, keepdims=True)
    weights = np.exp(tempered)
    probs: Floats = weights / weights.sum(axis=1, keepdims=True)
    return probs


def entropies(info: TeacherInfo, probs: Floats) -> Floats:
    """Return the entropy [R] in nats of probabilities [R,C]; for independent labels, the sum of
    their entropies.
    """
    terms = _plogp(probs) + (_plogp(1 - probs) if info.problem == MULTI_LABEL else 0)
    summed: Floats = -terms.sum(axis=1)
    return summed


def _plogp(probs: Floats) -> Floats:
    """Return p·log p with 0·log 0 = 0; NaN stays NaN."""
    products: Floats = probs * np.log(np.where(probs == 0, np.float32(1), probs))
    return products
