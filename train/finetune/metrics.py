"""The scores of finished predictions (scikit-learn, scipy): GLUE's, and those of several labels and
of entities. Knows no model and no file.

A correlation with a constant side is undefined; here it is 0.0, as a model that always gives the
same answer has found nothing, and a NaN would make every later mean NaN.
"""

import logging
import math
import warnings
from collections.abc import Sequence

import numpy as np
from scipy import stats
from sklearn import metrics

from rekindle.data.errors import InputError
from rekindle.train.finetune.entities import entity_f1, tags_entities
from rekindle.train.finetune.label_lists import SEVERAL, TAGS
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.ranking.kinds import RANKING
from rekindle.train.ranking.scores import NAMES, ranking_scores

logger = logging.getLogger("rekindle")

METRICS = {  # the first of each is the default
    "single_label_classification": ("accuracy", "f1", "matthews"),
    SEVERAL: ("f1_micro", "f1_macro", "subset_accuracy"),
    TAGS: ("f1", "accuracy"),
    "regression": ("pearson", "spearman"),
    RANKING: NAMES,
}


def chosen_metric(metric: str | None, data: TaskData) -> str:
    """Return ``metric``, or the default: accuracy for classes and tags, F1 for entities and if
    several labels may hold, Pearson's correlation for scores, and NDCG@10 for documents in groups.

    Raises InputError if it does not fit the problem, with those that do; also for the F1 of two
    classes of which none is positive.
    """
    problem = data.problem
    fitting = METRICS[problem]
    if problem == TAGS and not tags_entities(data.label_names):
        fitting = tuple(m for m in fitting if m != "f1")
    elif metric == "f1" in fitting and len(data.label_names) == 2 and data.positive is None:
        raise InputError(
            f"metric f1 needs one of the classes {' and '.join(data.label_names)}; say which "
            f"with positive, as in positive={data.label_names[1]}"
        )
    if metric is not None and metric not in fitting:
        raise InputError(
            f"metric {metric!r} does not fit a {problem} task; use one of: {', '.join(fitting)}"
        )
    return metric or fitting[0]


def printed_name(metric: str, problem: str, classes: int) -> str:
    """Return the printed name of ``metric``, with what its F1 is of: entities, or the mean over
    more than two ``classes``. That of one class of two is ``f1``, as in GLUE.
    """
    if metric != "f1":
        return metric
    if problem == TAGS:
        return "entity f1"
    return "macro f1" if classes > 2 else metric


def score(
    metric: str,
    predictions: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int | None = None,
    positive: int = 1,
) -> float:
    """Return one score; higher is better for every metric.

    ``predictions`` and ``labels`` [N]: class indices, or floats for the correlations, which are
    averaged over the outputs of [N,C]. ``f1`` is that of the class ``positive`` if the task has two
    classes (GLUE: MRPC, QQP) and the unweighted mean over the occurring classes otherwise;
    ``num_classes``, those of the task (a model may know more), defaults to the largest index + 1.
    For bool [N,C], which labels hold, ``f1_micro`` counts all labels of all rows, ``f1_macro`` is
    the mean over the labels that occur, ``subset_accuracy`` the share of rows that are all right.
    Raises ValueError for arrays of unequal or zero length.
    """
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    if metric in METRICS[SEVERAL]:
        return _score_of_several(metric, predictions, labels)
    if labels.ndim > 1:
        each = zip(predictions.T, labels.T, strict=True)
        return float(np.mean([score(metric, *one) for one in each]))
    with warnings.catch_warnings():  # about correlations that are undefined, or nearly so
        warnings.simplefilter("ignore")
        if metric == "accuracy":
            value = metrics.accuracy_score(labels, predictions)
        elif metric == "f1":
            classes = num_classes or int(max(np.max(predictions), np.max(labels))) + 1
            f1_labels = [positive] if classes <= 2 else None
            value = metrics.f1_score(
                labels, predictions, labels=f1_labels, average="macro", zero_division=0.0
            )
        elif metric == "matthews":
            value = metrics.matthews_corrcoef(labels, predictions)
        else:
            correlate = stats.pearsonr if metric == "pearson" else stats.spearmanr
            doubles = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
            value = correlate(*doubles).statistic if len(labels) > 1 else 0.0
    return float(value) if math.isfinite(value) else 0.0


