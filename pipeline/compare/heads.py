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
from rekindle.pipeline.compare.standing import (
    Draws,
    RightRows,
    RowScores,
    Standing,
    draw,
    standing_of,
)
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
    """A model to score: a run's student, or an expert (which has no ``head``)."""

    name: str
    place: str
    head: str | None = None

    @property
    def fine_tuning(self) -> ExpertRecord:
        """Return the recorded settings of an expert's fine-tuning."""
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
    """Return the comparison with the standings of the runs' heads on ``tests``, placed before the
    existing ones.

    A test is ``HEAD=FILE``, or only a file if every run has one head. ``experts`` are given in the
    same way, as a place with or without a head; each is scored beside the runs' heads on that
    head's file. ``config`` says how files are read and models asked; where it does not set how an
    expert cuts texts, or from which probability its labels hold, the values of the expert's
    fine-tuning are used.

    Raise InputError for missing files, heads and experts, and as ``read_labelled`` does; for files
    without the columns, before any model is loaded.
    """
    runs, config = comparison.runs, config or AskConfig()
    head_files = [_parse_test(test, runs) for test in tests]
    experts_of = _experts(experts, list(dict.fromkeys(head for head, _ in head_files)), runs)
    for head, file in head_files:
        read_file(file, with_problem(config, TAGS if _labels_tokens(head, runs) else ""))
    standings = []
    for head, file in head_files:
        entrants = _students(head, file, runs), experts_of[head]
        with progress.task(f"scoring {head}", "models", sum(map(len, entrants))) as task:
            standings.append(_standing(head, file, *entrants, metric, config, task.advance))
    return replace(comparison, standings=[*standings, *comparison.standings])


def head_and_place(option: str) -> tuple[str, str]:
    """Split ``[HEAD=]PLACE``. The name of a head never looks like a path, with a slash, ~ or $."""
    head, equals, place = option.partition("=")
    return (head, place) if equals and not re.search(r"^~|[/$]", head) else ("", option)


def _parse_test(test: str, runs: Sequence[RunFacts]) -> tuple[str, str]:
    """Return the head and the file that a test names."""
    head, file = head_and_place(test)
    known = list(dict.fromkeys(name for run in runs for name in run.heads))
    if head and head not in known and Path(test).exists():
        head, file = "", test
    heads = f"the runs have the heads {', '.join(known)}" if known else "no run has a task head"
    if not known:
        _refuse_unfinished(test, head, file, runs)
    if not known or (head and head not in known):
        raise InputError(
            f"--test {test}: {heads}{f', none is called {head!r}' if head else ''}. A distill term "
            "for a task expert gives a student a head"
        )
    if not head and len(known) > 1:
        raise InputError(
            f"--test {test}: {heads}; say which head the file is for, as in {known[0]}={file}"
        )
    if not is_file(file):
        raise InputError(
            f"--test {test}: there is no file {file}; give a jsonl, csv, tsv or parquet file"
        )
    return head or known[0], file


def _refuse_unfinished(test: str, head: str, file: str, runs: Sequence[RunFacts]) -> None:
    """Raise InputError if runs have no head because they have not ended."""
    folders = [Path(run.directory) for run in runs]
    reasons = [reason for folder in folders if (reason := describe_unfinished(folder)) is not None]
    if not reasons:
        return
    advice = ""
    for checkpoint in filter(None, map(usable_checkpoint, folders)):
        heads = heads_of(checkpoint)
        if head in heads or (not head and len(heads) == 1):
            options = ["--test", file, "--head", head or heads[0]]
            line = shlex.join(["pipeline", "evaluate", str(checkpoint), *options])
            advice = f". A checkpoint alone is scored by `{line}`"
            break
    raise InputError(f"--test {test}: {'; '.join(reasons)}{advice}")


def _experts(
    options: Sequence[str], heads: Sequence[str], runs: Sequence[RunFacts]
) -> dict[str, list[_Entrant]]:
    """Return the experts beside each head. Raise InputError if it is unclear which head an expert
    belongs to, or if it is not an expert.
    """
    experts: dict[str, list[_Entrant]] = {head: [] for head in heads}
    used_names = {run.name for run in runs}
    seen: set[tuple[str, Path]] = set()
    for option in options:
        head, place = head_and_place(option)
        if head and head not in heads and Path(option).exists():
            head, place = "", option
        files = f"--expert {option}: --test gives a file for {', '.join(heads)}"
        if head and head not in heads:
            raise InputError(f"{files}, and none for {head!r}")
        if not head and len(heads) > 1:
            raise InputError(f"{files}; say which head the expert is for, as in {heads[0]}={place}")
        head, directory = head or heads[0], resolve_model(place)
        if (directory / ABOUT_FILE).is_file():
            raise InputError(
                f"--expert {option}: it is a student; name its directory among the runs"
            )
        if (head, directory.resolve()) in seen:
            log.info("--expert %s is given twice, and scored once", option)
            continue
        seen.add((head, directory.resolve()))
        names = (f"expert {Path(place).name}", f"expert {place}")
        name = next((name for name in names if name not in used_names), names[-1])
        used_names.add(name)
        experts[head].append(_Entrant(name, place))
    return experts


