"""Adds the finished cells in a folder of `pipeline rekindle` to a table's rows, and makes its page.

    python tests/benchmarks/pages/record.py few_labels runs/few-labels

A cell is one task in one draw of the labels. It is a line of ``cells.jsonl`` in the table's folder
once all its arms are scored. An existing line stays as it is, so that rows of several machines and
days can be in one file (to measure a cell again, remove its line). Run this on the machine that has
measured, with the code that has: both are recorded as they are here. What draw 0 of a task has
searched goes to ``search.json`` beside them: another machine runs later draws with

    pipeline rekindle few_labels.yaml --out runs/few-labels --draw 3 --searched search.json
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from rekindle.data.errors import InputError, RekindleError
from rekindle.pipeline.compare.runs import CYCLE_FILE
from rekindle.pipeline.cycle.arms import WITH_TEACHERS
from rekindle.pipeline.cycle.cells import Cells, read_cells
from rekindle.pipeline.cycle.config import CycleConfig, load_cycle
from rekindle.pipeline.cycle.costs import arm_costs
from rekindle.pipeline.cycle.finetuned import own_head, read_json
from rekindle.pipeline.cycle.results import read_results
from rekindle.pipeline.cycle.scores import CycleResults, scores_of
from rekindle.pipeline.cycle.search import (
    DRAWS_FOLDER,
    FIRST_DRAW,
    SEARCH_FILE,
    check_same_cycle,
    decisive_settings,
    export_searches,
    read_search_file,
    search_home,
    search_sources,
    without_cache,
)
from rekindle.train.record.run_folder import differences

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent
CELLS = "cells.jsonl"
OWN_SEARCH = "draw 0 of the same folder"

Cell = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """The machine and the commit that measured cells, and the day."""

    device: str
    commit: str
    date: str

    @classmethod
    def here(cls) -> "Origin":
        """Return this machine, and the commit of this code, with a + if it was changed since."""
        spec = spec_from_file_location("results_csv", BENCHMARKS / "results_csv.py")
        assert spec is not None
        assert spec.loader is not None
        results_csv = module_from_spec(spec)  # its folder on the path would hide other packages
        spec.loader.exec_module(results_csv)

        def git(*words: str) -> str:
            root = BENCHMARKS.parents[1]
            try:
                done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
            except FileNotFoundError:
                return ""
            return done.stdout.strip()

        code = ("data", "kernels", "pipeline", "train")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        commit = git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
        return cls(results_csv.hardware(), commit, datetime.date.today().isoformat())


def plan_of(table: Path) -> CycleConfig:
    """Return a table's cycle: its file lies in the table's folder and has its name."""
    return load_cycle(table / f"{table.name}.yaml").without_twins()


# --- the cells in a cycle's folder ----------------------------------------------------------------


def cells_in(run: Path, messages: list[str], origin: Origin) -> Iterator[Cell]:
    """Yield the finished cells in a cycle's folder ``run``; for the others, add a line with their
    missing parts to ``messages``.
    """
    draws = {int(one.name): one for one in (run / DRAWS_FOLDER).glob("*/")}
    if not draws and read_results(run).draws is None:
        draws = {0: run}
    for draw, home in sorted(draws.items()):
        try:
            results = read_results(home)
        except InputError:  # nothing of this draw exists except its folder
            continue
        cells = read_cells(home, results, results.settings.get("search") or {})
        for task in results.metrics:
            # If all tasks have one text, a student's cost is for all of them.
            tasks = [task] if any(one.task for one in results.texts) else results.metrics
            parts = [part for one in tasks for part in _missing_parts(results, cells, one)]
            if parts:
                missing = ", ".join(dict.fromkeys(parts))
                messages.append(f"draw {draw}, {task}: not finished ({missing})")
            else:
                yield _cell(draw, task, results, cells, origin) | _depends_on(home, task)


def _missing_parts(results: CycleResults, cells: Cells, task: str) -> Iterator[str]:
    for arm in results.arms:
        if (arm, task) not in cells.fine_tuned:
            yield arm
        elif arm in WITH_TEACHERS and (arm, task) not in cells.own_heads:
            yield own_head(arm)
    if not any(one.task in ("", task) for one in results.texts):
        yield "test texts in its text"


def _cell(draw: int, task: str, results: CycleResults, cells: Cells, origin: Origin) -> Cell:
    """Return everything that is recorded of one task in one draw."""
    by_arm = {arm: cells.fine_tuned[arm, task] for arm in results.arms}
    selected = results.file.get("experts", {}).get("teacher") != "all"
    scores = scores_of(results.arms, [task], cells.fine_tuned, cells.own_heads, selected)
    own_text = any(one.task == task for one in results.texts)
    tasks = [task] if own_text else list(results.metrics)
    costs = arm_costs(results.arms, tasks, _of_task(cells, task) if own_text else cells)
    text = next(one for one in results.texts if one.task in ("", task))
    expert = next(iter(by_arm.values()))
    grid = results.settings.get("search") or {}
    return {
        "draw": draw,
        "task": task,
        "facts": asdict(next(one for one in results.tasks if one.name == task)),
        "primary": results.file.get("primary"),
        "scores": [
            {"arm": one.arm, "metric": one.metric, "seeds": one.seeds, "test": one.scores}
            for one in scores
        ],
        "dev": {arm: dict(zip(one.seeds, one.dev, strict=True)) for arm, one in by_arm.items()},
        "chosen": {arm: {key: one.config[key] for key in grid} for arm, one in by_arm.items()},
        "seconds": {
            one.arm: {kind: round(seconds, 1) for kind, seconds in one.by_kind.items()}
            for one in costs
        },
        "seconds_of": task if own_text else "all tasks",
        "unrecorded": {one.arm: one.unknown for one in costs if one.unknown},
        "text": asdict(text),
        "precision": expert.precision,
        "versions": dict(expert.versions),
        **asdict(origin),
    }


def _depends_on(home: Path, task: str) -> dict[str, Any]:
    """Return what must be the same in all rows of a task, and which search it used."""
    about = read_json(home / CYCLE_FILE) or {}
    files = about["tasks"][task].get("files", {})
    return {
        "settings": without_cache(about.get("settings") or {}),
        "start": about.get("start"),
        "files": sorted(files.values()),
        "search_of": search_sources(search_home(home)).get(task, OWN_SEARCH),
    }


def _of_task(cells: Cells, task: str) -> Cells:
    """Return the cells with only the students of one task, if each task has its own text."""
    name = re.compile(rf"\w+-{re.escape(task)}(\.\d+)?")
    students = {one: cost for one, cost in cells.students.items() if name.fullmatch(one)}
    return replace(cells, students=students)


# --- the file of rows -----------------------------------------------------------------------------


def read_rows(table: Path) -> list[Cell]:
    """Return the recorded cells of a table; none before the first."""
    path = table / CELLS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def merged(rows: list[Cell], new: Iterator[Cell], config: CycleConfig) -> list[Cell]:
    """Return the rows with the ``new`` cells that they lack, by task in the order of the file, and
    draw.

    Raises InputError for cells of another table.
    """
    order = [task.name for task in config.tasks]
    by_cell = {(order.index(one["task"]), one["draw"]): one for one in rows}
    for one in new:
        check_of_table(one, config)
        by_cell.setdefault((order.index(one["task"]), one["draw"]), one)
    return [by_cell[key] for key in sorted(by_cell)]


def check_of_table(cell: Mapping[str, Any], config: CycleConfig) -> None:
    """Raise InputError for a cell of another table: it names another main comparison, or has other
    arms, tasks or draws.
    """
    primary = config.primary and config.primary.model_dump(mode="json")
    metrics = {task.name: task.metric or cell["facts"]["metric"] for task in config.tasks}
    for subject, here, planned in (
        ("primary comparison", cell["primary"], primary),
        ("arms", sorted(cell["dev"]), sorted(config.arms)),
        ("metric", cell["facts"]["metric"], metrics.get(cell["task"])),
        ("draws", cell["draw"] in range(config.label_draws), True),
    ):
        if here != planned:
            raise InputError(
                f"draw {cell['draw']}, {cell['task']}: {subject} {here!r}, and the table's file "
                f"says {planned!r}. Rows of one table are of one file: give the folder of that "
                "cycle"
            )
    if "train" not in cell.get("settings", {}):  # older rows have no settings
        return
    settings = config.of_draw(cell["draw"]).model_dump(mode="json", by_alias=True)
    both = [decisive_settings(one, config.text_names) for one in (cell["settings"], settings)]
    for key, (here, planned) in differences(both, items=True).items():
        raise InputError(
            f"draw {cell['draw']}, {cell['task']}: it was run with {key} {here!r}, and the table's "
            f"file says {planned!r}. Rows of one table are of one file: give the folder of that "
            "cycle"
        )


def check_alike(rows: list[Cell]) -> None:
    """Raise InputError if rows of one task differ in their data, their start model, or the settings
    that the search of draw 0 chose for all.
    """
    first: dict[tuple[str, str], Cell] = {}
    for one in rows:
        for key in ("chosen", "start", "files"):
            if one.get(key) is None:
                continue
            before = first.setdefault((one["task"] if key != "start" else "", key), one)
            if before[key] != one[key]:
                raise InputError(
                    f"{one['task']}: draw {one['draw']} has {key} {one[key]!r}, and "
                    f"{before['task']}, draw {before['draw']}, has {before[key]!r}: they cannot "
                    f"stand in one table. Where draw 0 was run elsewhere, give --searched its "
                    f"{SEARCH_FILE}"
                )


def write_rows(table: Path, rows: list[Cell]) -> None:
    """Write all rows, a cell a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (table / CELLS).write_text(text, encoding="utf-8")


