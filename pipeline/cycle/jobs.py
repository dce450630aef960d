"""The jobs of a cycle and what they wait for. Nothing is run here, and no file is opened."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rekindle.pipeline import job_functions as functions
from rekindle.pipeline.cycle.config import Arm, CycleConfig, point_name
from rekindle.pipeline.cycle.finetuned import folder_of
from rekindle.pipeline.cycle.inputs import TASKS_FOLDER, TaskFiles
from rekindle.pipeline.processes.jobs import Job
from rekindle.train.finetune.config import FinetuneConfig

CACHE_FILE = "stage1.yaml"
START_FOLDER = "start"  # the start model as students take it over, and so experts as well
# Arms whose students have one expert each, and so a student for every task.
_OF_ONE_EXPERT: tuple[Arm, ...] = ("kd", "both")
# The longest chain first: what else there is fills the places that wait for it.
_ORDER: tuple[Arm, ...] = ("mixture", "both", "kd", "mlm", "longer")


def student_of(arm: Arm, task: str) -> str:
    """The name of the student that ``arm`` fine-tunes on ``task``; empty for the start model."""
    if arm in ("expert", "longer"):
        return ""
    return f"{arm}-{task}" if arm in _OF_ONE_EXPERT else arm


def student_names(config: CycleConfig) -> dict[str, tuple[tuple[str, ...], bool]]:
    """For each student the experts that teach it, and whether it learns masked LM."""
    names = tuple(task.name for task in config.tasks)
    found: dict[str, tuple[tuple[str, ...], bool]] = {}
    for arm in [arm for arm in _ORDER if arm in config.arms]:
        for name in names:
            student = student_of(arm, name)
            taught = {"mlm": (), "mixture": names}.get(arm, (name,))
            if student:
                found[student] = (taught, arm != "kd")
    return found


def plan_jobs(home: Path, config: CycleConfig, tasks: Sequence[TaskFiles]) -> Iterator[Job]:
    """Every job; of those that can start, the first does."""
    start, corpus = home / START_FOLDER, home / "costs" / "corpus" / "done.json"
    yield Job("start", functions.save_start, (config.student.model, start), output=start)
    yield Job("corpus", functions.cache, (home / "corpus.yaml", (), corpus), output=corpus)
    for one in tasks:
        yield from _fine_tuning(home, config, one, "expert")
    # One after another: a teacher's time is then its own.
    before: tuple[str, ...] = ("corpus",)
    for one in tasks:
        name = one.task.name
        cost = home / "costs" / f"{name}.json"
        yield Job(
            f"cache {name}",
            functions.cache,
            (home / CACHE_FILE, (name,), cost),
            output=cost,
            after=(*before, f"expert on {name}"),
        )
        before = (f"cache {name}",)
    for student, (taught, _) in student_names(config).items():
        run, file = home / "students" / student, home / "students" / f"{student}.yaml"
        yield Job(
            f"student {student}",
            functions.train,
            (file, run),
            output=run / "run.yaml",
            after=("corpus", *(f"cache {name}" for name in taught)),
            steps=config.train.steps or None,
        )
    for arm in [arm for arm in _ORDER if arm in config.arms]:
        for one in tasks:
            yield from _fine_tuning(home, config, one, arm)


def _fine_tuning(home: Path, config: CycleConfig, one: TaskFiles, arm: Arm) -> Iterator[Job]:
    """The search, and the fine-tunings that are compared, with what it has chosen."""
    name, points = one.task.name, config.search_points()
    student = student_of(arm, name)
    start = home / "students" / student if student else home / START_FOLDER
    after: tuple[str, ...] = (f"student {student}",) if student else ("start",)
    files = home / TASKS_FOLDER / name
    tried: list[tuple[FinetuneConfig, Path]] = []
    searched = []
    for point in points:
        values = one.own_settings(config.finetune_of(one.task, point, longer=arm == "longer"))
        folder = home / "search" / arm / name / point_name(point)
        done = folder / "metrics.json"
        tried.append((values, done))
        if len(points) > 1:
            what = functions.FineTuning(start, files, folder, config.seeds_of_search, one.metric)
            searched.append(f"search {point_name(point)} {arm} on {name}")
            yield Job(searched[-1], functions.search, (what, values), output=done, after=after)
    out = home / folder_of(arm, name)
    what = functions.FineTuning(start, files, out, range(config.seeds), one.metric)
    yield Job(
        f"{arm} on {name}",
        functions.fine_tune,
        (what, tried),
        output=out / "metrics.json",
        after=(*after, *searched),
    )
