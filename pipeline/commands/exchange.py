"""The commands that import targets into a cache, and export them."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.pipeline.commands.options import CachePath, Force, Json, Overrides
from rekindle.pipeline.exits import resumable

if TYPE_CHECKING:
    from rekindle.data.exchange.rows import Row


def import_targets(
    cache: CachePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="the name of the new teacher")],
    rows: Annotated[
        list[Path],
        typer.Argument(
            metavar="ROWS…", help="files of rows: jsonl (- for stdin), parquet, arrow; in any order"
        ),
    ],
    provenance: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUE",
            help="where they come from: model=…, and any other facts to record; repeated",
        ),
    ],
    task: Annotated[
        str, typer.Option(help="causal_lm, masked_lm, or an expert's: sequence_classification, …")
    ] = "causal_lm",
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="a classifier's labels in their order; repeated"),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="accept sequences and positions without targets")
    ] = False,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write top-k log-probabilities (or labels) made elsewhere as a teacher. Resumes by itself.

    --set takes view, k, codec and problem. For the format of the rows, see
    docs/targets_elsewhere.md.
    """
    with resumable() as progress:
        from rekindle.data.cache import write_manifest
        from rekindle.data.corpus.corpus import Corpus
        from rekindle.data.exchange import importing
        from rekindle.data.exchange.config import ImportConfig
        from rekindle.data.settings import parse_settings
        from rekindle.data.storage.manifest import read_manifest
        from rekindle.data.storage.store import open_store
        from rekindle.pipeline.overrides import set_value

        values: dict[str, object] = {"name": name, "task": task, "allow_missing": allow_missing}
        values |= {"provenance": _pairs(provenance), "labels": label or []}
        for setting in set_ or []:
            set_value(values, setting)
        config = parse_settings(ImportConfig, values, "import-targets")
        store = open_store(cache)
        read_manifest(store)
        with progress.task(f"import {name}", unit="rows") as bar:
            result = importing.import_targets(Corpus(store), _rows(rows), config, bar.advance)
        write_manifest(store)
    facts = {key: value for key, value in vars(result).items() if key != "info"}
    typer.echo(json.dumps({"teacher": name} | facts) if as_json else f"{cache}: {result.as_text()}")


def _pairs(assignments: list[str]) -> dict[str, str]:
    pairs = [assignment.partition("=") for assignment in assignments]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise InputError(f"--provenance {key}{equals}{value}: give KEY=VALUE")
    values = {key: value for key, _, value in pairs}
    for key, _, value in pairs:
        if values[key] != value:
            raise InputError(f"--provenance {key} is {value} and {values[key]}; give it once")
    return values


def _rows(paths: list[Path]) -> "Iterator[tuple[str, Row]]":
    from rekindle.data.exchange.importing import numbered
    from rekindle.data.source.rows import read_rows

    # All files are checked before the first is read: a wrong name is reported before expensive
    # work.
    files = [(read_rows(str(path)), str(path)) for path in paths]
    return chain.from_iterable(numbered(rows, path) for rows, path in files)


def export_targets(
    cache: CachePath,
    out: Annotated[
        Path, typer.Option(help="FILE.jsonl, .parquet or .arrow; else a folder of datasets")
    ],
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="whose targets; default: only the text")
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="only the k likeliest candidates")] = None,
    view: Annotated[
        str | None,
        typer.Option(help="without --teacher: also show the text as in this masked view"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N sequences")] = None,
    force: Force = False,
) -> None:
    """Write a teacher's targets with text, tokens and label names beside them, one row a sequence.

    Without --teacher: the sequences to show to a model elsewhere, for import-targets.
    """
    from rekindle.data.cache import Cache
    from rekindle.data.exchange.exporting import Export
    from rekindle.data.exchange.files import write_export
    from rekindle.pipeline.progress import Progress

    opened_cache = Cache.open(cache)
    if teacher is not None and view is not None:
        raise InputError(
            "--view is for the text alone: a teacher's rows have the view it was shown"
        )
    if teacher is None and k is not None:
        raise InputError("--k is for a teacher's targets: name it with --teacher")
    masked_view = opened_cache.masked_view(None if view == "masked" else view) if view else None
    reader = opened_cache.teacher(teacher) if teacher is not None else None
    export = Export(opened_cache.corpus, reader, masked_view, k, limit)
    with (
        opened_cache.store.reading(),
        Progress.to_terminal() as progress,
        progress.task("export", "rows", export.count) as bar,
    ):
        count = write_export(export, out, force, bar.advance)
    typer.echo(f"{out}: {counted(count, 'row')}")