def record_search(table: Path, run: Path, rows: list[Cell]) -> None:
    """Add what draw 0 in ``run`` has searched for tasks whose draw 0 is among the ``rows``;
    existing entries stay. Raises InputError if it belongs to another cycle.
    """
    home, path = run / DRAWS_FOLDER / str(FIRST_DRAW), table / SEARCH_FILE
    if (new := export_searches(home)) is None:
        return
    merged_search = read_search_file(path) if path.exists() else new | {"search": {}, "texts": {}}
    if path.exists():
        check_same_cycle(str(path), merged_search, new)
    recorded = {one["task"] for one in rows if one["draw"] == FIRST_DRAW}
    tasks = [task for task in new["search"] if task in recorded]
    for task in [task for task in tasks if task not in merged_search["search"]]:
        text = task if task in new["texts"] else ""
        merged_search["search"][task], merged_search["texts"][text] = (
            new["search"][task],
            new["texts"][text],
        )
    if merged_search["search"]:
        path.write_text(json.dumps(merged_search, ensure_ascii=False) + "\n", encoding="utf-8")


def record(table: Path, run: Path, origin: Origin) -> list[str]:
    """Add the finished cells of ``run`` to the ``table``'s rows; return sentences about what was
    done.
    """
    config, rows, messages = plan_of(table), read_rows(table), list[str]()
    recorded = {(one["draw"], one["task"]) for one in rows}
    all_rows = merged(rows, cells_in(run, messages, origin), config)
    new = [one for one in all_rows if (one["draw"], one["task"]) not in recorded]
    check_alike(all_rows)
    record_search(table, run, all_rows)
    if new:
        write_rows(table, all_rows)
    added = [f"added: draw {one['draw']}, {one['task']}" for one in new]
    cells = config.label_draws * len(config.tasks)
    return [*messages, *added, f"{len(all_rows)} of {cells} cells are recorded in {table / CELLS}"]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", help="a folder of tests/benchmarks, such as few_labels")
    parser.add_argument("run", type=Path, help="the --out of pipeline rekindle")
    parser.add_argument("--device", help="the device it ran on, if not this machine")
    parser.add_argument("--commit", help="the commit of the code that ran, if not this one")
    options = parser.parse_args()
    origin = Origin.here()
    origin = replace(
        origin, device=options.device or origin.device, commit=options.commit or origin.commit
    )
    table = BENCHMARKS / options.table
    try:
        print("\n".join(record(table, options.run, origin)))
    except RekindleError as error:
        sys.exit(f"error: {error}")
    from make import make_pages  # the page shows all existing rows

    make_pages([options.table])


if __name__ == "__main__":
    main()
