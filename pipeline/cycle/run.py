"""Knowledge rekindling as one resumable command: experts, cache, students, experts again, compared.

  OUT/cycle.json                  identifies the cycle; OUT/run.yaml: its configuration
  OUT/tasks/TASK/                 the splits that every arm uses
  OUT/start/                      the start model as students, and therefore experts, use it
  OUT/start-expert/               the experts' start model, if it is another one
  OUT/experts/TASK/               the expert: its best seed; for a committee, all in seeds/seed-K
  OUT/cache/, OUT/stage1.yaml     the experts' outputs, once
  OUT/students/NAME/, NAME.yaml   guided pre-training: mlm, kd-TASK, both-TASK, mixture, …
  OUT/distilled/ARM/TASK/         scores of a student with the head its experts left
  OUT/fine-tuned/ARM/TASK/        each of them fine-tuned again with the same budget
  OUT/search/ARM/TASK/POINT/      scores of the search, the same for every arm
  OUT/results.json, report.html   the results

Tasks with their own texts have OUT/cache/TASK, corpus-TASK.yaml and stage1-TASK.yaml, and every
student belongs to one task. With several ``students``, number j > 0 is students/NAME.j, and its
results are in the folder student-j of fine-tuned/ARM/TASK and of distilled/ARM/TASK. With several
``label_draws``, each is a cycle in OUT/draws/K, and the first one searches for all; OUT itself then
has cycle.json, run.yaml, results.json, report.html and, if something is searched, search.json,
which carries the result of the search to folders on other machines.

Each of these is what the command of its stage leaves, and can be used by itself. A job is finished
if its output exists, so the same command continues where it stopped.
"""

import itertools
import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rekindle.data.cores import cores
from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.storage.atomic import remove_leftovers, write_json, write_text
from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.compare.page import cache_and_cost
from rekindle.pipeline.compare.runs import CYCLE_FILE, Comparison, by_corpus, compare_runs
from rekindle.pipeline.config import dump_config
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.finetuned import EXPERT, folder_of
from rekindle.pipeline.cycle.inputs import (
    check_start,
    check_teaching,
    read_draws,
    read_tasks,
    write_tasks,
)
from rekindle.pipeline.cycle.jobs import check_fine_tuning, plan_jobs, search_files
from rekindle.pipeline.cycle.page import cycle_html
from rekindle.pipeline.cycle.record import (
    check_folder,
    check_read_same_text,
    check_same_text,
    cycle_record,
    initial_draws,
    remove_outdated_splits,
    resumed_config,
)
from rekindle.pipeline.cycle.results import RESULTS_FILE, read_results
from rekindle.pipeline.cycle.run_files import configs
from rekindle.pipeline.cycle.scores import CycleResults
from rekindle.pipeline.cycle.search import (
    DRAWS_FOLDER,
    FIRST_DRAW,
    SEARCH_FILE,
    export_searches,
    search_home,
    search_sources,
    takeover_files,
)
from rekindle.pipeline.processes.jobs import MOST_WORKERS, Job, run_counted
from rekindle.pipeline.processes.worker import Place, places_for, visible_devices, warm_up
from rekindle.pipeline.progress import SILENT, Progress
from rekindle.train.finetune.result import RESULT_FILE
from rekindle.train.record.run_folder import locked_folder, open_folder

log = logging.getLogger("rekindle")


@dataclass(frozen=True)
class _Execution:
    """How the jobs of a cycle run; ``only``: the jobs of one task (see ``plan_jobs``)."""

    places: Sequence[Place]
    progress: Progress
    only: str


def run_cycle(
    config: CycleConfig,
    out: Path,
    *,
    draw: int | None = None,
    task: str | None = None,
    searched: Path | None = None,
    workers: int | None = None,
    places: Sequence[Place] = (),
    beside: Collection[str] = (),
    progress: Progress = SILENT,
) -> CycleResults:
    """Run what is not finished of the cycle in ``out``; return the results.

    ``draw`` and ``task`` limit the work to one draw of the labels, and to one of the tasks with
    their own texts; the results cover everything that exists. ``searched``: the search file of the
    same cycle in another folder, for the first draw. ``workers`` jobs run at a time, or one at each
    of ``places``; by default one per CUDA device, without one as many as there are cores, at most
    4. ``beside``: names of what else may be in ``out`` before the cycle begins. Raise InputError
    for wrong files, models and settings before anything runs, and for an ``out`` that holds
    something else; CheckpointError for one that holds another cycle.
    """
    home = Path(os.path.abspath(out))
    _check_part(config, draw, task)
    places = places or places_for(workers or len(visible_devices()) or min(cores(), MOST_WORKERS))
    execution = _Execution(places, progress, task or "")
    if config.label_draws == 1:
        if searched is not None:
            raise InputError(f"--searched {searched} is for a cycle of several draws (label_draws)")
        return _run_one(config, home, execution, beside)
    config = resumed_config(home, config)
    make_missing(config)
    tasks = read_draws(config)
    check_teaching(config, tasks)
    check_fine_tuning(config, tasks)
    about = cycle_record(config, tasks, check_start(config))
    about["draws_at_first"] = initial_draws(home, config)
    first, first_config = home / DRAWS_FOLDER / str(FIRST_DRAW), config.of_draw(FIRST_DRAW)

    def check_and_plan() -> dict[Path, dict[str, Any]]:
        check_folder(home, config, about, beside)
        if searched is None:
            return {}
        about_first = cycle_record(first_config, tasks, about["start"])
        return takeover_files(searched, first, first_config, about_first, execution.only)

    with open_folder(home, check_and_plan) as search_results:
        write_json(home / CYCLE_FILE, about)
        write_text(home / "run.yaml", dump_config(config))
        for path, values in search_results.items():
            write_json(path, values)
    check_read_same_text(home, range(config.label_draws))
    for number in range(config.label_draws) if draw is None else [draw]:
        log.info("draw %d of the labels (0 to %d)", number, config.label_draws - 1)
        check_same_text(config, home, number)
        beside = ("search",) if number == FIRST_DRAW and search_sources(first) else ()
        _run_one(config.of_draw(number), home / DRAWS_FOLDER / str(number), execution, beside)
    with locked_folder(home, wait=True):  # another process may have worked on another draw
        if (search := export_searches(first)) is not None:
            write_json(home / SEARCH_FILE, search)
        results = read_results(home)
        write_json(home / RESULTS_FILE, results.as_dict())
        write_text(home / "report.html", cycle_html(home, (), results))
    return results


