"""The task heads of runs on a labelled file: what each scores, and on draws of its rows.

Runs that have no such head, or no student yet, are left out and named.
"""

import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rekindle.data.errors import InputError
from rekindle.pipeline.compare.runs import Comparison, RunFacts
from rekindle.pipeline.compare.scores import heads_of
from rekindle.pipeline.compare.standing import Draws, OnRows, Right, Standing, draw, standing_of
from rekindle.pipeline.progress import Progress
from rekindle.pipeline.report.scores import TaskScores
from rekindle.train.answers.config import AskConfig
from rekindle.train.answers.judge import open_judge
from rekindle.train.answers.labelled import read_labelled
from rekindle.train.answers.score import judged_scores
from rekindle.train.finetune.entities import entities
from rekindle.train.finetune.label_lists import SEVERAL, TAGS
from rekindle.train.finetune.metrics import (
    chosen_metric,
    named,
    predictions_of,
    printed_name,
    score,
)
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.model.unfinished import unfinished, usable_checkpoint

log = logging.getLogger("rekindle")

Score = Callable[[NDArray[np.int64]], float]  # of some rows


def with_heads(
    comparison: Comparison,
    tests: Sequence[str],
    metric: str | None,
    progress: Progress,
    config: AskConfig | None = None,
) -> Comparison:
    """The comparison with the standings of the runs' heads on ``tests`` before its own.

    A test is ``HEAD=FILE``, or a file alone where every run has one head; ``config``
    says how they are read and asked. Raises InputError for
    files and heads that are not there, and as ``read_labelled`` does.
    """
    asked = [_asked(test, comparison.runs) for test in tests]
    config = config or AskConfig()
    found = [_standing(comparison.runs, *one, metric, config, progress) for one in asked]
    return replace(comparison, standings=[*found, *comparison.standings])


def _asked(test: str, runs: Sequence[RunFacts]) -> tuple[str, str]:
    """The head and the file that a test names."""
    head, equals, file = test.partition("=")
    known = list(dict.fromkeys(name for run in runs for name in run.heads))
    if not equals or (head not in known and Path(test).exists()):
        head, file = "", test
    told = f"the runs have the heads {', '.join(known)}" if known else "no run has a task head"
    if not known:
        _refuse_unfinished(test, head, file, runs)
    if not known or (head and head not in known):
        raise InputError(
            f"--test {test}: {told}{f', none is called {head!r}' if head else ''}. A distill term "
            "of a task's expert gives a student one"
        )
    if not head and len(known) > 1:
        raise InputError(f"--test {test}: {told}; say whose file it is, as in {known[0]}={file}")
    if not Path(file).is_file():
        raise InputError(f"--test {test}: there is no file {file}")
    return head or known[0], file


def _refuse_unfinished(test: str, head: str, file: str, runs: Sequence[RunFacts]) -> None:
    """Raise InputError where runs have no head because they have not ended."""
    places = [Path(run.directory) for run in runs]
    told = [words for place in places if (words := unfinished(place)) is not None]
    if not told:
        return
    also = ""
    for checkpoint in filter(None, map(usable_checkpoint, places)):
        heads = heads_of(checkpoint)
        if head in heads or (not head and len(heads) == 1):
            own = ["--head", head or heads[0]]
            line = shlex.join(["pipeline", "evaluate", str(checkpoint), "--test", file, *own])
            also = f". A checkpoint alone is scored by `{line}`"
            break
    raise InputError(f"--test {test}: {'; '.join(told)}{also}")


def _standing(
    runs: Sequence[RunFacts],
    head: str,
    file: str,
    metric: str | None,
    config: AskConfig,
    progress: Progress,
) -> Standing:
    having = [run for run in runs if head in run.heads]
    for run in runs:
        if run not in having:
            why = "has no head" if run.finished else "has not ended: it has no head"
            log.info("%s %s %s, and is not scored on %s", run.name, why, head, file)
    measured, scores = "", dict[str, list[float]]()
    draws: dict[str, Draws] = {}
    rights: dict[str, Right] = {}
    with progress.task(f"scoring {head}", "runs", len(having)) as task:
        for run in having:
            judge = open_judge(run.directory, head)
            data = read_labelled(file, judge, config)
            metric = chosen_metric(metric, data)
            measured = printed_name(metric, data.problem, len(data.label_names))
            found, logits, _ = judged_scores(judge, data, config, name=file)
            scores[run.name] = [found[metric]]
            of_rows, right = _score(data, logits, judge.labels, metric)
            draws[run.name] = draw(of_rows, len(data))
            rights |= {} if right is None else {run.name: right}
            task.advance()
    task_scores = TaskScores(head, metric or "", Path(file).name, scores, measured=measured)
    standing = standing_of(task_scores, OnRows(len(data), draws, rights))
    assert standing is not None  # one at least has the head
    return standing


def _score(
    data: TaskData, logits: np.ndarray, names: Sequence[str], metric: str
) -> tuple[Score, Right | None]:
    """The score of any rows of ``data``, and which rows are right where that alone is scored.

    ``names`` are those of the outputs [C] of ``logits``, all of which ``data`` knows.
    """
    if data.problem == TAGS:
        return _score_of_tags(data, logits, metric), None
    predictions = predictions_of(data.problem, logits, data.threshold)
    places = [data.label_names.index(name) for name in names] if data.label_names else []
    if data.problem == SEVERAL:
        columns = [
            predictions[:, [at == place for at in places]].any(axis=1)
            for place in range(data.outputs)
        ]
        predictions = np.stack(columns, axis=1)
    elif places:
        predictions = np.array(places)[predictions]
    how = {"num_classes": data.outputs, "positive": data.positive_index or 0}
    right = predictions == data.labels
    by_row = {"accuracy": right, "subset_accuracy": right.all(axis=-1)}.get(metric)
    return lambda rows: score(metric, predictions[rows], data.labels[rows], **how), by_row


def _score_of_tags(data: TaskData, logits: np.ndarray, metric: str) -> Score:
    """By text: tags that are right of all, or entities that are right of those said and those that
    there are.
    """
    said, true = named(data, predictions_of(TAGS, logits)), named(data, data.labels)
    right, both = np.zeros(len(data)), np.zeros(len(data))
    for row, (own, wanted) in enumerate(zip(said, true, strict=True)):
        assert isinstance(own, list)
        assert isinstance(wanted, list)
        if metric == "accuracy":
            right[row] = sum(a == b for a, b in zip(own, wanted, strict=True))
            both[row] = len(wanted)
        else:
            given, there = entities(own), entities(wanted)
            right[row], both[row] = 2 * len(given & there), len(given) + len(there)
    return lambda rows: float(right[rows].sum() / max(1.0, both[rows].sum()))
