"""The commands that make, plan, check, show and tidy a cache."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rekindle.data.counted import counted
from rekindle.data.errors import CacheFormatError, CacheMismatchError, InputError
from rekindle.pipeline.commands.options import CachePath, Json, Overrides, RunFile
from rekindle.pipeline.exits import resumable

if TYPE_CHECKING:
    from rekindle.pipeline.processes.units import Executor

# that make a corpus by default: about as many as one process can read and write for
TEXT_PROCESSES = 16


class ExecutorKind(StrEnum):
    """The choices of ``--executor``."""

    local = "local"
    ray = "ray"


@contextmanager
def _executor(kind: ExecutorKind, address: str | None, workers: int | None) -> Iterator["Executor"]:
    """Yield what runs the teachers; raise InputError for a cluster that cannot be joined."""
    if kind is ExecutorKind.local:
        from rekindle.data.cores import cores
        from rekindle.pipeline.processes.units import OnThisMachine

        yield OnThisMachine(workers or 1, 1 if workers else min(cores(), TEXT_PROCESSES))
        return
    from rekindle.pipeline.processes.on_ray import on_ray

    with on_ray(address, workers) as cluster:
        yield cluster


def cache_teachers(
    run: RunFile,
    teacher: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="only this teacher; may be repeated")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="processes, one per device, which also make a new corpus; default: 1, for a "
            "corpus above some 50 MB one per core; with --executor ray as many as the "
            "cluster has room for",
            show_default=False,
        ),
    ] = None,
    executor: Annotated[
        ExecutorKind, typer.Option(help="where teachers run: this machine, or a Ray cluster")
    ] = ExecutorKind.local,
    address: Annotated[
        str | None,
        typer.Option(
            help="of the Ray cluster; default: RAY_ADDRESS, the one that runs here, or a new one",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="compare what is there with its checksums first, and make damaged shards again; "
            "default: for a local cache",
        ),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Stage 1: run each expert once over the corpus and keep its outputs. Resumes by itself."""
    if executor is ExecutorKind.local and address is not None:
        raise InputError(f"--address {address} is for a Ray cluster: give --executor ray, too")
    with resumable() as progress:
        from rekindle.pipeline.config import load_config

        config = load_config(run, set_)
        if teacher and not config.stages:
            config.teachers_named(teacher)
        from rekindle.pipeline.caching.cache_teachers import cache_teachers as stage_one
        from rekindle.pipeline.caching.make_unit import follow
        from rekindle.pipeline.caching.model_parallel import check_processes, in_step
        from rekindle.pipeline.stages.run import cache_stages

        chosen = [entry for entry in config.teachers if not teacher or entry.name in teacher]
        check_processes(chosen, executor is ExecutorKind.local and (workers or 1) == 1)
        with (
            in_step(chosen) as is_follower,
            _executor(executor, address, workers) as runner,
        ):
            if is_follower:
                follow()
                return
            arguments = (teacher or (), runner, progress, check)
            if config.stages:
                lines = [
                    text for entry in cache_stages(config, *arguments) if (text := entry.as_text())
                ]
            else:
                lines = [f"{config.cache.path}: {stage_one(config, *arguments).as_text()}"]
    typer.echo("\n".join(lines))