def _run_one(
    config: CycleConfig, home: Path, execution: _Execution, beside: Collection[str] = ()
) -> CycleResults:
    """Run one draw of the labels as ``run_cycle`` does."""
    config = resumed_config(home, config.with_cache_in(home))
    make_missing(config)
    tasks = read_tasks(config)
    check_teaching(config, tasks)
    check_fine_tuning(config, tasks)
    _check_first_search(config, home, execution.only)
    runs = configs(home, config, tasks)
    about = cycle_record(config, tasks, check_start(config))
    with open_folder(home, lambda: check_folder(home, config, about, beside)):
        remove_outdated_splits(tasks, home)
        write_json(home / CYCLE_FILE, about)
        cache = Path(config.cache.path)  # others may write there at the same time
        for folder in home.glob("**/"):
            if cache not in (folder, *folder.parents):
                remove_leftovers(folder)
        write_tasks(tasks, home)
        write_text(home / "run.yaml", dump_config(config))
        for name, run in runs.items():
            write_text(home / name, dump_config(run))
        if execution.places[0].device is None:  # nothing may look at a device before a fork
            warm_up()
        jobs = list(plan_jobs(home, config, tasks, execution.only))
        _log_repeated_experts(home, config, jobs)
        _log_slow_precisions(config, execution.places[0])
        run_counted(jobs, home / "cycle.log", execution.progress, execution.places)
        return _write_results(home)


def _check_part(config: CycleConfig, draw: int | None, task: str | None) -> None:
    """Raise InputError for a part that the cycle does not have."""
    draws, names = config.label_draws, [task.name for task in config.tasks]
    if draw is not None and draws == 1:
        raise InputError("--draw is for a cycle of several draws of the labels (label_draws: 5)")
    if draw is not None and draw >= draws:
        raise InputError(
            f"there is no draw {draw}: label_draws is {draws}, which are 0 to {draws - 1}. Raise "
            "label_draws in the file for more"
        )
    if task is not None and task not in names:
        raise InputError(
            f"no task {task!r} in the file{did_you_mean(task, names)} (it has: {', '.join(names)})"
        )
    if task is not None and task not in config.text_names:
        raise InputError(
            "--task is for tasks that have texts of their own (tasks.….corpus); here all have the "
            "same text, cache and students: leave it out"
        )


def _check_first_search(config: CycleConfig, home: Path, only: str) -> None:
    """Raise InputError if the draw in ``home`` needs a search that is not finished."""
    if search_home(home) == home:
        return
    for arm, task in itertools.product(config.arms, config.tasks):
        is_in_mixture = arm == "expert" and "mixture" in config.arms
        if only in ("", task.name) or is_in_mixture:
            for _, file in search_files(home, config, arm, task.name):
                if not file.exists():
                    raise InputError(
                        f"draw {home.name} of the labels uses the search of draw 0, but its "
                        f"search for {arm} on {task.name} is not finished: run --draw 0 first, or "
                        f"give --searched the {SEARCH_FILE} of a folder where that was done"
                    )


def _log_repeated_experts(home: Path, config: CycleConfig, jobs: Sequence[Job]) -> None:
    """Log which finished experts are fine-tuned again, because an added arm needs the models of all
    seeds and only the best one was kept.
    """
    planned = {job.name for job in jobs if job.output and not job.output.exists()}
    names = [task.name for task in config.tasks if f"expert on {task.name}" in planned]
    if finished := [n for n in names if (home / folder_of(EXPERT, n) / RESULT_FILE).exists()]:
        log.info(
            "the experts on %s are fine-tuned again: every seed of them has to teach "
            "(committee), but only the best was kept",
            ", ".join(finished),
        )


def _log_slow_precisions(config: CycleConfig, place: Place) -> None:
    """Log the requested precisions for which the CPU has no instructions, once for all jobs."""
    from rekindle.train.precision import warn_of_slow_precision

    requested: dict[str, str] = {"train.precision: {}": config.train.precision}
    if "precision" in config.search:
        slowest = max(config.search["precision"], key="bf16".__eq__)
        requested["search.precision: [{}]"] = str(slowest)
    else:
        sections = {f"tasks.{task.name}.finetune": task.finetune for task in config.tasks}
        sections |= {"finetune": {"precision": config.finetune.precision}}
        sections |= {"experts.finetune": config.experts.finetune}
        for section, settings in sections.items():
            requested[f"{section}.precision: {{}}"] = str(settings.get("precision"))
    warn_of_slow_precision(requested, "cpu" if place.device is None else "cuda")


def _write_results(home: Path) -> CycleResults:
    results, students = read_results(home), list[Comparison]()
    if any(home.glob("students/*/run.json")):
        students = [compare_runs(runs) for runs in by_corpus([home])]
    if len(students) == 1:
        cache, cost = cache_and_cost(students[0])
        results = replace(results, cache=cache, cost=cost)
    write_json(home / RESULTS_FILE, results.as_dict())
    write_text(home / "report.html", cycle_html(home, students, results))
    return results
