"""The jobs of a cycle and what they wait for. Nothing is run here, and no file is opened."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rekindle.pipeline import job_functions as functions
from rekindle.pipeline.cycle.arms import ORDER, Arm
from rekindle.pipeline.cycle.config import CycleConfig, point_name
from rekindle.pipeline.cycle.finetuned import folder_of
from rekindle.pipeline.cycle.inputs import TASKS_FOLDER, TaskFiles
from rekindle.pipeline.cycle.run_files import CACHE_FILE, CORPUS_FILE, of_text
from rekindle.pipeline.cycle.students import student_of, students_of, teachers_on
from rekindle.pipeline.processes.jobs import Job
from rekindle.train.finetune.config import FinetuneConfig
from rekindle.train.finetune.result import seed_folder

START_FOLDER = "start"  # the start model as students take it over, and so experts as well
START_EXPERT = "start-expert"  # the model of experts, where it is another one


def start_folder(config: CycleConfig, arm: str) -> str:
    """Where the model is that the fine-tuning of an arm without students begins with."""
    return START_EXPERT if arm == "expert" and config.has_other_experts else START_FOLDER


def plan_jobs(home: Path, config: CycleConfig, tasks: Sequence[TaskFiles]) -> Iterator[Job]:
    """Every job; of those that can start, the first does."""
    models = {START_FOLDER: config.student.model}
    if config.has_other_experts:
        models[START_EXPERT] = str(config.experts.model)
    for name, model in models.items():
        yield Job(name, functions.save_start, (model, home / name), output=home / name)
    for text in config.texts:
        done = _costs(home, text) / "corpus" / "done.json"
        arguments = (home / of_text(CORPUS_FILE, text), (), done)
        yield Job(_corpus(text), functions.cache, arguments, output=done)
    for one in tasks:
        yield from _fine_tuning(home, config, one, "expert")
    yield from _caching(home, config)
    for student in students_of(config).values():
        run, file = home / "students" / student.name, home / "students" / f"{student.name}.yaml"
        taught = [name for task in student.tasks for name in config.teachers_of(task, student.arm)]
        yield Job(
            f"student {student.name}",
            functions.train,
            (file, run),
            output=run / "run.yaml",
            after=(_corpus(student.text), *(_cache(name, student.text) for name in taught)),
            steps=config.train.steps or None,
        )
    for arm in [arm for arm in ORDER if arm in config.arms]:
        for one in tasks:
            yield from _fine_tuning(home, config, one, arm)


def _caching(home: Path, config: CycleConfig) -> Iterator[Job]:
    """One after another: a teacher's time is then its own."""
    before: tuple[str, ...] = tuple(_corpus(text) for text in config.texts)
    for text in config.texts:
        for name, task, _ in teachers_on(config, text):
            cost = _costs(home, text) / f"{name}.json"
            yield Job(
                _cache(name, text),
                functions.cache,
                (home / of_text(CACHE_FILE, text), (name,), cost),
                output=cost,
                after=(*before, f"expert on {task}"),
            )
            before = (_cache(name, text),)


def _corpus(text: str) -> str:
    return f"corpus {text}" if text else "corpus"


def _cache(teacher: str, text: str) -> str:
    return f"cache {teacher} on the text of {text}" if text else f"cache {teacher}"


def _costs(home: Path, text: str) -> Path:
    return home / "costs" / "texts" / text if text else home / "costs"


def _fine_tuning(home: Path, config: CycleConfig, one: TaskFiles, arm: Arm) -> Iterator[Job]:
    """The search, and the fine-tunings that are compared, with what it has chosen."""
    name, points = one.task.name, config.search_points()
    student = student_of(config, arm, name)
    start = home / "students" / student if student else home / start_folder(config, arm)
    after: tuple[str, ...] = (f"student {student}",) if student else (start.name,)
    files = home / TASKS_FOLDER / name
    tried: list[tuple[FinetuneConfig, Path]] = []
    searched = []
    for point in points:
        values = one.own_settings(config.finetune_of(one.task, point, arm))
        folder = home / "search" / arm / name / point_name(point)
        done = folder / "metrics.json"
        tried.append((values, done))
        if len(points) > 1:
            what = functions.FineTuning(start, files, folder, config.seeds_of_search, one.metric)
            searched.append(f"search {point_name(point)} {arm} on {name}")
            yield Job(searched[-1], functions.search, (what, values), output=done, after=after)
    out = home / folder_of(arm, name)
    every = arm == "expert" and config.needs_every_seed
    seeds = range(config.seeds)
    what = functions.FineTuning(start, files, out, seeds, one.metric, keep_every=every)
    yield Job(
        f"{arm} on {name}",
        functions.fine_tune,
        (what, tried),
        output=seed_folder(out, seeds[-1]) if every else out / "metrics.json",
        after=(*after, *searched),
    )
