"""Commands about one model: fine-tune an expert, score and ask it, and export a student."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rekindle.data.errors import InputError
from rekindle.data.places import address_of
from rekindle.data.storage.client import is_remote
from rekindle.pipeline.commands.options import (
    Force,
    HeadName,
    Json,
    LabelField,
    Metric,
    ModelPlace,
    Overrides,
    TextField,
)
from rekindle.pipeline.console import say
from rekindle.pipeline.exits import interruptible, line_with, resumption_unknown

if TYPE_CHECKING:
    from rekindle.train.export.merged import Merged
    from rekindle.train.export.result import Exported
    from rekindle.train.finetune.config import FinetuneConfig


def finetune(
    model: ModelPlace,
    # No Path: it would drop the ./ that tells a folder of one's own from a built-in name.
    train: Annotated[str, typer.Option(help="labelled task: jsonl, csv, tsv or parquet")],
    dev: Annotated[str, typer.Option(help="the split that models are scored on")],
    out: Annotated[Path, typer.Option(help="the expert's directory")],
    seeds: Annotated[
        int, typer.Option(min=1, help="runs, each with its own seed; the best on dev is kept")
    ] = 1,
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy, f1, matthews; of lists of labels f1_micro, f1_macro, subset_accuracy; "
            "of scores pearson, spearman; of documents in groups ndcg@10, mrr, map"
        ),
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="NAME", help="continue from this task head of a student")
    ] = None,
    text_field: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="the column of the text; twice for pairs of texts"),
    ] = None,
    label_field: Annotated[
        str | None, typer.Option(metavar="FIELD", help="the column of the label")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier result")] = False,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on a labelled task into an expert: a classifier that can teach."""
    from rekindle.data.settings import parse_settings
    from rekindle.pipeline.builtin.missing import make_missing
    from rekindle.pipeline.builtin.names import resolve_name, resolve_values
    from rekindle.pipeline.overrides import set_value
    from rekindle.train.finetune.config import FinetuneConfig

    values: dict[str, object] = {}
    for override in set_ or []:
        set_value(values, override)
    options = {"text_field": text_field, "label_field": label_field, "head": head}
    for key, value in options.items():
        if value and key in values:
            option = f"--{key.replace('_', '-')}"
            raise InputError(f"{option} and --set {key}=… set the same value; give one of them")
        values |= {key: value} if value else {}
    model, train_file, dev_file = map(resolve_name, (model, train, dev))
    config = parse_settings(FinetuneConfig, resolve_values(values), "--set")
    make_missing(model, train_file, dev_file, config)
    from rekindle.train.answers import score
    from rekindle.train.finetune import run
    from rekindle.train.finetune.result import EarlierResult
    from rekindle.train.record.stored_result import local_result

    place = address_of(out) or str(out)
    try:
        with interruptible(resumption_unknown), local_result(out, force) as target:
            files = (model, train_file, dev_file, str(target))
            if config.epochs:
                result = run.finetune(
                    *files, seeds=seeds, metric=metric, config=config, force=force
                )
            elif seeds == 1:
                if config.merge is None:
                    command = _evaluate_command(model, dev, metric, config, set_ or [])
                    say(f"nothing is trained; without --train: {command}")
                result = score.score_model(*files, metric=metric, config=config, force=force)
            else:
                raise InputError("with epochs=0 nothing is trained: leave --seeds out")
    except EarlierResult as error:
        raise InputError(f"{error}: {line_with('--force')}") from None
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
        return
    if result.baselines is not None:
        typer.echo(score.baselines_table(result.baselines))
    spread = f" ± {result.std:.4f} over {seeds} seeds" if result.std is not None else ""
    epochs_note = ", at their best epochs" if spread and config.patience else ""
    typer.echo(f"{result.shown_metric} on {dev}: {result.mean:.4f}{spread}{epochs_note}")
    if result.kept_model is not None:
        typer.echo(f"kept: {result.kept_model}")
    typer.echo(f"expert: {place}" if config.epochs else f"scores: {place}")
    if config.epochs:
        from rekindle.pipeline.commands.next_commands import next_commands

        say("Next, with a FILE of yours:")
        for line in next_commands(place, result):
            say(f"  {line}")


def _evaluate_command(
    model: str, dev: str, metric: str | None, config: "FinetuneConfig", sets: Sequence[str]
) -> str:
    """Return the command that scores a model in the same way, as it is typed."""
    from rekindle.train.answers.config import AskConfig

    arguments: list[tuple[str, str | None]] = [("--test", dev), ("--head", config.head)]
    arguments += [("--metric", metric), *(("--text-field", name) for name in config.text_field)]
    arguments += [("--label-field", config.label_field if config.label_field != "label" else None)]
    ask_keys = AskConfig.model_fields.keys() - {"text_field", "label_field"}
    arguments += [
        ("--set", setting) for setting in sets if re.split("[.=]", setting)[0].strip() in ask_keys
    ]
    options = [part for name, value in arguments if value is not None for part in (name, value)]
    return shlex.join(["pipeline", "evaluate", model, *options])


