"""The head of an expert: its labels, as its config.json names them, and its problem type."""

import logging
from typing import Any

from rekindle.data.errors import InputError
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.model.labels import SAY_SCORES, check_label_names, gives_scores

log = logging.getLogger("rekindle")

SMALL_HEAD = 1000  # heads up to this many classes are kept whole


def head_info(config: TeacherConfig, settings: Any) -> dict[str, object]:
    """Return the fields of ``teacher.json`` that the head decides.

    Raises InputError if it does not fit the teacher's task.
    """
    labels = int(settings.num_labels)
    if labels > SMALL_HEAD:
        problem_text = "teacher %s has %d classes; all logits are kept (%d bytes a row)"
        log.warning(problem_text, config.name, labels, 4 * labels)
    if config.task == "regression" and labels != 1 and not gives_scores(settings):
        problem_text = (
            f"is a classifier of {labels} classes (problem_type {settings.problem_type} in its "
        )
        problem_text += "config.json); say `task: sequence_classification`"
        if settings.problem_type is None:
            problem_text = f"has {labels} outputs, which may be classes: {SAY_SCORES}; if they are "
            problem_text += "classes, say `task: sequence_classification`"
        raise InputError(f"teacher {config.name!r} {problem_text}")
    names = tuple(str(settings.id2label[i]) for i in range(labels))
    check_label_names(names, f"teacher {config.name!r}")
    if config.task == "token_classification":
        return {"label_names": names}
    default_problem = "regression" if labels == 1 else "single_label_classification"
    problem = settings.problem_type or default_problem
    if config.monte_carlo.passes and problem == "multi_label_classification":
        raise InputError(
            f"teacher {config.name!r} has {labels} labels that do not exclude each other; "
            "monte_carlo passes give the probabilities of classes that do. Set "
            "monte_carlo.passes to 0"
        )
    if config.task == "sequence_classification" and problem == "regression":
        raise InputError(f"teacher {config.name!r} is a regression model; say `task: regression`")
    return {
        "label_names": names,
        "problem": "regression" if config.task == "regression" else problem,
    }
