"""The run files of a cycle's stages, which can be run by hand. Writes nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rekindle.data.settings import parse_settings
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.inputs import TaskFiles, test_files
from rekindle.pipeline.cycle.sections import GROUPED_RANKING, CycleTask
from rekindle.pipeline.cycle.students import Student, students_of, teachers_on
from rekindle.train.finetune.result import seed_folder

CORPUS_FILE = "corpus.yaml"
CACHE_FILE = "stage1.yaml"


def of_text(file: str, text: str) -> str:
    """Return the name of a file that exists for each text (see ``CycleConfig.texts``)."""
    stem, _, ending = file.partition(".")
    return f"{stem}-{text}.{ending}" if text else file


def configs(home: Path, config: CycleConfig, tasks: Sequence[TaskFiles]) -> dict[str, RunConfig]:
    """Return the run file of every stage by its name."""
    settings = config.model_dump(mode="json", by_alias=True)
    runs: dict[str, dict[str, Any]] = {}
    corpora = {}
    for text in config.text_names:
        corpus = config.corpus_of(text)
        if config.test_texts == "remove":
            tests = [str(file) for file in test_files(home, config)]
            corpus = corpus.model_copy(update={"without": (*corpus.without, *tests)})
        shared = {
            "corpus": corpus.model_dump(mode="json", by_alias=True),
            "cache": config.cache_of(text).model_dump(mode="json", by_alias=True),
        }
        corpora[text] = shared | {"student": settings["student"]}
        teachers = [
            _teacher(home, name, next(one for one in tasks if one.task.name == task), seed)
            # The two texts of a record are the pairs in that case.
            | ({"pairs": None} if corpus.pair_field else {})
            for name, task, seed in teachers_on(config, text)
        ]
        runs[of_text(CORPUS_FILE, text)] = corpora[text]
        runs[of_text(CACHE_FILE, text)] = shared | {"teachers": teachers}
    for name, student in students_of(config).items():
        train = settings["train"] | {"seed": config.train.seed + student.number}
        train["objective"] = _objective(config, tasks, student)
        runs[f"students/{name}.yaml"] = corpora[student.text] | {"train": train}
    return {name: parse_settings(RunConfig, values, name) for name, values in runs.items()}


def _teacher(home: Path, name: str, one: TaskFiles, seed: int | None) -> dict[str, object]:
    model = home / "experts" / one.task.name
    return {
        "name": name,
        "model": str(model if seed is None else seed_folder(model, seed)),
        "task": "regression" if one.regression else "sequence_classification",
        "pairs": one.pairs,
    }


def _objective(
    config: CycleConfig, tasks: Sequence[TaskFiles], student: Student
) -> dict[str, object]:
    terms = [
        config.term_of(_in_groups(config, one, student), one.regression, student.arm).model_dump(
            mode="json", by_alias=True, exclude_unset=True
        )
        for one in tasks
        if one.task.name in student.tasks
    ]
    hard = config.train.objective.hard.model_dump(mode="json", by_alias=True)
    hard = hard if student.learns_masked_lm else {"weight": 0.0}
    return {"hard": hard, "distill": terms}


def _in_groups(config: CycleConfig, one: TaskFiles, student: Student) -> CycleTask:
    """Return the task. A ranker on a text of groups gets a ranking term within groups, unless the
    file sets ``ranking``; the common temperature does not apply to such a term.
    """
    has_groups = config.corpus_of(student.text).group_field is not None
    sets_ranking = "ranking" in {*config.distill, *one.task.distill}
    if one.splits["train"].groups is None or not has_groups or sets_ranking:
        return one.task
    temperature = {"temperature": 1.0} if "temperature" in config.distill else {}
    return one.task.model_copy(update={"distill": GROUPED_RANKING | temperature | one.task.distill})
