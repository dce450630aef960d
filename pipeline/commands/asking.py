"""Runs finished models for the commands: resolves names, reads settings, shows progress."""

import os
from collections.abc import Sequence
from typing import TypeVar

from rekindle.data.errors import InputError
from rekindle.data.places import expanded
from rekindle.data.settings import Settings, parse_settings
from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.builtin.names import resolve_name, resolve_values
from rekindle.pipeline.compare.heads import head_and_place, with_heads
from rekindle.pipeline.compare.runs import Comparison
from rekindle.pipeline.overrides import set_value
from rekindle.pipeline.progress import Progress
from rekindle.train.answers.config import AskConfig, GenerateConfig, PerplexityConfig
from rekindle.train.answers.evaluate import Evaluation, evaluate_file
from rekindle.train.answers.generate import Generated, generate_file
from rekindle.train.answers.perplexity import Perplexity, text_perplexity
from rekindle.train.answers.predict import Predicted, predict_file
from rekindle.train.answers.target import check_target

S = TypeVar("S", bound=Settings)


def score_model(
    model: str,
    test: str,
    head: str | None,
    metric: str | None,
    out: str | None,
    force: bool,
    fields: tuple[Sequence[str] | None, str | None],
    sets: Sequence[str] | None,
) -> Evaluation:
    """Score an expert, or a student's head."""
    if out is not None:
        check_target(out, resolve_name(test), resolve_name(model), force)
    config = _config(AskConfig, sets, *fields)
    places = _places(model, test)
    with Progress.to_terminal() as progress, progress.task("evaluate", "rows") as task:
        return evaluate_file(
            *places, head=head, metric=metric, out=out, config=config, force=force, watch=task
        )


def score_heads(
    comparison: Comparison,
    tests: Sequence[str],
    metric: str | None,
    fields: tuple[Sequence[str] | None, str | None],
    sets: Sequence[str] | None,
    experts: Sequence[str],
) -> Comparison:
    """Score the heads of several runs, and experts beside them."""
    config = _config(AskConfig, sets, *fields)
    tests, experts = map(_resolve_experts, (tests, experts))
    with Progress.to_terminal() as progress:
        return with_heads(comparison, tests, metric, progress, config, experts)


def measure_perplexity(
    model: str, text: str, fields: Sequence[str] | None, sets: Sequence[str] | None
) -> Perplexity:
    """Measure a language model."""
    if fields and len(fields) > 1:
        raise InputError("--text-field is given twice, but --text takes one text of a record")
    config, places = _config(PerplexityConfig, sets), _places(model, text)
    with Progress.to_terminal() as progress, progress.task("evaluate", "tokens") as task:
        field = (fields or ["text"])[0]
        return text_perplexity(*places, text_field=field, config=config, watch=task)


def write_predictions(
    model: str,
    text: str,
    out: str,
    head: str | None,
    force: bool,
    fields: Sequence[str] | None,
    sets: Sequence[str] | None,
) -> Predicted:
    """Write the predictions of an expert, or of a student's head."""
    check_target(out, resolve_name(text), resolve_name(model), force)
    config, places = _config(AskConfig, sets, fields), _places(model, text)
    with Progress.to_terminal() as progress, progress.task("predict", "rows") as task:
        return predict_file(*places, out, head=head, config=config, force=force, watch=task)


def generate_rows(
    model: str, prompts: str, out: str, force: bool, sets: Sequence[str] | None
) -> Generated:
    """Have a language model continue prompts."""
    check_target(out, resolve_name(prompts), resolve_name(model), force)
    config, places = _config(GenerateConfig, sets), _places(model, prompts)
    with Progress.to_terminal() as progress, progress.task("generate", "prompts") as task:
        return generate_file(*places, out, config=config, force=force, watch=task)


def _resolve_experts(arguments: Sequence[str]) -> list[str]:
    """Return each ``[HEAD=]PLACE`` with its place as a path; make missing built-in ones."""
    heads_and_places = [
        ("", argument) if os.path.exists(argument) else head_and_place(argument)
        for argument in arguments
    ]
    places = [expanded(resolve_name(place)) for _, place in heads_and_places]
    make_missing(*places)
    pairs = zip(heads_and_places, places, strict=True)
    return [f"{head}={place}" if head else place for (head, _), place in pairs]


def _places(model: str, file: str) -> tuple[str, str]:
    """Return the paths of a model and a file that may be built in; make missing built-in ones."""
    places = resolve_name(model), resolve_name(file)
    make_missing(*places)
    return places


def _config(
    kind: type[S],
    sets: Sequence[str] | None,
    text_field: Sequence[str] | None = None,
    label_field: str | None = None,
) -> S:
    """Return the settings of ``--set`` and of the options that stand for some of them."""
    values: dict[str, object] = {}
    for setting in sets or ():
        set_value(values, setting)
    if text_field:
        values["text_field"] = [*text_field]
    if label_field is not None:
        values["label_field"] = label_field
    return parse_settings(kind, resolve_values(values), "--set")
