"""The command line: parse, call, report. Heavy imports wait until a command needs them.

The commands about a cache are in ``commands.caches`` and ``commands.exchange``, those about a model
in ``commands.models``, the others here.

stdout carries results, stderr everything else. Exit codes: 0 done; 2 wrong input; 3 a corrupt or
mismatched cache or checkpoint; 130 interrupted; 1 a bug of ours.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rekindle.data.errors import InputError, did_you_mean
from rekindle.pipeline.commands.caches import cache_teachers, gc, inspect_, plan, verify
from rekindle.pipeline.commands.exchange import export_targets, import_targets
from rekindle.pipeline.commands.models import (
    evaluate,
    export,
    finetune,
    generate,
    merge_adapter,
    predict,
)
from rekindle.pipeline.commands.options import (
    Command,
    Json,
    LabelField,
    Overrides,
    RunFile,
    Students,
    Sweeps,
    TextField,
)
from rekindle.pipeline.commands.sharing import push
from rekindle.pipeline.commands.teachers import teachers
from rekindle.pipeline.commands.version import take_options
from rekindle.pipeline.console import say, terminal
from rekindle.pipeline.exits import (
    INTERRUPTED,
    errors_as_exit_codes,
    is_main,
    leave,
    line_again,
    resumable,
    usage_as_input_errors,
)
from rekindle.train.launch import current_launch, is_one_of_many

app = typer.Typer(
    name="pipeline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # With a colour, click leaves the text alone, and ``console`` escapes it.
    context_settings={"help_option_names": ["-h", "--help"], "color": True},
    help="Rekindle: run experts once over a corpus, train many students from the cache.",
)


def demo(
    out: Annotated[Path, typer.Option(help="folder for all results")] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option(help="a smaller run with one seed, under 90 seconds on two cores")
    ] = False,
) -> None:
    """Run the whole cycle on Python's own documentation; nothing is downloaded."""
    current_launch()
    with resumable() as progress:
        from rekindle.pipeline.demo import closing_lines, run_demo

        results = run_demo(out, quick=quick, progress=progress)
    from rekindle.pipeline.cycle.page import printed

    typer.echo("\n".join([printed(out, results), "", *closing_lines(results)]))


def init(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="a method's name; --list shows them")
    ] = None,
    out: Annotated[Path, typer.Option(help="path of the new run file")] = Path("run.yaml"),
    list_: Annotated[
        bool, typer.Option("--list", help="list every recipe and what it does")
    ] = False,
) -> None:
    """Write a commented run file for a method. It runs as it is, and is meant to be edited."""
    from rekindle.pipeline.init import recipes, write_recipe

    if list_:
        purposes = recipes()
        width = max(map(len, purposes), default=0)
        for name, purpose in purposes.items():
            typer.echo(f"{name:{width}}  {purpose}")
        return
    if recipe is None:
        raise InputError(f"which recipe? There are: {', '.join(recipes())} (see --list)")
    commands = write_recipe(recipe, out)
    typer.echo(str(out))
    say(f"{out} is the recipe {recipe}: read it, change it. Next:")
    for command in commands:
        say(f"  {command}")


def schema(
    kind: Annotated[
        str,
        typer.Argument(metavar="[run|cycle]", help=("run: a run file; cycle: a file for rekindle")),
    ] = "run",
) -> None:
    """Print the JSON Schema of a run file; editors use it to complete and check keys. Save it
    (``> run.schema.json``) and begin the run file with
    ``# yaml-language-server: $schema=run.schema.json``.
    """
    from rekindle.pipeline.schema import KINDS, file_schema

    if kind not in KINDS:
        kinds_note = f"there are schemas of {' and '.join(KINDS)}{did_you_mean(kind, KINDS)}"
        raise InputError(f"{kind!r}: {kinds_note}")
    typer.echo(json.dumps(file_schema(kind), indent=2, ensure_ascii=False))