def _score_of_several(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    if metric == "subset_accuracy":
        return float((predictions == labels).all(axis=1).mean())
    occurs = predictions.any(axis=0) | labels.any(axis=0)
    if not occurs.any():
        return 0.0
    pair = labels[:, occurs], predictions[:, occurs]
    if pair[0].shape[1] == 1:  # to scikit-learn these would be two classes
        return float(metrics.f1_score(pair[0][:, 0], pair[1][:, 0], zero_division=0.0))
    average = metric.removeprefix("f1_")
    return float(metrics.f1_score(*pair, average=average, zero_division=0.0))


def predictions_of(problem: str, logits: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Return the class with the largest logit, the labels at least as probable as ``threshold``, or
    the scores themselves: logits [N,C] -> [N], bool [N,C], or [N,C] for several scores.

    For tags a row of NaN, a word that was not read, has the class -1.
    """
    if problem == SEVERAL:
        return logits >= np.float32(np.log(threshold / (1 - threshold)))
    if problem == TAGS:
        unread = np.isnan(logits).all(axis=1)
        return np.where(unread, -1, np.where(unread[:, None], 0.0, logits).argmax(axis=1))
    if problem not in ("regression", RANKING):
        return logits.argmax(axis=1)
    return logits[:, 0] if logits.shape[1] == 1 else logits


def as_file_labels(data: TaskData, values: np.ndarray) -> list[object]:
    """Return labels, or ``predictions_of``, as files have them, for each text: a class's name, the
    names of those that hold, one name per word (None: it was not read), or scores.
    """
    if not data.label_names:
        return [*values.tolist()]
    names = np.array([*data.label_names, None], object)  # the last one stands for -1
    if data.problem == SEVERAL:
        return [names[:-1][row].tolist() for row in values]
    return (
        [*data.by_text(names[values].tolist())] if data.problem == TAGS else names[values].tolist()
    )


def scores_of(
    data: TaskData, logits: np.ndarray, names: Sequence[str] | None = None
) -> dict[str, float]:
    """Return every metric that fits ``data``, from logits [N,C] (for tags [W,C], with NaN for words
    that were not read, which count as outside entities, and as wrong).

    ``names`` [C] are the labels of the columns, if not those of ``data`` in its order: they include
    all of these and perhaps more. Raises InputError as ``all_scores`` does.
    """
    problem, known_names = data.problem, [*(names or data.label_names)]
    columns = np.array([known_names.index(name) for name in data.label_names], np.int64)
    if data.groups is not None:
        check_finite(logits)
        return ranking_scores(logits[:, 0], data.labels, data.groups)
    if problem == "regression":
        return all_scores(problem, logits, data.labels)
    if problem == SEVERAL:
        labels = np.zeros((len(data), len(known_names)), bool)
        labels[:, columns] = data.labels
        return all_scores(problem, logits, labels, threshold=data.threshold)
    labels = columns[data.labels]
    if problem == TAGS:
        tags = np.array([*known_names, None], object)
        predicted = predictions_of(problem, logits)
        scores = {"accuracy": float((predicted == labels).mean()) if len(labels) else 0.0}
        if tags_entities(data.label_names):
            each = (data.by_text(tags[one].tolist()) for one in (predicted, labels))
            scores = {"f1": entity_f1(*each)} | scores
        return scores
    positive = None if data.positive is None else known_names.index(data.positive)
    return all_scores(problem, logits, labels, positive, data.outputs)


def all_scores(
    problem: str,
    logits: np.ndarray,
    labels: np.ndarray,
    positive: int | None = None,
    task_classes: int | None = None,
    threshold: float = 0.5,
) -> dict[str, float]:
    """Return every metric that fits ``problem``, from logits [N,C] ([N,1] for a regression), labels
    [N] ([N,C] for a regression of several scores, and bool [N,C] if several labels may hold).

    ``positive`` is the class for F1 if the task has two; without it two classes have no F1.
    ``task_classes`` are those of the task, if the model may know more. Raises InputError for logits
    that are not finite: the model has diverged.
    """
    check_finite(logits)
    predictions = predictions_of(problem, logits, threshold)
    classes = task_classes or logits.shape[1]
    fitting = [m for m in METRICS[problem] if m != "f1" or classes > 2 or positive is not None]
    options = {"num_classes": classes, "positive": positive or 0}
    return {metric: score(metric, predictions, labels, **options) for metric in fitting}


def log_undefined_scores(name: str, data: TaskData) -> None:
    """Log which scores of a scored split are undefined, or which classes a mean is over."""
    if data.problem == "regression":
        outputs = data.labels.reshape(len(data), -1).T
        for number, scores in enumerate(outputs):
            if (scores == scores[0]).all():
                output = f" number {number}" if len(outputs) > 1 else ""
                consequence = "0 counts in the mean" if output else "0 is written"
                logger.warning(
                    f"every score{output} of {name} is {scores[0]:g}: a correlation is not "
                    f"defined, {consequence}"
                )
    if not data.label_names:
        return
    counts, has_label_lists = data.counts, data.problem == SEVERAL
    occurring = [label for label, count in counts.items() if count]
    if data.problem == TAGS or len(occurring) == len(counts):
        return
    if len(occurring) == 1 and not has_label_lists:
        logger.warning(
            f"every label of {name} is {occurring[0]!r}: matthews is not defined, 0 is written"
        )
    if has_label_lists or len(counts) > 2:
        kind, metric = ("labels", "f1_macro") if has_label_lists else ("classes", "f1")
        logger.info(
            f"{name}: {len(occurring)} of {len(counts)} {kind} have rows; {metric} is the mean "
            "over these, and over those that are predicted without any (each counts 0)"
        )


def check_finite(logits: np.ndarray) -> None:
    """Raise InputError for logits that are not finite: the model has diverged."""
    if not np.isfinite(logits).all():
        raise InputError(
            "the model's outputs are not finite: its training diverged (lower the learning_rate or "
            "lengthen the warmup), or its weights are damaged (give a sound checkpoint)"
        )
