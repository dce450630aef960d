"""Score an expert, or a student's head, on a labelled file; write its predictions if asked."""

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rekindle.data.errors import InputError
from rekindle.data.source.rows import read_rows
from rekindle.data.source.sources import recorded_origin
from rekindle.data.storage.atomic import new_file
from rekindle.data.text_files import STDIN
from rekindle.train.answers.config import AskConfig
from rekindle.train.answers.encoder import open_text_judge
from rekindle.train.answers.judge import find_expert_record, tags_words
from rekindle.train.answers.labelled import read_labelled, with_problem
from rekindle.train.answers.recorded import ExpertRecord, fill_from_record
from rekindle.train.answers.score import judged_scores
from rekindle.train.answers.target import check_target
from rekindle.train.answers.watch import NOBODY, Watch
from rekindle.train.finetune.label_lists import TAGS
from rekindle.train.finetune.metrics import (
    METRICS,
    chosen_metric,
    log_undefined_scores,
    printed_name,
)
from rekindle.train.finetune.predictions import write_predictions
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.finetune.task_files import read_file
from rekindle.train.running_out import report_shortage

log = logging.getLogger("rekindle")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a model on one labelled file, and how both were read."""

    model: str
    head: str | None  # None for an expert
    test: str
    problem: str
    label_names: tuple[str, ...]  # the model's
    metric: str  # the one that is printed
    scores: dict[str, float]
    rows: int
    class_counts: dict[str, int]
    positive: str | None
    dropped: dict[str, int]
    cut: float  # share of the texts that were cut
    predictions: str | None  # the file they were written to
    seconds: float

    @property
    def value(self) -> float:
        """Return the score by ``metric``."""
        return self.scores[self.metric]

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values for JSON."""
        return {**asdict(self), "value": self.value}

    def summary(self) -> str:
        """Return the scores in lines, the chosen metric first."""
        names = [self.metric, *(name for name in self.scores if name != self.metric)]
        shown = {name: printed_name(name, self.problem, len(self.class_counts)) for name in names}
        lines = [f"{shown[name]} on {self.test}: {self.scores[name]:.4f}" for name in names]
        return "\n".join([*lines, *([f"predictions: {self.predictions}"] * bool(self.predictions))])


def evaluate_file(
    model: str,
    test: str,
    *,
    head: str | None = None,
    metric: str | None = None,
    out: str | None = None,
    config: AskConfig | None = None,
    force: bool = False,
    watch: Watch = NOBODY,
) -> Evaluation:
    """Score an expert, or a student's ``head``, on the labelled file ``test``; labels are matched
    by the model's own names. The predictions are written to ``out``, completely or not at all.

    Raises InputError for wrong files, models, heads or metrics; for labels that the model does not
    know, naming their rows; and for an ``out`` that exists, unless it holds predictions and
    ``force`` is given.
    """
    started = time.perf_counter()
    if out == STDIN:
        raise InputError("out is -, but only predict writes predictions to stdout; give a file")
    if out is not None:
        check_target(out, test, model, force)
    rows, record = read_rows(test), find_expert_record(model)
    # batch_size is taken over too: the last digits depend on it and should be those of
    # metrics.json.
    given_settings = config or AskConfig()
    settings = fill_from_record(
        given_settings, record, next(rows, {}).keys(), others=("batch_size",)
    )
    # Report wrong columns before a model is loaded.
    texts = read_file(test, with_problem(settings, TAGS if tags_words(model, head) else ""))
    check_pairs(record, texts.pairs is not None, model, test)
    judge = open_text_judge(model, head, settings, texts.pairs is not None, test)
    data = read_labelled(test, judge, settings, texts)
    metric = metric_of(metric, judge.metric or record.metric, data)
    answers = replace(judge.answers, threshold=settings.threshold)
    log.info("%s: %s", test, data.describe())
    log_undefined_scores(test, data)
    watch.expect(len(data))
    with report_shortage(Path(out or test), lambda: "", less_memory(settings)):
        scores, logits, cut = judged_scores(judge, data, settings, watch, name=test)
        if out is not None:
            with new_file(Path(out)) as file:
                write_predictions(file, data, answers, logits)
    return Evaluation(
        model=model,
        head=judge.head,
        test=test,
        problem=data.problem,
        label_names=judge.answers.names,
        metric=metric,
        scores=scores,
        rows=len(data),
        class_counts=data.counts,
        positive=data.positive,
        dropped=data.dropped,
        cut=cut,
        predictions=out,
        seconds=time.perf_counter() - started,
    )


def metric_of(requested: str | None, default: str | None, data: TaskData) -> str:
    """Return the metric that is asked for, or the model's ``default`` one if it fits the data."""
    default = default if default in METRICS[data.problem] else None
    if default == "f1" and len(data.label_names) == 2 and data.positive is None:
        default = None
    return chosen_metric(requested or default, data)


def check_pairs(record: ExpertRecord, has_pairs: bool, model: str, path: str) -> None:
    """Raise InputError for pairs if an expert was fine-tuned on single texts, and for single texts
    if it was fine-tuned on pairs.
    """
    if record.pairs in (None, has_pairs):
        return
    trained_on, given_texts = ("pairs of texts", "single texts")[:: 1 if record.pairs else -1]
    advice = f"name the {'two columns of the texts' if record.pairs else 'one column of the text'}"
    if path != STDIN and recorded_origin(path).format == "txt":
        advice = (
            "a txt has no columns; give a jsonl, csv, tsv or parquet file with two, and name them"
        )
    raise InputError(
        f"{model!r} was fine-tuned on {trained_on}, but {path} has {given_texts}: {advice} with "
        "--text-field"
    )


def less_memory(settings: AskConfig) -> str:
    """Return advice to lower the memory needed, with the current values."""
    return (
        f"Lower batch_size (now {settings.batch_size}) or max_length (now {settings.max_length}): "
        f"`--set batch_size={max(1, settings.batch_size // 2)}`"
    )
