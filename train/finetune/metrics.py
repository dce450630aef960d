"""The scores of GLUE on finished predictions (scikit-learn, scipy). Knows no model and no file.

A correlation with a constant side is undefined; here it is 0.0, for a model that always says the
same has found nothing, and a NaN would make every later mean NaN.
"""

import math
import warnings

import numpy as np
from scipy import stats
from sklearn import metrics

from rekindle.data.errors import InputError

METRICS = {
    "single_label_classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
}


def chosen_metric(metric: str | None, problem: str) -> str:
    """Return ``metric``, or accuracy for classes and Pearson's correlation for scores.

    Raises InputError where it does not fit ``problem``, with those that do.
    """
    fitting = METRICS[problem]
    if metric is not None and metric not in fitting:
        raise InputError(
            f"metric {metric!r} does not fit a {problem} task; use one of: {', '.join(fitting)}"
        )
    return metric or fitting[0]


def score(
    metric: str, predictions: np.ndarray, labels: np.ndarray, *, num_classes: int | None = None
) -> float:
    """One score; higher is better for every metric.

    ``predictions`` and ``labels`` [N]: class indices, or floats for the correlations. ``f1`` is
    that of class 1 where the task has two classes (GLUE: MRPC, QQP) and the unweighted mean over
    the occurring classes otherwise; ``num_classes`` is the largest index + 1 where it is not given.
    Raises ValueError for arrays of unequal or zero length.
    """
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    with warnings.catch_warnings():  # of correlations that are undefined, or nearly so
        warnings.simplefilter("ignore")
        if metric == "accuracy":
            value = metrics.accuracy_score(labels, predictions)
        elif metric == "f1":
            classes = num_classes or int(max(np.max(predictions), np.max(labels))) + 1
            average = "binary" if classes <= 2 else "macro"
            value = metrics.f1_score(labels, predictions, average=average, zero_division=0.0)
        elif metric == "matthews":
            value = metrics.matthews_corrcoef(labels, predictions)
        else:
            correlate = stats.pearsonr if metric == "pearson" else stats.spearmanr
            wide = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
            value = correlate(*wide).statistic if len(labels) > 1 else 0.0
    return float(value) if math.isfinite(value) else 0.0


def predictions_of(problem: str, logits: np.ndarray) -> np.ndarray:
    """The class of the largest logit, or the score itself: logits [N,C] (or [N,1]) -> [N]."""
    return logits[:, 0] if problem == "regression" else logits.argmax(axis=1)


def all_scores(problem: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every metric that fits ``problem``, from logits [N,C] ([N,1] for a regression), labels [N].

    Raises InputError for logits that are not finite: the model has diverged.
    """
    if not np.isfinite(logits).all():
        raise InputError(
            "the model's outputs are not finite: training diverged; lower the learning_rate or "
            "lengthen the warmup"
        )
    predictions = predictions_of(problem, logits)
    classes = logits.shape[1]
    return {
        metric: score(metric, predictions, labels, num_classes=classes)
        for metric in METRICS[problem]
    }
