"""The jobs of a cycle and their dependencies. Runs nothing and opens no file."""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from rekindle.pipeline import job_functions as functions
from rekindle.pipeline.cycle.arms import ORDER, UNTAUGHT, WITH_TEACHERS, Arm
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.finetuned import folder_of, own_head_folder, student_folder
from rekindle.pipeline.cycle.inputs import TASKS_FOLDER, TaskFiles, test_files
from rekindle.pipeline.cycle.run_files import CACHE_FILE, CORPUS_FILE, of_text
from rekindle.pipeline.cycle.scores import HELD_TEXTS_FILE
from rekindle.pipeline.cycle.search import search_home
from rekindle.pipeline.cycle.sections import Point, point_name
from rekindle.pipeline.cycle.students import student_of, students_of, teachers_on
from rekindle.pipeline.processes.jobs import Job
from rekindle.train.finetune.config import FinetuneConfig, check_loss
from rekindle.train.finetune.result import RESULT_FILE, seed_folder

# A copy of student.model, from which students start, and experts unless experts.model is given.
START_FOLDER = "start"
START_EXPERT = "start-expert"  # a copy of experts.model, if that is another model


def start_folder(config: CycleConfig, arm: str) -> str:
    """Return the folder of the model from which an arm without students is fine-tuned."""
    return START_EXPERT if arm == "expert" and config.has_other_experts else START_FOLDER


def plan_jobs(
    home: Path, config: CycleConfig, tasks: Sequence[TaskFiles], only: str = ""
) -> Iterator[Job]:
    """Yield every job; the first one that can start is started. ``only``: only the jobs of this
    task, if the tasks have their own texts.
    """
    models = {START_FOLDER: config.student.model}
    if config.has_other_experts:
        models[START_EXPERT] = str(config.experts.model)
    for name, model in models.items():
        yield Job(name, functions.save_start, (model, home / name), output=home / name)
    texts = [text for text in config.text_names if only in ("", text)]
    for text in texts:
        run_file = home / of_text(CORPUS_FILE, text)
        cost_file = _costs(home, text) / "corpus" / "done.json"
        yield Job(_corpus(text), functions.cache, (run_file, (), cost_file), output=cost_file)
        held_file = cost_file.parent / HELD_TEXTS_FILE
        yield Job(
            f"test texts in {_corpus(text)}",
            functions.count_held_texts,
            (run_file, test_files(home, config), held_file),
            output=held_file,
            after=(_corpus(text),),
        )
    tasks_with_teacher = {task for text in texts for _, task, _ in teachers_on(config, text)}
    for one in tasks:
        if one.task.name in tasks_with_teacher:
            yield from _fine_tuning(home, config, one, "expert")
    yield from _caching(home, config, texts)
    for student in students_of(config).values():
        if student.text not in texts:
            continue
        run, file = home / "students" / student.name, home / "students" / f"{student.name}.yaml"
        teacher_names = [n for task in student.tasks for n in config.teachers_of(task, student.arm)]
        yield Job(
            f"student {student.name}",
            functions.train,
            (file, run),
            output=run / "run.yaml",
            after=(_corpus(student.text), *(_cache(name, student.text) for name in teacher_names)),
            steps=config.train.steps or None,
        )
    for arm in [arm for arm in ORDER if arm in config.arms]:
        for one in tasks:
            if only in ("", one.task.name):
                yield from _fine_tuning(home, config, one, arm)


# --- the experts on the text ----------------------------------------------------------------------


def _caching(home: Path, config: CycleConfig, texts: Sequence[str]) -> Iterator[Job]:
    """Yield a job for each teacher, one after another, so that its time is measured alone."""
    before: tuple[str, ...] = tuple(map(_corpus, texts))
    for text in texts:
        for name, task, _ in teachers_on(config, text):
            cost_file = _costs(home, text) / f"{name}.json"
            yield Job(
                _cache(name, text),
                functions.cache,
                (home / of_text(CACHE_FILE, text), (name,), cost_file),
                output=cost_file,
                after=(*before, f"expert on {task}"),
            )
            before = (_cache(name, text),)