def train_student(
    run: RunFile,
    out: Annotated[Path | None, typer.Option(help="directory for the student")] = None,
    set_: Overrides = None,
    sweep: Sweeps = None,
    workers: Students = None,
    resume: Annotated[bool, typer.Option(help="continue an interrupted run or sweep")] = False,
) -> None:
    """Stage 2: train a student from the cache. The teachers are not needed."""
    run_folder = out or Path("runs") / run.stem
    from rekindle.pipeline.several_runs import DEFINITIONS, begun_in, check_begun, check_room
    from rekindle.train.record.stored_run import local_runs
    from rekindle.train.record.working_copy import local_folder, shown_folder

    current_launch()
    sweep_error: Exception | None = None
    with (
        resumable(lambda: begun_in(local_folder(run_folder)) is not None) as progress,
        local_runs(run_folder, resume, DEFINITIONS) as target,
    ):
        if resume:
            check_begun(target)
        elif is_main():
            check_room(target)
            if out is None:
                say(f"no --out given, so results go to {target}")
        from rekindle.pipeline.config import load_config
        from rekindle.pipeline.sweep.grid import plan_sweep

        place, texts = shown_folder(target), list[str]()
        if sweep:
            students = plan_sweep(run, sweep, set_)
            from rekindle.pipeline.compare.runs import compare_runs
            from rekindle.pipeline.compare.tables import as_text
            from rekindle.pipeline.sweep.run import SweepError, run_sweep

            failures = run_sweep(
                students, target, resume=resume, workers=workers, progress=progress
            )
            texts.append(as_text(compare_runs([target])))
            if failures:
                sweep_error = SweepError(failures, len(students))
                sweep_error.args = (str(sweep_error).replace(str(target), place),)
        elif workers is not None:
            raise InputError(
                "--workers is for --sweep; one student on several devices needs torchrun"
            )
        else:
            config = load_config(run, set_)
            if not config.stages:
                config.needed_student()
            from rekindle.pipeline.stages.run import run_stages
            from rekindle.pipeline.train_student import describe_result, train_from_config

            if config.stages:
                results = run_stages(config, target, resume=resume, progress=progress)
            else:
                results = [train_from_config(config, target, resume=resume, progress=progress)]
            texts += map(describe_result, results if is_main() else ())
            if is_main() and not results:
                texts.append(f"{place}: every stage was finished")
            if is_main() and config.stages and config.evaluates_domains:
                from rekindle.pipeline.compare.tables import domain_matrix

                texts.append(domain_matrix([target / stage.name for stage in config.stages]))
    for text in texts:
        typer.echo(text.replace(str(target), place))
    if sweep_error is not None:
        raise sweep_error
    if is_one_of_many():
        leave(0)


