"""Score the task heads of runs, and experts beside them, on a labelled file and on draws of its
rows.

Runs without such a head, or without a student yet, are left out and named.
"""

import logging
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rekindle.data.errors import InputError
from rekindle.data.text_files import is_file
from rekindle.pipeline.compare.runs import Comparison, RunFacts
from rekindle.pipeline.compare.scores import heads_of
from rekindle.pipeline.compare.standing import Draws, OnRows, Right, Standing, draw, standing_of
from rekindle.pipeline.progress import Progress
from rekindle.pipeline.report.scores import TaskScores
from rekindle.train.answers.config import AskConfig
from rekindle.train.answers.encoder import open_text_judge
from rekindle.train.answers.evaluate import check_pairs, metric_of
from rekindle.train.answers.judge import Judge, open_judge
from rekindle.train.answers.labelled import read_labelled, with_problem
from rekindle.train.answers.recorded import ExpertRecord, fill_own_settings, read_expert_record
from rekindle.train.answers.score import judged_scores
from rekindle.train.embedding.folder import check_encoder_folder, is_encoder_folder
from rekindle.train.finetune.entities import entities
from rekindle.train.finetune.label_lists import SEVERAL, TAGS
from rekindle.train.finetune.metrics import (
    as_file_labels,
    predictions_of,
    printed_name,
    score,
)
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.finetune.task_files import read_file
from rekindle.train.model.folder import resolve_model
from rekindle.train.model.unfinished import describe_unfinished, usable_checkpoint
from rekindle.train.ranking.scores import scores_by_group
from rekindle.train.student import ABOUT_FILE, saved_heads

log = logging.getLogger("rekindle")

Score = Callable[[NDArray[np.int64]], float]  # of some rows


@dataclass(frozen=True)
class _Entrant:
    """What is scored: a run's student, or an expert (which has no ``head``)."""

    name: str
    place: str
    head: str | None = None

    @property
    def before(self) -> ExpertRecord:
        """Return how an expert was fine-tuned."""
        return (
            ExpertRecord()
            if self.head is not None
            else read_expert_record(resolve_model(self.place))
        )


def with_heads(
    comparison: Comparison,
    tests: Sequence[str],
    metric: str | None,
    progress: Progress,
    config: AskConfig | None = None,
    experts: Sequence[str] = (),
) -> Comparison:
    """Return the comparison with the standings of the runs' heads on ``tests`` before its own.

    A test is ``HEAD=FILE``, or only a file if every run has one head. ``experts`` are given in the
    same way, as a place with or without a head; each is scored beside the runs' heads on that
    head's file. ``config`` says how all of them are read and asked; where it is silent on how an
    expert cuts texts and from which probability its labels hold, the values of its fine-tuning
    count.

    Raise InputError for missing files, heads and experts, and as ``read_labelled`` does; for files
    without the columns, before any model is loaded.
    """
    runs, config = comparison.runs, config or AskConfig()
    asked = [_asked(test, runs) for test in tests]
    beside = _experts(experts, list(dict.fromkeys(head for head, _ in asked)), runs)
    for head, file in asked:
        read_file(file, with_problem(config, TAGS if _tags(head, runs) else ""))
    found = []
    for head, file in asked:
        own = _students(head, file, runs)
        with progress.task(f"scoring {head}", "models", len(own) + len(beside[head])) as task:
            found.append(_standing(head, file, own, beside[head], metric, config, task.advance))
    return replace(comparison, standings=[*found, *comparison.standings])


def head_and_place(given: str) -> tuple[str, str]:
    """Split ``[HEAD=]PLACE``. The name of a head never looks like a path, with a slash, ~ or $."""
    head, equals, place = given.partition("=")
    return (head, place) if equals and not re.search(r"^~|[/$]", head) else ("", given)


def _asked(test: str, runs: Sequence[RunFacts]) -> tuple[str, str]:
    """Return the head and the file that a test names."""
    head, file = head_and_place(test)
    known = list(dict.fromkeys(name for run in runs for name in run.heads))
    if head and head not in known and Path(test).exists():
        head, file = "", test
    told = f"the runs have the heads {', '.join(known)}" if known else "no run has a task head"
    if not known:
        _refuse_unfinished(test, head, file, runs)
    if not known or (head and head not in known):
        raise InputError(
            f"--test {test}: {told}{f', none is called {head!r}' if head else ''}. A distill term "
            "for a task expert gives a student a head"
        )
    if not head and len(known) > 1:
        raise InputError(
            f"--test {test}: {told}; say which head the file is for, as in {known[0]}={file}"
        )
    if not is_file(file):
        raise InputError(
            f"--test {test}: there is no file {file}; give a jsonl, csv, tsv or parquet file"
        )
    return head or known[0], file


def _refuse_unfinished(test: str, head: str, file: str, runs: Sequence[RunFacts]) -> None:
    """Raise InputError if runs have no head because they have not ended."""
    places = [Path(run.directory) for run in runs]
    told = [words for place in places if (words := describe_unfinished(place)) is not None]
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


