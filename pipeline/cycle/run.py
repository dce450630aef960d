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

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rekindle.data.corpus.additions import is_same_source
from rekindle.data.errors import CheckpointError, naming
from rekindle.data.former import as_begun, with_defaults
from rekindle.data.settings import parse_settings
from rekindle.data.source.sources import source_files
from rekindle.data.storage.atomic import remove_leftovers, write_json, write_text
from rekindle.data.storage.store import open_store
from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.compare.page import cache_and_cost
from rekindle.pipeline.compare.runs import CYCLE_FILE, CYCLE_WRITER, compare_runs
from rekindle.pipeline.config import RunConfig, dump_config
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.inputs import TaskFiles, check_start, read_tasks, write_tasks
from rekindle.pipeline.cycle.jobs import CACHE_FILE, plan_jobs, student_names
from rekindle.pipeline.cycle.page import cycle_html
from rekindle.pipeline.cycle.results import read_results
from rekindle.pipeline.cycle.scores import CycleResults
from rekindle.pipeline.processes.jobs import MOST_WORKERS, run_counted
from rekindle.pipeline.processes.worker import Place, cores, places_for, visible_devices, warm_up
from rekindle.pipeline.progress import SILENT, Progress
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.record.run_folder import check_same, goes_on, open_folder, read_record, reading

log = logging.getLogger("rekindle")

ELSEWHERE = "give another --out"
_SAY = "say what they mean (finetune.problem, label_field, drop_labels, positive, …)"


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
    if not config.cache.path:
        cache_here = config.cache.model_copy(update={"path": str(home / "cache")})
        config = config.model_copy(update={"cache": cache_here})
    if (begun := read_record(home / CYCLE_FILE, ELSEWHERE)) is not None:
        with reading(home / CYCLE_FILE, ELSEWHERE):
            was = as_begun(config, begun["settings"])
        if was is not config:
            with naming(f"{home} cannot go on as an older version began it; {ELSEWHERE}"):
                config = parse_settings(CycleConfig, was.model_dump(mode="json", by_alias=True))
    arms = (begun or {}).get("arms")
    if config.without_twins() != config and not (isinstance(arms, list) and "mixture" in arms):
        log.info("arm mixture: left out, for with one task it is the same student as both")
        config = config.without_twins()
    make_missing(config)
    tasks = read_tasks(config)
    runs = configs(home, config, tasks)
    about = _about(config, tasks, check_start(config))
    with open_folder(home, lambda: _look(home, config, about, beside)):
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


# --- the directory --------------------------------------------------------------------------------


def _about(
    config: CycleConfig, tasks: Sequence[TaskFiles], start: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``cycle.json`` says."""
    settings = config.model_dump(mode="json", by_alias=True)
    return {
        "written_by": CYCLE_WRITER,
        "arms": list(config.arms),
        "tasks": {one.task.name: one.facts for one in tasks},
        "search": settings["search"],
        "seeds": config.seeds,
        "finetune": settings["finetune"],
        "settings": settings,
        "start": start,
    }


def _look(
    home: Path, config: CycleConfig, about: Mapping[str, Any], beside: Collection[str]
) -> None:
    """Check that the directory is free, or holds this very cycle."""
    if not goes_on(home, CYCLE_FILE, "cycle", resume=True, beside=beside):
        source_files(config.corpus.source)  # later on the text may be gone: it is in the cache
        return
    found = read_record(home / CYCLE_FILE, ELSEWHERE) or {}
    with reading(home / CYCLE_FILE, ELSEWHERE):
        if found["written_by"] != CYCLE_WRITER:
            raise ValueError("it is not of a cycle")
        older = "problem" not in found["settings"]["finetune"]
        found["settings"] = with_defaults(CycleConfig, found["settings"])
        before, now = ({**one["settings"], "tasks": _tasks_of(one)} for one in (found, about))
        before = {key: before.get(key) for key in now}
    rule = "Go on with its own (run.yaml in it), or give another --out"
    # Arms may be added; the others only describe, and older versions did not record them.
    described = [f"tasks.{name}.{key}" for name in now["tasks"] for key in ("about", "chance")]
    if "start" in found:  # which says more than the place
        described += ["student.model", "corpus.tokenizer"]
    if before["corpus"] != now["corpus"]:
        same = is_same_source(open_store(config.cache.path), config.corpus.source)
        described += ["corpus.source"] * same
    if older:  # What its files mean was no setting; what was made of them is held against them.
        rule = f"If labels or columns are read otherwise than they were, {_SAY}. {rule}"
        places = ["finetune", *(f"tasks.{name}.finetune" for name in now["tasks"])]
        described += [f"{place}.{key}" for place in places for key in TaskSettings.model_fields]
    check_same(home, before, now, rule, free=("arms", "about", "corpus.on_bad_record", *described))
    start = found.get("start", about["start"])  # of older versions: it was not recorded
    if start != about["start"]:
        raise CheckpointError(
            f"{home} was begun with other weights of {about['settings']['student']['model']}: its "
            "experts and students would not begin as the same model. Put those back, or give "
            "another --out"
        )
    gone = [arm for arm in found["arms"] if arm not in about["arms"]]
    if gone:
        raise CheckpointError(
            f"{home} has the arm {gone[0]!r}, which is not asked for now. Arms may be added, not "
            "taken away: name it again, or give another --out"
        )


def _tasks_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks as settings and as what was read of their files."""
    settings = {task["name"]: task for task in about["settings"]["tasks"]}
    return {name: settings.get(name, {}) | facts for name, facts in about["tasks"].items()}


# --- the configurations of its runs ---------------------------------------------------------------


def configs(home: Path, config: CycleConfig, tasks: Sequence[TaskFiles]) -> dict[str, RunConfig]:
    """The run of every stage by the name of its file: what one can run by hand."""
    settings = config.model_dump(mode="json", by_alias=True)
    shared = {name: settings[name] for name in ("corpus", "cache")}
    teachers = [
        {
            "name": one.task.name,
            "model": str(home / "experts" / one.task.name),
            "task": "regression" if one.regression else "sequence_classification",
            "pairs": one.pairs,
        }
        for one in tasks
    ]
    corpus = shared | {"student": settings["student"]}
    found = {"corpus.yaml": corpus, CACHE_FILE: shared | {"teachers": teachers}}
    for name, (taught, masked) in student_names(config).items():
        terms = [
            config.term_of(one.task, one.regression).model_dump(
                mode="json", by_alias=True, exclude_unset=True
            )
            for one in tasks
            if one.task.name in taught
        ]
        train = dict(settings["train"])
        hard = train["objective"]["hard"] if masked else {"weight": 0.0}
        train["objective"] = {"hard": hard, "distill": terms}
        found[f"students/{name}.yaml"] = corpus | {"train": train}
    return {name: parse_settings(RunConfig, values, name) for name, values in found.items()}