def plan(
    run: RunFile,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe", help="run each teacher for some seconds to measure its speed"
        ),
    ] = True,
    texts: Annotated[
        str | None,
        typer.Option(metavar="N", help="also the cost of N texts like the source's: 10000000"),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="or of N tokens of such texts: 5e9")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="what a new cache costs on that many machines")
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="with --nodes: speed and prices (docs/scaling.md)"),
    ] = None,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Say what cache-teachers would do: sequences, bytes, time, break-even. Writes nothing."""
    from rekindle.pipeline.config import load_config
    from rekindle.pipeline.plan.cluster import cluster_lines, on_nodes, parse_assumptions
    from rekindle.pipeline.plan.scale import Scale

    scale, assumptions = Scale.from_options(texts, tokens), parse_assumptions(assume or ())
    if assume and nodes is None:
        raise InputError("--assume gives properties of machines; give --nodes, too")
    config = load_config(run, set_)
    if config.stages and nodes is not None:
        raise InputError("--nodes is for a run without stages: give one stage as a file of its own")
    if config.stages:
        from rekindle.pipeline.plan.staged import plan_staged_run

        stages = plan_staged_run(config, probe, scale)
        listed = json.dumps({"stages": [stage.as_dict() for stage in stages]})
        typer.echo(listed if as_json else "\n".join(stage.as_text() for stage in stages))
        return
    from rekindle.pipeline.plan.run import plan_run
    from rekindle.pipeline.plan.text import format_plan, wrapped

    run_plan = plan_run(config, probe, scale)
    cluster = None if nodes is None else on_nodes(run_plan, nodes, assumptions)
    if as_json:
        cluster_facts = {} if cluster is None else {"cluster": vars(cluster)}
        typer.echo(json.dumps(run_plan.as_dict() | cluster_facts))
        return
    typer.echo(format_plan(run_plan), nl=False)
    if cluster is not None:
        typer.echo("\n".join(wrapped(cluster_lines(cluster))))


def gc(
    cache: CachePath,
    older_than: Annotated[
        float, typer.Option(min=0, metavar="HOURS", help="leave younger files: they may be in use")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option(help="only list what would be removed")] = False,
    as_json: Json = False,
) -> None:
    """Remove leftovers of killed runs from a cache: data files that no commit record names."""
    from rekindle.data.changes.carry_out import finish_interrupted
    from rekindle.data.inventory import collect_garbage
    from rekindle.data.journal import describe_unfinished, read_journal
    from rekindle.data.storage.manifest import MANIFEST
    from rekindle.data.storage.store import open_store

    store = open_store(cache)
    change = read_journal(store).change
    if change is not None:
        age = time.time() - store.state(MANIFEST)[1]
        if dry_run or age < 3600 * older_than:
            raise InputError(f"{cache}: {describe_unfinished(change, store)}")
        finish_interrupted(store)
    removed = collect_garbage(store, 3600 * older_than, dry_run)
    if as_json:
        typer.echo(json.dumps({"removed": removed, "dry_run": dry_run}))
        return
    for name, size in removed.items():
        typer.echo(f"{name}  {counted(size, 'byte')}")
    verb = "would be removed" if dry_run else "removed"
    typer.echo(
        f"{cache}: {counted(len(removed), 'file')}, {counted(sum(removed.values()), 'byte')} {verb}"
    )


def verify(
    cache: CachePath,
    audit: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="run the teachers again on N random sequences; exit code 3 if a value lies beyond "
            "what its codec and two passes of the same weights may differ by (docs/audit.md)",
        ),
    ] = 0,
    config: Annotated[
        Path | None,
        typer.Option(metavar="RUN.yaml", help="the configuration with the teachers, for --audit"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every checksum and invariant of a cache."""
    from rekindle.pipeline.checks.verify import verify_cache
    from rekindle.pipeline.progress import Progress

    if audit and config is None:
        raise InputError(
            "--audit runs the teachers again: name the configuration with --config RUN.yaml"
        )
    if config is not None and not audit:
        raise InputError("--config is for --audit: give the number of sequences, too (--audit N)")
    from rekindle.pipeline.config import load_config

    audit_config = None if config is None else load_config(config)
    audits: dict[str, dict[str, float]] = {}
    beyond: list[str] = []
    with Progress.to_terminal() as progress:
        report = verify_cache(cache, progress)
        if audit_config is not None and not report.problems:
            from rekindle.pipeline.checks.audit import audit_cache

            audit_report = audit_cache(cache, audit_config, audit, progress=progress)
            audits, beyond = audit_report.values, audit_report.problems
    if as_json:
        typer.echo(json.dumps(report.as_dict() | {"audit": audits, "beyond": beyond}))
    else:
        typer.echo(report.as_text(cache))
        for name, values in audits.items():
            shown = ", ".join(f"{key} {value:.3g}" for key, value in values.items())
            typer.echo(f"audit of {name}: {shown}")
    if report.problems:
        import_note = ""
        if imported_names := [
            n for n in report.imported if f"targets/{n}" in " ".join(report.problems)
        ]:
            import_note = (
                f". {', '.join(imported_names)}: imported, so there is no model to run; `pipeline "
                "import-targets` with the original rows and provenance "
                "makes what is damaged of it again"
            )
        raise CacheFormatError(
            f"{counted(len(report.problems), 'problem')} in {cache}. `pipeline cache-teachers` "
            "with the configuration it was made with makes exactly the damaged parts again"
            f"{import_note}"
        )
    if beyond:
        raise CacheMismatchError(
            f"{cache} does not hold what its teachers compute: {'; '.join(beyond)}. Its bytes are "
            "those that were written: these targets are of other weights, or were changed by hand. "
            f"Remove them (`pipeline teachers {cache} --remove NAME --yes`): `pipeline "
            "cache-teachers` makes them again"
        )


def inspect_(
    cache: CachePath,
    example: Annotated[int | None, typer.Option(metavar="I", help="show one sequence")] = None,
    teacher: Annotated[str | None, typer.Option(metavar="T", help="only this teacher")] = None,
    as_json: Json = False,
) -> None:
    """Show what is in a cache: teachers, sizes, kept mass, entropy; or one example."""
    from rekindle.pipeline.checks.inspect import inspect_cache, inspect_example

    if example is not None:
        typer.echo(inspect_example(cache, example, teacher, as_json), nl=False)
    else:
        typer.echo(inspect_cache(cache, teacher, as_json), nl=False)