def evaluate(
    model: ModelPlace,
    test: Annotated[
        str | None, typer.Option(help="labelled rows: scores (jsonl, csv, tsv or parquet)")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="plain text: perplexity (jsonl, csv, tsv, parquet: each row is a text; txt: "
            "texts separated by blank lines)"
        ),
    ] = None,
    head: HeadName = None,
    metric: Metric = None,
    text_field: TextField = None,
    label_field: LabelField = None,
    out: Annotated[
        Path | None,
        typer.Option(help="with --test: a file for the predictions of all rows (jsonl)"),
    ] = None,
    force: Force = False,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Score an expert, or a student's head, on labelled rows; a language model on plain text."""
    if (test is None) == (text is None):
        raise InputError(
            "give either --test (labelled rows: the scores of an expert, or of a student's head) "
            "or --text (plain text: the perplexity of a language model)"
        )
    if text is not None:
        label_options = {
            "--head": head,
            "--metric": metric,
            "--label-field": label_field,
            "--out": out,
        }
        for option, value in label_options.items():
            if value is not None:
                raise InputError(f"{option} is for labelled rows (--test), not for --text")
        from rekindle.pipeline.commands import asking

        result = asking.measure_perplexity(model, text, text_field, set_)
        typer.echo(json.dumps(result.as_dict()) if as_json else result.summary())
        return
    from rekindle.pipeline.commands import asking

    out_file = None if out is None else str(out)
    fields = (text_field, label_field)
    evaluation = asking.score_model(model, str(test), head, metric, out_file, force, fields, set_)
    typer.echo(json.dumps(evaluation.as_dict()) if as_json else evaluation.summary())


def predict(
    model: ModelPlace,
    text: Annotated[
        str,
        typer.Option(
            help="rows: jsonl, csv, tsv, parquet, arrow, txt (each line is a text); - is jsonl "
            "from stdin"
        ),
    ],
    out: Annotated[str, typer.Option(help="the file of predictions (jsonl); - is stdout")],
    head: HeadName = None,
    text_field: TextField = None,
    force: Force = False,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Predict each row with an expert, or a student's head: labels and probabilities."""
    if as_json and out == "-":
        raise InputError("--json and --out - would both write to stdout; give a file with --out")
    from rekindle.pipeline.commands import asking

    result = asking.write_predictions(model, text, out, head, force, text_field, set_)
    if out != "-":
        typer.echo(json.dumps(result.as_dict()) if as_json else result.summary())


def generate(
    model: ModelPlace,
    prompts: Annotated[
        str,
        typer.Option(
            help="rows with messages, for the chat template, or with a text to continue (prompt, "
            "text): jsonl, csv, tsv, parquet, arrow, txt"
        ),
    ],
    out: Annotated[str, typer.Option(help="the file of rows of tokens (jsonl)")],
    force: Force = False,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Have a causal LM answer prompts: rows of tokens for a corpus (corpus.format: tokens)."""
    from rekindle.pipeline.commands import asking

    result = asking.generate_rows(model, prompts, out, force, set_)
    typer.echo(json.dumps(result.as_dict()) if as_json else result.summary())


def export(
    model: Annotated[
        str, typer.Argument(metavar="STUDENT", help="a student's directory, or a checkpoint of one")
    ],
    out: Annotated[Path, typer.Option(help="the new folder")],
    head: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="which of its task heads; default: its only one"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export")] = False,
    as_json: Json = False,
) -> None:
    """Write a student's task head, with its body, as a folder that plain transformers loads."""
    from rekindle.pipeline.builtin.names import resolve_name
    from rekindle.train.export.folder import export_head
    from rekindle.train.record.stored_result import local_result

    with interruptible(), local_result(out, force) as target:
        exported = export_head(resolve_name(model), str(target), head, force=force)
    _print_written("exported", exported, as_json)


def merge_adapter(
    model: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT",
            help="a student that is an adapter (student.lora), or a checkpoint of one",
        ),
    ],
    out: Annotated[Path, typer.Option(help="the new folder")],
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export")] = False,
    as_json: Json = False,
) -> None:
    """Merge a student that is an adapter into its base, and write the whole model."""
    from rekindle.pipeline.builtin.names import resolve_name
    from rekindle.train.export.merged import merge_student
    from rekindle.train.record.stored_result import local_result

    with interruptible(), local_result(out, force) as target:
        merged = merge_student(resolve_name(model), str(target), force=force)
    _print_written("merged", merged, as_json)


def _print_written(verb: str, result: "Exported | Merged", as_json: bool) -> None:
    """Print where a model was written, and the code that loads it."""
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
        return
    typer.echo(f"{verb}: {result.out}")
    copy_note = ", in a local copy of that folder" if is_remote(result.out) else ""
    say(f"{result.describe()}. With transformers alone{copy_note}:")
    folder = result.out.rpartition("/")[2] if copy_note else result.out
    say(f"  transformers.{result.auto_class}.from_pretrained({json.dumps(folder)})")