def _experts(
    given: Sequence[str], heads: Sequence[str], runs: Sequence[RunFacts]
) -> dict[str, list[_Entrant]]:
    """Return the experts beside each head. Raise InputError if it is unclear which head an expert
    belongs to, or if it is not an expert.
    """
    found: dict[str, list[_Entrant]] = {head: [] for head in heads}
    taken = {run.name for run in runs}
    there: set[tuple[str, Path]] = set()
    for one in given:
        head, place = head_and_place(one)
        if head and head not in heads and Path(one).exists():
            head, place = "", one
        told = f"--expert {one}: --test gives a file for {', '.join(heads)}"
        if head and head not in heads:
            raise InputError(f"{told}, and none for {head!r}")
        if not head and len(heads) > 1:
            raise InputError(f"{told}; say which head the expert is for, as in {heads[0]}={place}")
        directory = resolve_model(place)
        if (directory / ABOUT_FILE).is_file():
            raise InputError(f"--expert {one}: it is a student; name its directory among the runs")
        own = head or heads[0], directory.resolve()
        if own in there:
            log.info("--expert %s is given twice, and scored once", one)
            continue
        there.add(own)
        names = (f"expert {Path(place).name}", f"expert {place}")
        name = next((name for name in names if name not in taken), names[-1])
        taken.add(name)
        found[own[0]].append(_Entrant(name, place))
    return found


def _students(head: str, file: str, runs: Sequence[RunFacts]) -> list[_Entrant]:
    """Return the runs' students that have a head; log the names of the others."""
    for run in runs:
        if head not in run.heads:
            why = "has no head" if run.finished else "has not ended: it has no head"
            log.info("%s %s %s, and is not scored on %s", run.name, why, head, file)
    return [_Entrant(run.name, run.directory, head) for run in runs if head in run.heads]


def _standing(
    head: str,
    file: str,
    students: Sequence[_Entrant],
    experts: Sequence[_Entrant],
    metric: str | None,
    config: AskConfig,
    done: Callable[[], None],
) -> Standing:
    """Score all on a file. Experts are asked first, so that a problem with one shows at once."""
    scores: dict[str, list[float]] = {one.name: [] for one in (*students, *experts)}
    draws: dict[str, Draws] = {}
    rights: dict[str, Right] = {}
    vectors = saved_heads(Path(students[0].place))[head].pooling  # None: no vectors
    for one in (*experts, *students):
        judge, before = _opened(one, vectors, config, file), one.before
        asked = fill_own_settings(config, before, one.name)
        data = read_labelled(file, judge, asked)
        check_pairs(before, data.pairs is not None, one.place, file)
        metric = metric_of(metric, judge.metric, data)
        found, logits, _ = judged_scores(judge, data, asked, name=file)
        scores[one.name] = [found[metric]]
        unit, size = "row", len(data)
        if data.groups is not None:
            each = scores_by_group(logits[:, 0], data.labels, data.groups)[metric]
            unit, size = "group", len(each)
            of_rows, right = _mean_of(each), None
        else:
            of_rows, right = _score(data, logits, judge.labels, metric)
        draws[one.name] = draw(of_rows, size)
        rights |= {} if right is None else {one.name: right}
        done()
    measured = printed_name(metric or "", data.problem, len(data.label_names))
    task_scores = TaskScores(head, metric or "", Path(file).name, scores, measured=measured)
    standing = standing_of(task_scores, OnRows(size, draws, rights, unit))
    assert standing is not None  # at least one has the head
    return standing


def _opened(one: _Entrant, vectors: str | None, config: AskConfig, file: str) -> Judge:
    """Load what is asked. Of a head that gives ``vectors`` (pooled so) these are its student's
    folder, sentence encoders, and plain ones, which are pooled as the student is; ``file`` must
    have pairs for them.
    """
    if vectors is None:
        return open_judge(one.place, one.head)
    plain = not is_encoder_folder(resolve_model(one.place, check_encoder_folder))
    asked = config.model_copy(update={"pooling": (config.pooling or vectors) if plain else None})
    if plain:
        log.info("%s is no sentence encoder: its states are pooled by %s", one.name, asked.pooling)
    pairs = read_file(file, with_problem(config, "")).pairs is not None
    return open_text_judge(one.place, None, asked, pairs, scored=file)


def _mean_of(each: NDArray[np.float64]) -> Score:
    return lambda rows: float(each[rows].mean())


def _tags(head: str, runs: Sequence[RunFacts]) -> bool:
    """Return whether a head labels tokens."""
    having = next(run for run in runs if head in run.heads)
    return saved_heads(Path(having.directory))[head].kind == "token"


def _score(
    data: TaskData, logits: np.ndarray, names: Sequence[str], metric: str
) -> tuple[Score, Right | None]:
    """Return the score of any rows of ``data``, and which rows are right if the score counts these.

    ``names`` belong to the outputs [C] of ``logits``; ``data`` knows all of them.
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
    """Count by text: right tags among all, or right entities among those predicted and those
    present.
    """
    said, true = (
        as_file_labels(data, predictions_of(TAGS, logits)),
        as_file_labels(data, data.labels),
    )
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