def _corpus(text: str) -> str:
    return f"corpus of {text}" if text else "corpus"


def _cache(teacher: str, text: str) -> str:
    return f"cache {teacher} on the text of {text}" if text else f"cache {teacher}"


def _costs(home: Path, text: str) -> Path:
    return home / "costs" / "texts" / text if text else home / "costs"


# --- fine-tuning ----------------------------------------------------------------------------------


def check_fine_tuning(config: CycleConfig, tasks: Sequence[TaskFiles]) -> None:
    """Raise InputError for settings of a ranking loss, of any arm and any point of the search, that
    would not be used.
    """
    for one, point, arm in product(tasks, config.search_points(), config.arms):
        is_ranking = one.splits["train"].groups is not None
        check_loss(config.finetune_of(one.task, point, arm), one.task.train, is_ranking)


def search_files(home: Path, config: CycleConfig, arm: Arm, task: str) -> list[tuple[Point, Path]]:
    """Return the points that an arm tries on a task, each with the file of its scores; empty
    without a search.
    """
    points, folder = config.search_points(), search_home(home) / "search" / arm / task
    if len(points) == 1:
        return []
    return [(point, folder / point_name(point) / RESULT_FILE) for point in points]


def _fine_tuning(home: Path, config: CycleConfig, one: TaskFiles, arm: Arm) -> Iterator[Job]:
    """Yield the search, and the compared fine-tunings with the chosen settings."""
    name, files = one.task.name, home / TASKS_FOLDER / one.task.name
    candidates: list[tuple[FinetuneConfig, Path]] = []
    search_jobs = []
    start, after = _start_model_and_job(home, config, arm, name)
    for point, result_file in search_files(home, config, arm, name):
        values = one.own_settings(config.finetune_of(one.task, point, arm))
        candidates.append((values, result_file))
        if search_home(home) == home:  # draws after the first reuse the first draw's search
            tuning = functions.FineTuning(
                start, files, result_file.parent, config.search_seed_range, one.metric
            )
            job = f"search {point_name(point)} {arm} on {name}"
            yield Job(job, functions.search, (tuning, values), output=result_file, after=after)
            search_jobs.append(job)
    first_values = one.own_settings(config.finetune_of(one.task, config.search_points()[0], arm))
    # without a search: a single candidate, whose file is never read
    candidates = candidates or [(first_values, home)]
    students = 1 if arm in UNTAUGHT else config.students
    for number in range(students):
        start, after = _start_model_and_job(home, config, arm, name, number)
        out = home / student_folder(folder_of(arm, name), number, students)
        seeds = range(number, config.expert_seeds if arm == "expert" else config.seeds, students)
        keep_every = arm == "expert" and config.needs_every_seed
        tuning = functions.FineTuning(start, files, out, seeds, one.metric, keep_every=keep_every)
        subject = f"{arm}, student {number}," if students > 1 else arm
        yield Job(
            f"{subject} on {name}",
            functions.fine_tune,
            (tuning, candidates),
            output=seed_folder(out, seeds[-1]) if keep_every else out / RESULT_FILE,
            after=(*after, *search_jobs),
        )
        if arm in WITH_TEACHERS:
            out = home / student_folder(own_head_folder(arm, name), number, students)
            tuning = functions.FineTuning(start, files, out, range(number, number + 1), one.metric)
            yield Job(
                f"own head of {subject} on {name}",
                functions.score_head,
                (tuning, first_values),
                output=out / RESULT_FILE,
                after=after,
            )


def _start_model_and_job(
    home: Path, config: CycleConfig, arm: Arm, task: str, number: int = 0
) -> tuple[Path, tuple[str, ...]]:
    """Return the model that a fine-tuning starts from, and the job that makes it."""
    student = student_of(config, arm, task, number)
    start = start_folder(config, arm)
    if student:
        return home / "students" / student, (f"student {student}",)
    return home / start, (start,)