def _students(head: str, file: str, runs: Sequence[RunFacts]) -> list[_Entrant]:
    """Return the runs' students that have a head; log the names of the others."""
    for run in runs:
        if head not in run.heads:
            reason = "has no head" if run.finished else "has not ended: it has no head"
            log.info("%s %s %s, and is not scored on %s", run.name, reason, head, file)
    return [_Entrant(run.name, run.directory, head) for run in runs if head in run.heads]


def _standing(
    head: str,
    file: str,
    students: Sequence[_Entrant],
    experts: Sequence[_Entrant],
    metric: str | None,
    config: AskConfig,
    advance: Callable[[], None],
) -> Standing:
    """Score all models on a file. Experts come first, so that a problem with one shows at once."""
    scores: dict[str, list[float]] = {one.name: [] for one in (*students, *experts)}
    draws: dict[str, Draws] = {}
    rights: dict[str, RightRows] = {}
    vectors = saved_heads(Path(students[0].place))[head].pooling  # None: no vectors
    for one in (*experts, *students):
        judge, fine_tuning = _open_judge(one, vectors, config, file), one.fine_tuning
        own_config = fill_own_settings(config, fine_tuning, one.name)
        data = read_labelled(file, judge, own_config)
        check_pairs(fine_tuning, data.pairs is not None, one.place, file)
        metric = metric_of(metric, judge.metric, data)
        file_scores, logits, _ = judged_scores(judge, data, own_config, name=file)
        scores[one.name] = [file_scores[metric]]
        unit, size = "row", len(data)
        if data.groups is not None:
            by_group = scores_by_group(logits[:, 0], data.labels, data.groups)[metric]
            unit, size = "group", len(by_group)
            score_rows, right = _mean_score(by_group), None
        else:
            score_rows, right = _score(data, logits, judge.labels, metric)
        draws[one.name] = draw(score_rows, size)
        if right is not None:
            rights[one.name] = right
        advance()
    measured = printed_name(metric or "", data.problem, len(data.label_names))
    task_scores = TaskScores(head, metric or "", Path(file).name, scores, measured=measured)
    standing = standing_of(task_scores, RowScores(size, draws, rights, unit))
    assert standing is not None  # at least one has the head
    return standing


def _open_judge(one: _Entrant, vectors: str | None, config: AskConfig, file: str) -> Judge:
    """Load a model to score. ``vectors``: how the students' head pools vectors, None for other
    heads. Models beside such a head are sentence encoders, or plain models pooled in the same way;
    ``file`` must have pairs for them.
    """
    if vectors is None:
        return open_judge(one.place, one.head)
    is_plain = not is_encoder_folder(resolve_model(one.place, check_encoder_folder))
    pooling = (config.pooling or vectors) if is_plain else None
    if is_plain:
        log.info("%s is no sentence encoder: its states are pooled by %s", one.name, pooling)
    pairs = read_file(file, with_problem(config, "")).pairs is not None
    own_config = config.model_copy(update={"pooling": pooling})
    return open_text_judge(one.place, None, own_config, pairs, scored=file)


def _mean_score(by_group: NDArray[np.float64]) -> Score:
    return lambda groups: float(by_group[groups].mean())


def _labels_tokens(head: str, runs: Sequence[RunFacts]) -> bool:
    """Return whether a head labels tokens."""
    run = next(run for run in runs if head in run.heads)
    return saved_heads(Path(run.directory))[head].kind == "token"


def _score(
    data: TaskData, logits: np.ndarray, names: Sequence[str], metric: str
) -> tuple[Score, RightRows | None]:
    """Return a function that scores rows of ``data``, and, if its score is the share of right rows,
    which rows are right.

    ``names``: of the outputs [C] of ``logits``; ``data`` has all of them as labels.
    """
    if data.problem == TAGS:
        return _score_of_tags(data, logits, metric), None
    predictions = predictions_of(data.problem, logits, data.threshold)
    classes = [data.label_names.index(name) for name in names] if data.label_names else []
    if data.problem == SEVERAL:
        columns = [
            predictions[:, [own == number for own in classes]].any(axis=1)
            for number in range(data.outputs)
        ]
        predictions = np.stack(columns, axis=1)
    elif classes:
        predictions = np.array(classes)[predictions]
    options = {"num_classes": data.outputs, "positive": data.positive_index or 0}
    right = predictions == data.labels
    right_rows = {"accuracy": right, "subset_accuracy": right.all(axis=-1)}.get(metric)
    return lambda rows: score(metric, predictions[rows], data.labels[rows], **options), right_rows


def _score_of_tags(data: TaskData, logits: np.ndarray, metric: str) -> Score:
    """Return a function that scores rows by counts per text: right tags among all tags, or right
    entities among those predicted and those present.
    """
    predicted, true = (
        as_file_labels(data, predictions_of(TAGS, logits)),
        as_file_labels(data, data.labels),
    )
    right, total = np.zeros(len(data)), np.zeros(len(data))
    for row, (tags, true_tags) in enumerate(zip(predicted, true, strict=True)):
        assert isinstance(tags, list)
        assert isinstance(true_tags, list)
        if metric == "accuracy":
            right[row] = sum(a == b for a, b in zip(tags, true_tags, strict=True))
            total[row] = len(true_tags)
        else:
            own, present = entities(tags), entities(true_tags)
            right[row], total[row] = 2 * len(own & present), len(own) + len(present)
    return lambda rows: float(right[rows].sum() / max(1.0, total[rows].sum()))
