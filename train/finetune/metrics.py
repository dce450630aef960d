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
from rekindle.train.finetune.task_data import TaskData

METRICS = {
    "single_label_classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
}


def chosen_metric(metric: str | None, data: TaskData) -> str:
    """Return ``metric``, or accuracy for classes and Pearson's correlation for scores.

    Raises InputError where it does not fit the problem, with those that do; for the F1 of two
    classes of which none is positive.
    """
    problem = data.problem
    fitting = METRICS[problem]
    if metric == "f1" and len(data.label_names) == 2 and data.positive is None:
        raise InputError(
            f"metric f1 is that of one of the classes {' and '.join(data.label_names)}; say which "
            f"with positive, as in positive={data.label_names[1]}"
        )
    if metric is not None and metric not in fitting:
        raise InputError(
            f"metric {metric!r} does not fit a {problem} task; use one of: {', '.join(fitting)}"
        )
    return metric or fitting[0]


def score(
    metric: str,
    predictions: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int | None = None,
    positive: int = 1,
) -> float:
    """One score; higher is better for every metric.

    ``predictions`` and ``labels`` [N]: class indices, or floats for the correlations, whose mean is
    taken over the outputs of [N,C]. ``f1`` is that of the class ``positive`` where the task has two
    classes (GLUE: MRPC, QQP) and the unweighted mean over the occurring classes otherwise;
    ``num_classes``, those of the task (a model may know more), is the largest index + 1 where it is
    not given. Raises ValueError for arrays of unequal or zero length.
    """
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    if labels.ndim > 1:
        each = zip(predictions.T, labels.T, strict=True)
        return float(np.mean([score(metric, *one) for one in each]))
    with warnings.catch_warnings():  # of correlations that are undefined, or nearly so
        warnings.simplefilter("ignore")
        if metric == "accuracy":
            value = metrics.accuracy_score(labels, predictions)
        elif metric == "f1":
            classes = num_classes or int(max(np.max(predictions), np.max(labels))) + 1
            counted = [positive] if classes <= 2 else None
            value = metrics.f1_score(
                labels, predictions, labels=counted, average="macro", zero_division=0.0
            )
        elif metric == "matthews":
            value = metrics.matthews_corrcoef(labels, predictions)
        else:
            correlate = stats.pearsonr if metric == "pearson" else stats.spearmanr
            wide = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
            value = correlate(*wide).statistic if len(labels) > 1 else 0.0
    return float(value) if math.isfinite(value) else 0.0


def predictions_of(problem: str, logits: np.ndarray) -> np.ndarray:
    """The class of the largest logit, or the scores themselves: logits [N,C] -> [N], or [N,C] of
    several scores.
    """
    if problem != "regression":
        return logits.argmax(axis=1)
    return logits[:, 0] if logits.shape[1] == 1 else logits


def all_scores(
    problem: str,
    logits: np.ndarray,
    labels: np.ndarray,
    positive: int | None = None,
    task_classes: int | None = None,
) -> dict[str, float]:
    """Every metric that fits ``problem``, from logits [N,C] ([N,1] for a regression), labels [N]
    ([N,C] for a regression of several scores).

    ``positive`` is the class whose F1 counts where the task has two; without it there is no F1 of
    two. ``task_classes`` are those of the task, where the model may know more. Raises InputError
    for logits that are not finite: the model has diverged.
    """
    if not np.isfinite(logits).all():
        raise InputError(
            "the model's outputs are not finite: training diverged; lower the learning_rate or "
            "lengthen the warmup"
        )
    predictions = predictions_of(problem, logits)
    classes = task_classes or logits.shape[1]
    known = [m for m in METRICS[problem] if m != "f1" or classes > 2 or positive is not None]
    how = {"num_classes": classes, "positive": positive or 0}
    return {metric: score(metric, predictions, labels, **how) for metric in known}