def rekindle(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="CYCLE.yaml", help=("a cycle file; `pipeline init rekindle` writes one")
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="folder for all results")] = None,
    set_: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help=("jobs at the same time; default: one per CUDA device, or per core (≤ 4)")
        ),
    ] = None,
    draw: Annotated[
        int | None, typer.Option(min=0, help="run only this draw of several label_draws, from 0")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=("run only this one of the tasks with their own corpus")),
    ] = None,
    searched: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="search.json of the same cycle in another folder, to use its search of draw 0",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the whole cycle: experts, cache, guided students, experts again, comparison.

    Resumes by itself: finished parts are left alone.
    """
    target = out or Path("runs") / run.stem
    current_launch()
    with resumable() as progress:
        if out is None and is_main():
            say(f"no --out given, so results go to {target}")
        from rekindle.pipeline.cycle.config import load_cycle

        config = load_cycle(run, set_)
        from rekindle.pipeline.cycle.run import run_cycle

        results = run_cycle(
            config,
            target,
            draw=draw,
            task=task,
            searched=searched,
            workers=workers,
            progress=progress,
        )
    from rekindle.pipeline.cycle.page import printed

    typer.echo(json.dumps(results.as_dict()) if as_json else printed(target, results))


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR…", help="directories of runs or sweeps")
    ],
    test: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[HEAD=]FILE",
            help="score the runs' task heads on this labelled file (jsonl, csv, tsv or parquet); "
            "may be repeated, one file per head",
        ),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[HEAD=]DIR",
            help="also score this expert on the --test file of that head; may be repeated",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help=("metric for --test; default: accuracy, F1 or pearson, depending on the task")
        ),
    ] = None,
    text_field: TextField = None,
    label_field: LabelField = None,
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="also write the report as one HTML page")] = None,
    as_json: Json = False,
) -> None:
    """Say which of several runs is best: task scores first, then settings, time and losses."""
    test_options = {"--text-field": text_field, "--label-field": label_field, "--set": set_}
    for option, value in ({"--metric": metric, "--expert": expert} | test_options).items():
        if value and not test:
            raise InputError(f"{option} belongs to --test: say which file to score")
    from rekindle.pipeline.compare.runs import compare_runs
    from rekindle.pipeline.compare.stored import local_copies
    from rekindle.pipeline.cycle.page import check_one_corpus, compare_cycle

    with local_copies(runs, models=bool(test)) as (folders, with_given_places):
        if test:
            option_values = {
                "--test": test,
                "--expert": expert,
                "--metric": [metric] if metric else None,
            }
            option_values |= {"--text-field": text_field, "--set": set_}
            option_values |= {"--label-field": [label_field] if label_field else None}
            typed_options = [
                (name, value)
                for name, values_of_option in option_values.items()
                for value in values_of_option or ()
            ]
            check_one_corpus(folders, typed_options)
        elif (printed_text := compare_cycle(folders, out, as_json, with_given_places)) is not None:
            typer.echo(with_given_places(printed_text))
            return
        comparison = compare_runs(folders)
        if test:
            from rekindle.pipeline.commands.asking import score_heads

            fields = (text_field, label_field)
            comparison = score_heads(comparison, test, metric, fields, set_, expert or [])
        from rekindle.pipeline.compare.tables import as_text
        from rekindle.pipeline.cycle.page import report_html, verdict_above

        if out is not None:
            from rekindle.data.storage.atomic import write_text

            write_text(out, with_given_places(report_html(folders, comparison)))
            say(f"page: {out}")
        values = comparison.as_dict()
        printed_text = (
            json.dumps(values) if as_json else verdict_above(folders) + as_text(comparison)
        )
    typer.echo(with_given_places(printed_text))


def doctor(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN.yaml", help="also check disk and memory for this run"),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Show versions, devices, and which kernel runs and why; try a lock and one step of training.

    With a run file, also check whether the disk has room for what `pipeline plan` estimates, and
    the memory for each teacher. Exit code 2 if something would make a run fail.
    """
    from rekindle.pipeline.config import load_config

    if set_ and run is None:
        raise InputError("--set needs a run file, as in `pipeline doctor RUN.yaml`")
    config = None if run is None else load_config(run, set_)
    from rekindle.pipeline.checks.machine import refuse_problems
    from rekindle.pipeline.doctor import diagnose

    facts = diagnose(config)
    width = max(14, *map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:{width}} {value}")
    refuse_problems(facts)


app.callback()(take_options)
for command in (
    *(
        demo,
        init,
        schema,
        finetune,
        evaluate,
        predict,
        generate,
        export,
        merge_adapter,
        cache_teachers,
        plan,
        gc,
    ),
    *(verify, inspect_, teachers, import_targets, export_targets, train_student, rekindle, compare),
    push,
    doctor,
):
    app.command(command.__name__.rstrip("_").replace("_", "-"), cls=Command)(command)


def main() -> None:
    """Run the console script: turn errors into one message and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with terminal(), errors_as_exit_codes(), usage_as_input_errors():
        code = app(prog_name="pipeline", standalone_mode=False)
    if code == INTERRUPTED:  # before a command could say what an interrupt leaves
        say(f"\ninterrupted. To run it again: {line_again()}")
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
