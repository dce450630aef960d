"""Knowledge rekindle as one resumable command: experts, cache, students, experts again, compared.

    OUT/cycle.json                  what the cycle is; OUT/run.yaml: its configuration
    OUT/tasks/TASK/                 the splits as every arm uses them
    OUT/start/                      the start model as students take it over, and so experts
    OUT/experts/TASK/               the start model, fine-tuned: the arm ``expert``
    OUT/cache/, OUT/stage1.yaml     the experts' outputs, once
    OUT/students/NAME/, NAME.yaml   guided pre-training: mlm, kd-TASK, both-TASK, mixture
    OUT/fine-tuned/ARM/TASK/        each of them fine-tuned again with the same budget
    OUT/search/ARM/TASK/POINT/      scores of the search, the same for every arm
    OUT/results.json, report.html   what came out

Each of these is what the command of that stage leaves, and can be used alone. A finished job is
recognised by what it leaves, so the same command again goes on where it stopped.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from rekindle.data.storage.atomic import remove_leftovers, write_json, write_text
from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.compare.page import cache_and_cost
from rekindle.pipeline.compare.runs import CYCLE_FILE, compare_runs
from rekindle.pipeline.config import dump_config
from rekindle.pipeline.cycle.begun import about_cycle, as_it_was_begun, look
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.inputs import check_start, check_taught, read_tasks, write_tasks
from rekindle.pipeline.cycle.jobs import plan_jobs
from rekindle.pipeline.cycle.page import cycle_html
from rekindle.pipeline.cycle.results import read_results
from rekindle.pipeline.cycle.run_files import configs
from rekindle.pipeline.cycle.scores import CycleResults
from rekindle.pipeline.processes.jobs import MOST_WORKERS, run_counted
from rekindle.pipeline.processes.worker import Place, cores, places_for, visible_devices, warm_up
from rekindle.pipeline.progress import SILENT, Progress
from rekindle.train.record.run_folder import open_folder


def run_cycle(
    config: CycleConfig,
    out: Path,
    *,
    workers: int | None = None,
    places: Sequence[Place] = (),
    beside: Collection[str] = (),
    progress: Progress = SILENT,
) -> CycleResults:
    """Run what is not finished of the cycle in ``out``; returns what came out.

    ``workers`` jobs at a time, or one at each of ``places``; by default one per CUDA device,
    without one as many as there are cores, at most 4. ``beside`` names what else may be in ``out``
    before the cycle begins. Raises InputError for wrong files, models and settings before anything
    is run, and for an ``out`` that holds something else; CheckpointError for one that holds another
    cycle.
    """
    home = Path(os.path.abspath(out))
    config = as_it_was_begun(home, config.with_cache_in(home))
    make_missing(config)
    tasks = read_tasks(config)
    check_taught(config, tasks)
    runs = configs(home, config, tasks)
    about = about_cycle(config, tasks, check_start(config))
    with open_folder(home, lambda: look(home, config, about, beside)):
        write_json(home / CYCLE_FILE, about)
        cache = Path(config.cache.path)  # others may write there at the same time
        for folder in home.glob("**/"):
            if cache not in (folder, *folder.parents):
                remove_leftovers(folder)
        write_tasks(tasks, home)
        write_text(home / "run.yaml", dump_config(config))
        for name, run in runs.items():
            write_text(home / name, dump_config(run))
        places = places or places_for(
            workers or len(visible_devices()) or min(cores(), MOST_WORKERS)
        )
        if places[0].device is None:  # nothing may look at a device before a fork
            warm_up()
        jobs = list(plan_jobs(home, config, tasks))
        run_counted(jobs, home / "cycle.log", progress, places)
        return _write_results(home)


def _write_results(home: Path) -> CycleResults:
    results, students = read_results(home), None
    if any(home.glob("students/*/run.json")):
        students = compare_runs([home])
        cache, cost = cache_and_cost(students)
        results = replace(results, cache=cache, cost=cost)
    write_json(home / "results.json", results.as_dict())
    write_text(home / "report.html", cycle_html(home, students, results))
    return results
